"""What is checked before anything is changed."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule, Trainer
from torch import nn

from altermoma_pl.granularity import Granularity, Sparsity, parse_granularity
from altermoma_pl.mask.masks import Masks
from altermoma_pl.mask.schedules import Schedule
from altermoma_pl.mask.top_k import Scope, check_density, check_sparsity
from altermoma_pl.model.distributed import check_division, is_sharded, local, sums
from altermoma_pl.model.modality import SHARED
from altermoma_pl.model.options import check_type
from altermoma_pl.score import Criterion

if TYPE_CHECKING:
    from altermoma_pl.callback.callback import AlterMOMACallback

_NAME = re.compile(r"[\w-]+")
_SUPPORTED = ("SingleDeviceStrategy", "SingleDeviceXLAStrategy", "DDPStrategy", "ModelParallelStrategy")
_INSTEAD = {
    "FSDPStrategy": "its parameters are flattened, so that no weight has a place of its own",
    "DeepSpeedStrategy": "it keeps optimizer and parameters to itself",
}


def check_options_of(
    callback: AlterMOMACallback, prunable: list[str] | None, hints: Mapping[str, Any]
) -> None:
    """Raise a `ValueError` if an option is not what its annotation says, is out of range, or clashes."""
    for option, hint in hints.items():
        value = vars(callback).get(option)
        if option not in ("sparsity", "name", "return") and not isinstance(value, Path):
            check_type(option, value, hint)
    check_density(callback.min_density)
    _check_sparsity(callback.modalities, callback.sparsity, callback.scope)
    for option, part, kind, example in (
        ("criterion", callback.criterion, Criterion, "Magnitude()"),
        ("schedule", callback.schedule, Schedule, "OneShot(0)"),
    ):
        if not isinstance(part, kind):
            raise ValueError(
                f"{option} must be an object that derives from {kind.__name__}, got {part!r}: give for "
                f"example {example}"
            )
    listed = prunable is None or (isinstance(prunable, Sequence) and not isinstance(prunable, str))
    if not listed or not all(isinstance(pattern, str) and pattern for pattern in prunable or ()):
        raise ValueError(f"prunable must be a list of patterns over parameter names, got {prunable!r}")
    if not 0 <= callback.seed < 2**63:
        raise ValueError(f"seed must be at least 0 and below 2**63, got {callback.seed}")
    if (name := callback.name) is not None and not (isinstance(name, str) and _NAME.fullmatch(name)):
        raise ValueError(f"name must be None, or made of letters, digits, '_' and '-', got {name!r}")
    granularity = parse_granularity(callback.granularity)
    granularity.check(callback.criterion, callback.sparsity, callback.scope, callback.min_density)
    if granularity.by_channel and callback.store_components:
        raise ValueError("store_components is for single weights: components of channels are not stored")


def _check_sparsity(modalities: Iterable[str], sparsity: Sparsity, scope: Scope) -> None:
    """Raise a `ValueError` if the sparsity is out of range, or not one for each modality."""
    if not isinstance(sparsity, dict):
        check_sparsity(sparsity)
        return
    if scope != "modality":
        raise ValueError(
            f"one sparsity for each modality needs scope='modality', got {scope!r} with sparsity={sparsity!r}"
        )
    known = [*modalities, SHARED]
    unknown, missing = [g for g in sparsity if g not in known], [g for g in known if g not in sparsity]
    if unknown or missing:
        raise ValueError(f"sparsity must name each of {known}: unknown are {unknown}, missing are {missing}")
    for group, share in sparsity.items():
        check_sparsity(share, f"sparsity of {group!r}")


def check_same_groups(earlier: Mapping[str, str], group_of: Mapping[str, str]) -> None:
    """Raise a `ValueError` if a weight was of another modality when its mask was made."""
    for name, group in earlier.items():
        if group != group_of.get(name, group):
            raise ValueError(
                f"{name!r} belongs to {group_of[name]!r}, but to {group!r} in the masks that this callback "
                f"holds: go on with the modalities they were made for, or give a new callback a dense model"
            )


def check_zeros(masks: Masks, model: nn.Module) -> None:
    """Raise a `ValueError` if weights are not zero where masks prune them."""
    masks.check_fits(model)
    parameters = dict(model.named_parameters())
    gone = [local(parameters[name].detach())[~local(mask)] for name, mask in masks.items()]
    counts = sums([int(rows.count_nonzero()) for rows in gone])  # the same in all processes
    for name, count in zip(masks, counts, strict=True):
        if count:
            raise ValueError(
                f"{name!r} is not zero where the masks that this callback holds prune it: they are of "
                f"another run; give a new model a new callback, or resume from a checkpoint that has both"
            )


def check_long_enough(schedule: Schedule, max_epochs: int | None) -> None:
    """Raise a `ValueError` if training ends before the last event; None and -1 are no limit."""
    if max_epochs is not None and 0 <= max_epochs <= schedule.last_epoch:
        raise ValueError(
            f"the last event of {schedule} is at epoch {schedule.last_epoch}, but max_epochs={max_epochs} "
            f"ends with epoch {max_epochs - 1}: let the schedule end earlier, or train for more epochs"
        )


def check_not_late(schedule: Schedule, epoch: int, missing: float, share_of: str) -> None:
    """Raise a `ValueError` if a run that starts at `epoch` has missed an event that it needs."""
    if epoch > schedule.last_epoch and missing:
        raise ValueError(
            f"the last event of {schedule} is at epoch {schedule.last_epoch}, but this run goes on at epoch "
            f"{epoch}, where a share of {missing:.4g} of the {share_of} is still to be pruned: let the "
            f"schedule end later"
        )


def warn_if_short(schedule: Schedule, sparsity: float, missing: float, share_of: str) -> None:
    """Warn if training ended before the last event, for example by `max_steps` or `max_time`."""
    if missing:
        warnings.warn(
            f"training ended at a sparsity of {sparsity:.4g}, a share of {missing:.4g} of the {share_of} is "
            f"still to be pruned: the last event of {schedule} is at epoch {schedule.last_epoch}",
            stacklevel=3,
        )


def check_disjoint(
    own: Iterable[str], other: Iterable[str], name: str | None, other_name: str | None
) -> None:
    """Raise a `ValueError` if two callbacks prune the same weights."""
    common = [parameter for parameter in own if parameter in set(other)]
    if common:
        raise ValueError(
            f"the callbacks {other_name!r} and {name!r} both prune {common}: their masks would contradict "
            f"each other; give them disjoint `prunable` patterns, for example "
            f"prunable=['!{common[0]}'] to one of them"
        )


def check_strategy(trainer: Trainer) -> None:
    """Raise a `ValueError` before anything is set up if masks could not be held under the strategy."""
    # By name: the classes of `lightning` and `pytorch_lightning` are distinct.
    names = [cls.__name__ for cls in type(trainer.strategy).__mro__]
    if any(name in _SUPPORTED for name in names):
        return
    why = next((f", because {why}" for name, why in _INSTEAD.items() if name in names), "")
    raise ValueError(
        f"AlterMOMACallback does not work with {names[0]}{why}: use strategy='ddp', or to shard parameters "
        f"ModelParallelStrategy(data_parallel_size=..., tensor_parallel_size=1) with a `configure_model` "
        f"that applies torch.distributed.fsdp.fully_shard"
    )


def check_sharding(
    module: LightningModule, criterion: Criterion, schedule: Schedule, grain: Granularity, stored: bool
) -> None:
    """Raise a `ValueError` if parameters are sharded and something cannot work with that."""
    if not is_sharded(module.parameters()):
        return
    check_division(module.parameters())
    if not criterion.shardable:
        why = f"{type(criterion).__name__} needs whole parameters"
        instead = "AlterEva, SNIP, Taylor or Magnitude"
    elif not grain.shardable:
        why, instead = f"{grain} needs whole parameters", "the granularity 'weight'"
    elif schedule.rewinds_to is not None:
        why, instead = f"{type(schedule).__name__} keeps a copy of whole parameters", "another schedule"
    elif stored:
        why = "store_components=True would save one process's rows of DeCI and ReRI"
        instead = "store_components=False"
    else:
        return
    raise ValueError(
        f"{why}, and those of this model are sharded over processes: use {instead}, or strategy='ddp'"
    )
