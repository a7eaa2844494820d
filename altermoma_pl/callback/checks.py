"""What is checked before anything is changed."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from altermoma_pl.callback.loaders import Batches, ProbeLoader
from altermoma_pl.granularity import Granularity, Sparsity
from altermoma_pl.mask.masks import Masks
from altermoma_pl.mask.schedules import Schedule
from altermoma_pl.mask.top_k import Scope, check_density, check_sparsity
from altermoma_pl.model.distributed import check_division, is_sharded, local, sums
from altermoma_pl.model.modality import SHARED
from altermoma_pl.model.options import check_type
from altermoma_pl.score import Criterion
from altermoma_pl.score.calibration import OnNonFinite, known_length

_NAME = re.compile(r"[\w-]+")
_SUPPORTED = ("SingleDeviceStrategy", "SingleDeviceXLAStrategy", "DDPStrategy", "ModelParallelStrategy")
_INSTEAD = {
    "FSDPStrategy": "its parameters are flattened, so that no weight has a place of its own",
    "DeepSpeedStrategy": "it keeps optimizer and parameters to itself",
}


def check_options(
    modalities: Iterable[str],
    sparsity: Sparsity,
    scope: str,
    min_density: float,
    loader: str,
    on_nonfinite: str,
) -> None:
    """Raise a `ValueError` if an option of the callback is out of range or names an unknown modality."""
    check_type("scope", scope, Scope)
    check_type("loader", loader, ProbeLoader)
    check_type("min_density", min_density, float)
    check_type("on_nonfinite", on_nonfinite, OnNonFinite)
    check_density(min_density)
    if not isinstance(sparsity, dict):
        check_sparsity(_number(sparsity))
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
        check_sparsity(_number(share), f"sparsity of {group!r}")


def check_parts(
    criterion: Criterion, schedule: Schedule, prunable: list[str] | None, seed: int, **others: Any
) -> None:
    """Raise a `ValueError` if an option of the callback is of another type than described.

    Args:
        criterion: Must be a `Criterion`.
        schedule: Must be a `Schedule`.
        prunable: Must be a list of strings, or None.
        seed: Must be one that torch takes.
        **others: Name -> value and annotation.
    """
    for name, part, kind in (("criterion", criterion, Criterion), ("schedule", schedule, Schedule)):
        if not isinstance(part, kind):
            raise ValueError(
                f"{name} must be an object that derives from {kind.__name__}, got {part!r}: give for example "
                f"{'Magnitude()' if kind is Criterion else 'OneShot(0)'}"
            )
    listed = prunable is None or isinstance(prunable, (list, tuple))
    if not listed or not all(isinstance(pattern, str) and pattern for pattern in prunable or ()):
        raise ValueError(f"prunable must be a list of patterns over parameter names, got {prunable!r}")
    check_type("seed", seed, int)
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must be at least 0 and below 2**63, got {seed}")
    for name, (value, hint) in others.items():
        check_type(name, value, hint)


def _number(value: Any) -> Any:
    """The value, in a form that is no number where it is a boolean."""
    return repr(value) if isinstance(value, bool) else value


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


def check_granularity(
    granularity: Granularity,
    criterion: Criterion,
    sparsity: Sparsity,
    scope: Scope,
    min_density: float,
    store_components: bool,
) -> None:
    """Raise a `ValueError` if the other options cannot go with what is pruned as one piece."""
    granularity.check(criterion, sparsity, scope, min_density)
    if granularity.by_channel and store_components:
        raise ValueError("store_components is for single weights: components of channels are not stored")


def check_not_empty(batches: Batches, kind: str) -> None:
    """Raise a `ValueError` if a loader of known length has no batch."""
    if known_length(batches) == 0:
        raise ValueError(
            f"the {kind} loader is empty, at least one batch is needed to score weights: check its data set, "
            f"drop_last and the Trainer's limits on batches"
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


def callbacks_of(trainer: Any) -> list[Callback]:
    """All callbacks of a Trainer: it gets the attribute from elsewhere, so that its type is not known."""
    return list(trainer.callbacks)


def check_name(name: str | None) -> None:
    """Raise a `ValueError` unless the name can be a part of metrics, files and keys, or is None."""
    if name is not None and not (isinstance(name, str) and _NAME.fullmatch(name)):
        raise ValueError(f"name must be None, or made of letters, digits, '_' and '-', got {name!r}")


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
    module: LightningModule,
    criterion: Criterion,
    schedule: Schedule,
    granularity: Granularity,
    store_components: bool,
) -> None:
    """Raise a `ValueError` if parameters are sharded and something cannot work with that."""
    if not is_sharded(module.parameters()):
        return
    check_division(module.parameters())
    if not criterion.shardable:
        raise ValueError(
            f"{type(criterion).__name__} needs whole parameters, and those of this model are sharded over "
            f"processes: use AlterEva, SNIP, Taylor or Magnitude, or strategy='ddp'"
        )
    if not granularity.shardable:
        raise ValueError(
            f"{granularity} needs whole parameters, and those of this model are sharded over processes: "
            f"use the granularity 'weight', or strategy='ddp'"
        )
    if schedule.rewinds_to is not None:
        raise ValueError(
            f"{type(schedule).__name__} keeps a copy of whole parameters, and those of this model are "
            f"sharded over processes: use another schedule, or strategy='ddp'"
        )
    if store_components:
        raise ValueError(
            "store_components=True would save one process's rows of DeCI and ReRI only, since the parameters "
            "of this model are sharded over processes: leave it out, or use strategy='ddp'"
        )
