"""Runs that are saved at every epoch and go on from a checkpoint."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from altermoma_pl import AlterMOMACallback
from tests.helpers.lightning_models import Fusion, loader, trainer

KEY = "AlterMOMACallback"  # of the callback's state in a checkpoint


class Steady(Fusion):
    """Without Dropout: Lightning's checkpoints do not hold the state of the global generators."""

    def __init__(self, optimizer: str = "adamw") -> None:
        super().__init__(optimizer)
        self.lidar[2].p = 0.0


def checkpoints(folder: Path, **options: Any) -> ModelCheckpoint:
    return ModelCheckpoint(folder, "{epoch}-{step}", save_top_k=-1, **options)


def at(folder: Path, epoch: int) -> Path:
    return folder / f"epoch={epoch}-step={4 * epoch + 4}.ckpt"


def outcome(module: Any, ran: Any, callback: AlterMOMACallback) -> dict[str, Any]:
    return {
        "weights": dict(module.state_dict()),
        "masks": dict(callback.masks),
        "events": callback.events,
        "components": callback.components.state_dict(),
        "optimizer": ran.optimizers[0].state_dict(),
        "steps": ran.global_step,
    }


def resumed(path: Path, module: Any, callback: AlterMOMACallback, **options: Any) -> Any:
    """Go on from the checkpoint with other weights and other global generators than it was saved with."""
    torch.manual_seed(99)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1.0)
    train = options.pop("train", None)
    built = trainer(callback, **options)
    built.fit(module, train or loader(), loader(seed=1), ckpt_path=path)
    return built
