"""A run that another process kills again and again: it says where it is, and goes on from `last`."""

import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import fsspec.implementations.local
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from altermoma_pl import AlterMOMACallback, Linear
from altermoma_pl.callback import callback as pruning
from altermoma_pl.callback import state
from tests.helpers.lightning_models import MODALITIES, loader, short, trainer
from tests.helpers.resuming import Steady

PHASES = ("training", "scoring", "scored", "masked", "saving")
SPARSITY, SCHEDULE, MAX_EPOCHS, STEPS = 0.8, Linear(0, 4, every=2), 6, 4
OUTCOME = "outcome.pt"
_PAUSE = 0.002  # seconds: so that a kill hits the phase itself, however short it is

Announce = Callable[[str], None]


class Resumable:
    """A training loader that goes on where a checkpoint within an epoch left it."""

    def __init__(self) -> None:
        self._batches = list(loader())
        self._start = self._position = 0

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Any]:
        start, self._start = self._start, 0
        for position in range(start, len(self)):
            self._position = position + 1
            yield self._batches[position]

    def state_dict(self) -> dict[str, int]:
        return {"position": self._position % len(self)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._start = state["position"]


class Announcing(Steady):
    """Says when it trains and when it is scored."""

    def __init__(self, announce: Announce) -> None:
        super().__init__()
        self._announce = announce

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self._announce("training")
        return super().training_step(batch, batch_idx)

    def pruning_loss(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self._announce("scoring")
        return self.loss(batch)


class Saving(ModelCheckpoint):
    """After every step but the last of an epoch.

    A run that goes on from there repeats an epoch when it is resumed once more, with any callbacks: Lightning
    2.6 starts the new epoch with counts that its next checkpoint keeps.
    """

    def on_train_batch_end(self, *args: Any) -> None:
        batch_idx = args[-1]
        if batch_idx + 1 < STEPS:
            super().on_train_batch_end(*args)


def run(folder: Path, announce: Announce = lambda phase: None) -> None:
    """Train to the end, from the last checkpoint if there is one, and write what came out."""
    warnings.simplefilter("ignore")
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    module = Announcing(announce)
    callback = AlterMOMACallback(MODALITIES, SPARSITY, criterion=short(), schedule=SCHEDULE, figures=False)
    saving = Saving(folder, "{step}", save_last=True, save_top_k=1, every_n_train_steps=1)
    built = trainer(
        callback, saving, max_epochs=MAX_EPOCHS, enable_checkpointing=True, default_root_dir=folder
    )
    built.fit(module, Resumable(), loader(seed=1), ckpt_path="last")
    outcome = {
        "weights": module.state_dict(),
        "optimizer": built.optimizers[0].state_dict(),
        "pruning": callback.state_dict(),
        "steps": built.global_step,
    }
    torch.save(outcome, folder / OUTCOME)


def child(folder: Path, pipe: Connection) -> None:
    """Run, and send each phase as it begins; for a process of its own."""

    def announce(phase: str) -> None:
        pipe.send(phase)
        time.sleep(_PAUSE)

    _write_slowly(announce)
    _announce_decisions(announce)
    _announce_records(announce)
    run(folder, announce)
    pipe.send("done")


def _write_slowly(announce: Announce) -> None:
    """Checkpoints in pieces, each of which may be the last."""
    opener = fsspec.implementations.local.LocalFileOpener
    write = opener.write

    def write_pieces(self: Any, data: bytes) -> int:
        size = len(data) // 3 + 1
        for start in range(0, len(data), size):
            write(self, data[start : start + size])
            announce("saving")
        return len(data)

    opener.write = write_pieces


def _announce_decisions(announce: Announce) -> None:
    """When it has scored and not yet masked."""
    decide = pruning.decide

    def announced(*args: Any) -> Any:
        decision = decide(*args)
        announce("scored")
        return decision

    pruning.decide = announced


def _announce_records(announce: Announce) -> None:
    """Between the mask and its record in the callback's state."""
    record = state.PruningState.record

    def announced(self: Any, *args: Any) -> None:
        announce("masked")
        record(self, *args)

    state.PruningState.record = announced
