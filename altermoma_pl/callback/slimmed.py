"""`Slimmed`: trains on with a model whose channels were removed."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from altermoma_pl.granularity.channels.rebuilding import KEY, reshape_like_


class Slimmed(Callback):
    """Gives the module the shapes and weights of a slim checkpoint before optimizers are made.

    The module is built as the dense one was. Without `ckpt_path` training starts anew from the slim
    weights; with `ckpt_path`, the slim checkpoint itself or one that this run has saved, it is resumed, the
    optimizers' state included. Checkpoints of the run say how its model differs from the dense one, so they
    can stand here as well.

    Args:
        checkpoint: Path to what `altermoma export CHECKPOINT` wrote, or to a later checkpoint of such a run.

    Raises:
        ValueError: In `setup`, if the file is no slim checkpoint or of another model.
    """

    def __init__(self, checkpoint: str) -> None:
        self.checkpoint = checkpoint
        self._entry: dict[str, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Reshape the module once, and load the weights."""
        if self._entry:
            return
        saved = self._load()
        reshape_like_(pl_module, saved["state_dict"], saved[KEY])
        pl_module.load_state_dict(saved["state_dict"])
        self._entry = saved[KEY]

    def _load(self) -> dict[str, Any]:
        try:
            saved = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise
        except Exception as error:  # of reading other bytes, of any kind
            raise ValueError(
                f"{self.checkpoint} is no checkpoint of tensors and builtins only, or a part of one: {error}"
            ) from error
        if not isinstance(saved, dict) or KEY not in saved:
            raise ValueError(
                f"{self.checkpoint} is not the checkpoint of a slim model: write one with `altermoma export`"
            )
        return saved

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Say how the model differs from the dense one."""
        checkpoint[KEY] = self._entry
