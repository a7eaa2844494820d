"""Files of pruned models: reading them, and training on with slim ones."""

from __future__ import annotations

import pickle
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from altermoma_pl.callback.callback import AlterMOMACallback
from altermoma_pl.callback.state import PruningState
from altermoma_pl.granularity.channels.resizing import KEY, reshape_like_


def load_checkpoint(path: str, trust: bool = False) -> dict[str, Any]:
    """What `torch.save` wrote; with `trust` also other objects than tensors and builtins, which can run code.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, or holds other objects than tensors and builtins.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=not trust)
    except FileNotFoundError:
        raise
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is no checkpoint of tensors and builtins only; if you trust its origin, use --trust of "
            f"`altermoma report` or `altermoma export`"
        ) from error
    except Exception as error:  # of reading other bytes, of any kind
        raise ValueError(f"{path} is no checkpoint, or only a part of one: {error!r}") from error
    return checkpoint if isinstance(checkpoint, dict) else {}


def pruning_states_of(checkpoint: dict[str, Any], path: str) -> dict[str, PruningState]:
    """Name of each callback in a Lightning checkpoint, "" if it has none -> its state.

    Raises:
        ValueError: If it holds no pruning state, a damaged one, or weights that are not zero where its masks
            say so.
    """
    callbacks, states = checkpoint.get("callbacks", {}), {}
    for key, value in callbacks.items():
        if not key.startswith(AlterMOMACallback.__name__):
            continue
        try:
            state = states[key.partition("[")[2].removesuffix("]")] = PruningState.from_state_dict(value)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        for name, mask in (state.masks or {}).items():
            weight = checkpoint["state_dict"].get(name)
            if weight is not None and weight[~mask].count_nonzero():
                raise ValueError(f"{path}: {name!r} is not zero where its mask prunes it")
    if not states:
        raise ValueError(
            f"{path} has no state of {AlterMOMACallback.__name__}: give a checkpoint that a Trainer with "
            f"this callback saved (this one has the callbacks {list(callbacks)})"
        )
    return states


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
