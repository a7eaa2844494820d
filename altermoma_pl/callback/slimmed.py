"""`Slimmed`: trains on with a model whose channels were removed."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from altermoma_pl.callback.checkpoints import load_checkpoint
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
        saved = load_checkpoint(self.checkpoint)
        if KEY not in saved:
            raise ValueError(
                f"{self.checkpoint} is not the checkpoint of a slim model: write one with `altermoma export`"
            )
        try:
            reshape_like_(pl_module, saved["state_dict"], saved[KEY])
        except ValueError as error:
            raise ValueError(f"{self.checkpoint}: {error}") from error
        pl_module.load_state_dict(saved["state_dict"])
        self._entry = saved[KEY]

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Say how the model differs from the dense one."""
        checkpoint[KEY] = self._entry
