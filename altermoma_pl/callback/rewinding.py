"""Rewinding: the state of a run at the start of an epoch, and how to bring it back later."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from altermoma_pl.callback.state_checks import check_epoch, misfit, misfit_of_optimizer
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
        """Bring the state back in place, as often as asked.

        Raises:
            ValueError: If parameters, buffers, optimizers or schedulers are not those of that time;
                nothing is changed then.
        """
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
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> RewindPoint:
        """Rebuild from `state_dict()`.

        Raises:
            ValueError: If a key is missing or unknown, or a value of another type than described.
        """
        expected = {field.name for field in fields(cls)}
        if not isinstance(state, Mapping) or state.keys() != expected:
            found = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
            raise ValueError(f"state of a rewind point must hold {sorted(expected)}, got {found}")
        check_epoch("epoch of the rewind point", state["epoch"])
        for part, kind in (("parameters", Tensor), ("buffers", Tensor)):
            _check_values(part, state[part], dict, kind)
        for part in ("optimizers", "schedulers"):
            _check_values(part, state[part], list, dict)
        return cls(**state)

    @property
    def _tensors(self) -> dict[str, Tensor]:
        return self.parameters | self.buffers

    def check_fits(self, trainer: Trainer, module: LightningModule) -> None:
        """Raise a `ValueError` if parameters, buffers, optimizers or schedulers are others by now."""
        live: dict[str, Tensor] = dict(module.named_parameters()) | dict(module.named_buffers())
        found: dict[str, Any] = {name: tuple(tensor.shape) for name, tensor in live.items()}
        expected: dict[str, Any] = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}
        found |= {f"type of {name}": tensor.dtype for name, tensor in live.items()}
        expected |= {f"type of {name}": tensor.dtype for name, tensor in self._tensors.items()}
        schedulers = [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs]
        for what, now, then in (
            ("optimizers", trainer.optimizers, self.optimizers),
            ("schedulers", schedulers, self.schedulers),
        ):
            found[f"number of {what}"], expected[f"number of {what}"] = len(now), len(then)
        names = [n for n in sorted(found.keys() | expected.keys()) if found.get(n) != expected.get(n)]
        if names:
            raise ValueError(
                f"cannot rewind to epoch {self.epoch}, these have changed since then: "
                + ", ".join(f"{n} (now {found.get(n)}, then {expected.get(n)})" for n in names)
            )
        problems = [
            misfit_of_optimizer(*each) for each in zip(self.optimizers, trainer.optimizers, strict=True)
        ]
        problems += [misfit(*each, "scheduler") for each in zip(self.schedulers, schedulers, strict=True)]
        for problem in filter(None, problems):
            raise ValueError(
                f"cannot rewind to epoch {self.epoch}: what was saved at {problem!r} does not fit; resume "
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


def _check_values(part: str, value: Any, container: type, kind: type) -> None:
    values = value.values() if isinstance(value, dict) else value
    named = not isinstance(value, dict) or all(isinstance(name, str) for name in value)
    if not isinstance(value, container) or not named or not all(isinstance(each, kind) for each in values):
        raise ValueError(
            f"{part} of the rewind point must be a {container.__name__} of {kind.__name__}, got {value!r:.80}"
        )


def _copied(value: Any) -> Any:
    """The same value with new containers, and tensors copied to the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if type(value) is dict:
        return {key: _copied(each) for key, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_copied(each) for each in value)
    return copy.deepcopy(value)
