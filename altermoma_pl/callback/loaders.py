"""Where the batches come from, without disturbing the loops that use the same loaders."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader, DistributedSampler

from altermoma_pl.callback.lightning_internals import is_trial, to_device, validation_loaders
from altermoma_pl.model.distributed import num_processes, rank

ProbeLoader = Literal["auto", "calibration", "validation", "training"]


class Batches:
    """Numbered batches of some loaders, one after the other, on the Trainer's device.

    Every iteration gives the same order, for loaders that draw from a generator of torch: those of the
    loaders themselves are rewound here, the global one is seeded by whoever iterates. The limit of each
    loader is a number of batches or a share, as the Trainer's `limit_..._batches`.
    """

    def __init__(self, trainer: Trainer, loaders: Sequence[Iterable[Any]], limit: int | float) -> None:
        self._trainer = trainer
        self._loaders = [(_private(loader), _limit(loader, limit)) for loader in loaders]
        self._generators = [(g, g.get_state()) for loader in loaders for g in _generators(loader)]

    def __len__(self) -> int:
        """Number of batches; a `TypeError` where a loader does not know."""
        lengths = [(len(loader), limit) for loader, limit in self._loaders]
        return sum(length if limit is None else min(length, limit) for length, limit in lengths)

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        self.rewind()
        parts = (itertools.islice(loader, limit) for loader, limit in self._loaders)
        for index, batch in enumerate(itertools.chain.from_iterable(parts)):
            yield index, to_device(self._trainer, batch)

    def rewind(self) -> None:
        """Bring the loaders' own generators back to where they were."""
        for generator, state in self._generators:
            generator.set_state(state)


def probe_batches(trainer: Trainer, module: LightningModule, which: ProbeLoader) -> Batches:
    """Held-out batches for gradients; a `ValueError` if there is no such loader.

    "calibration" is the loader that `calibration_dataloader()` of the datamodule or module returns,
    "validation" and "training" are the Trainer's, "auto" is the first of the first two that exists.
    """
    if which == "training":
        return training_batches(trainer)
    datamodule, hook = getattr(trainer, "datamodule", None), "calibration_dataloader"
    calibration = getattr(datamodule, hook, getattr(module, hook, None))
    if calibration is not None and which != "validation":
        # It exists for scoring alone: only a fast_dev_run limits it, not limit_val_batches.
        limit = trainer.limit_val_batches if is_trial(trainer) else 1.0
        return Batches(trainer, [_Share(loader) for loader in _as_list(calibration())], limit)
    if which == "calibration":
        raise ValueError(
            "loader='calibration' needs a method `calibration_dataloader()` on the datamodule or the "
            "LightningModule, and neither has one"
        )
    loaders = validation_loaders(trainer)
    if loaders is None:
        raise ValueError(
            f"there is no held-out loader to score weights with (limit_val_batches="
            f"{trainer.limit_val_batches}): give the Trainer a validation loader and a validation_step, "
            f"define `calibration_dataloader()` on the datamodule or the LightningModule, or choose "
            f"loader='training'"
        )
    return Batches(trainer, _as_list(loaders), trainer.limit_val_batches)


def training_batches(trainer: Trainer) -> Batches:
    """The Trainer's training batches."""
    loader: Any = trainer.train_dataloader
    if isinstance(loader, (list, tuple, Mapping)):
        loader = _Combined(loader)
    return Batches(trainer, [loader], trainer.limit_train_batches)


class _Combined:
    """Several training loaders as Lightning combines them by default: until the longest ends."""

    def __init__(self, loaders: Any) -> None:
        self.combined = CombinedLoader(loaders, "max_size_cycle")
        self.combined.flattened = [_private(loader) for loader in self.combined.flattened]

    def __iter__(self) -> Iterator[Any]:
        for batch, _, _ in self.combined:
            yield batch

    def __len__(self) -> int:
        return max(len(loader) for loader in self.combined.flattened)  # as it will be in this mode


class _Share:
    """Every n-th batch of a loader that all n processes have alike; all where it is divided already."""

    def __init__(self, loader: Any) -> None:
        divided = isinstance(getattr(loader, "sampler", None), DistributedSampler)
        self.loader = loader
        self.first, self.step = (0, 1) if divided else (rank(), num_processes())

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(_private(self.loader), self.first, None, self.step)

    def __len__(self) -> int:
        return -(-(len(self.loader) - self.first) // self.step)


def _as_list(loaders: Any) -> list[Any]:
    if isinstance(loaders, Mapping):
        return list(loaders.values())
    return list(loaders) if isinstance(loaders, (list, tuple)) else [loaders]


def _private(loader: Any) -> Any:
    """The same loader, except that iterating it does not end an iteration of persistent workers."""
    if not isinstance(loader, DataLoader):
        return loader
    clone = copy.copy(loader)
    vars(clone)["persistent_workers"] = False  # DataLoader refuses to set it after construction
    return clone


def _generators(loader: Any) -> list[torch.Generator]:
    """The loader's own generators: its own, its sampler's, its batch sampler's; those of several loaders."""
    if isinstance(loader, _Share):
        return _generators(loader.loader)
    if isinstance(loader, _Combined):
        return [generator for part in loader.combined.flattened for generator in _generators(part)]
    owners = [loader, getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)]
    owners.append(getattr(owners[-1], "sampler", None))
    found = {id(g): g for o in owners if isinstance(g := getattr(o, "generator", None), torch.Generator)}
    return list(found.values())


def _limit(loader: Any, limit: int | float) -> int | None:
    if isinstance(limit, int):
        return limit
    return None if limit == 1.0 else int(len(loader) * limit)
