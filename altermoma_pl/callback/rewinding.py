"""Rewinding: the state of a run at the start of an epoch, and how to bring it back later."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import keystr, tree_leaves_with_path, tree_map

from altermoma_pl.mask.schedules import Schedule


@dataclass(frozen=True)
class RewindPoint:
    """Everything that an event brings back; tensors on the CPU that share no memory with the run's.

    Not among it: random numbers, the order of the data, the counts of epochs and steps, loggers, other
    callbacks, and the scale of a gradient scaler.

    Args:
        epoch: At whose start it was taken.
        parameters: Parameter name -> value.
        buffers: Buffer name -> value, running statistics of norm layers among them; also buffers that
            `state_dict` leaves out.
        optimizers: `state_dict` of each optimizer.
        schedulers: `state_dict` of each learning-rate scheduler.
    """

    epoch: int
    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]
    optimizers: list[dict[str, Any]]
    schedulers: list[dict[str, Any]]

    @classmethod
    def take(cls, trainer: Trainer, module: LightningModule) -> RewindPoint:
        """Copy the present state."""
        return cls(
            trainer.current_epoch,
            _copied(dict(module.named_parameters())),
            _copied(dict(module.named_buffers())),
            [_copied(optimizer.state_dict()) for optimizer in trainer.optimizers],
            [_copied(config.scheduler.state_dict()) for config in trainer.lr_scheduler_configs],
        )

    @torch.no_grad()
    def restore_(self, trainer: Trainer, module: LightningModule) -> None:
        """Bring the state back in place, as often as asked; what `check_fits` refuses changes nothing."""
        self.check_fits(trainer, module)
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        for name, live in [*module.named_parameters(), *module.named_buffers()]:
            live.copy_(self._tensors[name])
        # Copies: optimizers and schedulers keep what they load, and go on to change it.
        for optimizer, state in zip(trainer.optimizers, self.optimizers, strict=True):
            optimizer.load_state_dict(_copied(state))
        for scheduler, state in zip(schedulers, self.schedulers, strict=True):
            scheduler.load_state_dict(_copied(state))

    def state_dict(self) -> dict[str, Any]:
        """Tensors on the CPU and builtins only."""
        return dict(vars(self))

    @property
    def _tensors(self) -> dict[str, Tensor]:
        return self.parameters | self.buffers

    def check_fits(self, trainer: Trainer, module: LightningModule) -> None:
        """Raise a `ValueError` if parameters, buffers, optimizers or schedulers are others by now."""
        live = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        schedulers = [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs]
        found = _conditions(live, trainer.optimizers, schedulers)
        expected = _conditions(self._tensors, self.optimizers, self.schedulers)
        names = [n for n in sorted(found.keys() | expected.keys()) if found.get(n) != expected.get(n)]
        if names:
            raise ValueError(
                f"cannot rewind to epoch {self.epoch}, these have changed since then: "
                + ", ".join(f"{n} (now {found.get(n)}, then {expected.get(n)})" for n in names)
            )
        places = [_misfits_of_optimizer(*e) for e in zip(self.optimizers, trainer.optimizers, strict=True)]
        places += [_misfits(*e, "scheduler") for e in zip(self.schedulers, schedulers, strict=True)]
        for place in itertools.chain.from_iterable(places):
            raise ValueError(
                f"cannot rewind to epoch {self.epoch}: what was saved at {place} does not fit; resume "
                f"from another checkpoint, or start a new fit from the weights alone"
            )


def check_rewindable(schedule: Schedule, point: RewindPoint | None, epoch: int) -> None:
    """Raise a `ValueError` if there is nothing to rewind to, and it is too late to take it."""
    target = schedule.rewinds_to
    if target is not None and target < epoch and (point is None or point.epoch != target):
        raise ValueError(
            f"{schedule} rewinds to the start of epoch {target}, but this run is at epoch {epoch} and has no "
            f"state of that epoch: start a new fit from the weights alone, or resume from a checkpoint that "
            f"was saved with this schedule and before its last event"
        )


def _conditions(
    tensors: Mapping[str, Tensor], optimizers: Sequence[Any], schedulers: Sequence[Any]
) -> dict[str, Any]:
    """What must be the same when a state is brought back, by name."""
    found: dict[str, Any] = {f"type of {name}": tensor.dtype for name, tensor in tensors.items()}
    found |= {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return found | {"number of optimizers": len(optimizers), "number of schedulers": len(schedulers)}


def _misfits_of_optimizer(saved: dict[str, Any], live: Optimizer) -> Iterator[str]:
    """The places that an optimizer would not load, or at which it would load nonsense."""
    now = live.state_dict()
    shapes = [parameter.shape for group in live.param_groups for parameter in group["params"]]
    if saved.keys() != now.keys() or not isinstance(saved["state"], dict):
        yield "optimizer"
        return
    yield from _misfits(saved["param_groups"], now["param_groups"], "optimizer['param_groups']")
    if [group["params"] for group in saved["param_groups"]] != [g["params"] for g in now["param_groups"]]:
        yield "optimizer['param_groups']"
    for number, entry in saved["state"].items():
        place = f"optimizer['state'][{number!r}]"
        if number not in range(len(shapes)) or not isinstance(entry, dict):
            yield place
            return
        # Before its first step an optimizer has no state to compare with: shapes tell something then.
        yield from _misfits(entry, now["state"].get(number, entry), place)
        yield from (
            f"{place}[{key!r}]"
            for key, value in entry.items()
            if isinstance(value, Tensor) and value.shape not in ((), shapes[number])
        )


def _misfits(saved: Any, live: Any, what: str) -> Iterator[str]:
    """The places where a saved value is of another kind than the live one; None may become a number."""
    found, expected = (
        {keystr(path): _kind(leaf) for path, leaf in tree_leaves_with_path(tree)} for tree in (saved, live)
    )
    for place in [*expected, *found]:
        kinds = [each.get(place, "missing") for each in (found, expected)]
        if kinds[0] != kinds[1] and kinds != [torch.Size(), NoneType]:
            yield what + place


def _kind(leaf: Any) -> Any:
    """The shape of a tensor or number; of what is neither its type."""
    if isinstance(leaf, float) and math.isnan(leaf):
        return "not a number"
    if isinstance(leaf, (int, float, Tensor)) and not isinstance(leaf, bool):
        return getattr(leaf, "shape", torch.Size())
    return type(leaf)


def _copied(value: Any) -> Any:
    """The same value with new containers, and tensors copied to the CPU."""
    return tree_map(
        lambda leaf: leaf.detach().to("cpu", copy=True) if isinstance(leaf, Tensor) else copy.deepcopy(leaf),
        value,
    )
