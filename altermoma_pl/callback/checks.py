"""What is checked before anything is changed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import get_args

from altermoma_pl.callback.loaders import ProbeLoader
from altermoma_pl.criteria import Calibration
from altermoma_pl.masks import Masks
from altermoma_pl.modality import SHARED
from altermoma_pl.report import LayerReport, SparsityReport
from altermoma_pl.schedules import Schedule
from altermoma_pl.sparsity import Scope, check_density, check_sparsity

Sparsity = float | dict[str, float]


def check_options(
    modalities: Iterable[str], sparsity: Sparsity, scope: str, min_density: float, loader: str
) -> None:
    """Raise a `ValueError` if an option of the callback is out of range or names an unknown modality."""
    for option, value, allowed in (
        ("scope", scope, get_args(Scope)),
        ("loader", loader, get_args(ProbeLoader)),
    ):
        if value not in allowed:
            raise ValueError(f"{option} must be one of {list(allowed)}, got {value!r}")
    check_density(min_density)
    if not isinstance(sparsity, dict):
        check_sparsity(sparsity)
        return
    if scope != "modality":
        raise ValueError(f"one sparsity for each modality needs scope='modality', got {scope!r}")
    known = [*modalities, SHARED]
    unknown, missing = [g for g in sparsity if g not in known], [g for g in known if g not in sparsity]
    if unknown or missing:
        raise ValueError(f"sparsity must name each of {known}: unknown are {unknown}, missing are {missing}")
    for group, share in sparsity.items():
        check_sparsity(share, f"sparsity of {group!r}")


def check_masks(masks: Masks, calibration: Calibration, sparsity: Sparsity) -> None:
    """Raise a `ValueError` if loaded masks are of another model, or prune more than is asked for."""
    if masks.keys() != calibration.weights.keys():
        raise ValueError(
            f"the loaded masks and this model's prunable weights differ in "
            f"{sorted(masks.keys() ^ calibration.weights.keys())[:5]}: continue with the model, "
            f"modalities and prunable patterns that the masks were made for"
        )
    for label, share, done in _targets(SparsityReport.of(masks, calibration.group_of), sparsity):
        # Each tensor may have been rounded to one weight more.
        if done.num_weights - done.num_kept > round(share * done.num_weights) + len(masks):
            raise ValueError(
                f"sparsity {share:g} of {label} is below what is already pruned, {1 - done.kept:.4g}: "
                f"masks only shrink, ask for more or start from a dense checkpoint"
            )


def check_schedule(report: SparsityReport, sparsity: Sparsity, schedule: Schedule, epoch: int) -> None:
    """Raise a `ValueError` if a run that starts at `epoch` is too late for the events that it needs."""
    if epoch <= schedule.last_epoch:
        return
    for label, share, done in _targets(report, sparsity):
        if done.num_weights - done.num_kept < round(share * done.num_weights) - len(report.layers):
            raise ValueError(
                f"the last event of {schedule} is at epoch {schedule.last_epoch}, but this run goes on at "
                f"epoch {epoch} with a sparsity of {1 - done.kept:.4g} of {label}, {share:g} are asked for: "
                f"let the schedule end later"
            )


def _targets(report: SparsityReport, sparsity: Sparsity) -> Iterator[tuple[str, float, LayerReport]]:
    """Label, target and state of the model, or of each group."""
    for label, share in (sparsity if isinstance(sparsity, dict) else {"the model": sparsity}).items():
        yield label, share, report.groups.get(label, report.total)
