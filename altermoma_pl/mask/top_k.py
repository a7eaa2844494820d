"""From scores and a target to masks. Knows nothing of models."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from altermoma_pl.mask.masks import Masks
from altermoma_pl.mask.selection import Selection

Scope = Literal["global", "modality", "layer", "row"]


def top_k(
    scores: Mapping[str, Tensor],
    sparsity: float | Mapping[str, float],
    scope: Scope = "global",
    within: Masks | None = None,
    min_density: float = 0.0,
    groups: Mapping[str, str] | None = None,
    tie_breaker: Mapping[str, Tensor] | None = None,
) -> Masks:
    """Keep the weights with the highest scores: exactly n - round(sparsity * n) of n in each scope.

    Among equal scores the higher `tie_breaker` is kept, then the earlier position (tensor order, then
    row-major). Eq. 2 of the paper keeps the share 1 - sparsity; its Algorithm 1, read literally, would
    keep the share `sparsity`.

    Scores, masks and tie breakers may be sharded by rows over all processes; then the masks returned are,
    too, and all processes must call this alike.

    Args:
        scores: Parameter name -> score of each weight, higher is kept.
        sparsity: Share of zeros in [0, 1), of all weights and not of what remains; or one for each
            group, with the scope "modality".
        scope: Over what weights compete: all, each group of `groups`, each tensor, or each row of each
            tensor, that is each index of its first dimension: the weights of one output of a linear or
            convolution layer (of one input, if the convolution is transposed).
        within: Masks to shrink; what they prune stays pruned.
        min_density: Share of each tensor that stays whatever its scores, at least one weight; 0 for
            no such floor. The exact count still holds.
        groups: Parameter name -> group, for the scope "modality".
        tie_breaker: Parameter name -> second score, read only if first ones are equal where it matters; a
            mapping that is no dict may compute them on access.

    Raises:
        ValueError: If a score is not finite, a shape differs, the sparsity is outside [0, 1) or below
            what `within` prunes already, a group is unknown or missing, the floors need more weights
            than the target keeps, or only some scores are sharded.
    """
    check_scores(scores, within)
    if tie_breaker is not None:
        _check_alike(scores, tie_breaker, "tie breaker", shapes=isinstance(tie_breaker, dict))
    check_density(min_density)
    selection = Selection(scores, within, tie_breaker)
    for label, names, share in _scopes(scores, sparsity, scope, groups):
        if scope == "row" and scores[names[0]].ndim > 1:
            shape = scores[names[0]].shape
            count = _count_in_row(selection, label, shape, names[0], share, min_density)
            selection.keep_best_in_rows_(names[0], count)
        else:
            sizes = {name: scores[name].numel() for name in names}
            _keep_best_(selection, label, sizes, share, min_density)
    return Masks(selection.kept)


def num_kept(
    within: Masks,
    sparsity: float | Mapping[str, float],
    scope: Scope = "global",
    min_density: float = 0.0,
    groups: Mapping[str, str] | None = None,
) -> int:
    """How many weights `top_k` keeps within masks, whatever the scores; arguments are as there.

    Raises:
        ValueError: As `top_k`, where the sparsity cannot be reached.
    """
    alive, total = within.counts, 0
    for label, names, share in _scopes(within, sparsity, scope, groups):
        if scope == "row" and within[names[0]].ndim > 1:
            mask = within[names[0]]
            rows = Selection({names[0]: mask}, within)
            total += len(mask) * _count_in_row(rows, label, mask.shape, names[0], share, min_density)
        else:
            sizes = {name: within[name].numel() for name in names}
            total += _count_and_floors(alive, label, sizes, share, min_density)[0]
    return total


def check_sparsity(sparsity: float, what: str = "sparsity") -> None:
    """Raise a `ValueError` unless `sparsity` is in [0, 1)."""
    if not isinstance(sparsity, (int, float)) or not 0 <= sparsity < 1:
        raise ValueError(f"{what} must be a share of zeros in [0, 1), got {sparsity!r}")


def check_density(min_density: float) -> None:
    """Raise a `ValueError` unless `min_density` is in [0, 1]."""
    if not 0 <= min_density <= 1:
        raise ValueError(f"min_density must be in [0, 1], got {min_density!r}")


def check_scores(scores: Mapping[str, Tensor], within: Masks | None) -> None:
    """Raise a `ValueError` if there are no scores, or `within` has other names or shapes."""
    if not scores:
        raise ValueError("there are no scores: nothing to rank")
    if within is not None:
        _check_alike(scores, within, "mask")


def _check_alike(
    scores: Mapping[str, Tensor], others: Mapping[str, Tensor], what: str, shapes: bool = True
) -> None:
    if others.keys() != scores.keys():
        difference = sorted(others.keys() ^ scores.keys())
        raise ValueError(f"scores and {what}s name different parameters: {difference}")
    for name, score in scores.items():
        if shapes and others[name].shape != score.shape:
            raise ValueError(
                f"score of {name!r} has shape {tuple(score.shape)}, its {what} {tuple(others[name].shape)}"
            )


def _scopes(
    scores: Mapping[str, Tensor],
    sparsity: float | Mapping[str, float],
    scope: Scope,
    groups: Mapping[str, str] | None,
) -> Iterator[tuple[str, list[str], float]]:
    """Label, parameter names and target of each set over which weights compete."""
    if scope == "modality":
        members = _members(scores, groups)
    elif scope in ("layer", "row"):
        members = {name: [name] for name in scores}
    elif scope == "global":
        members = {"the model": list(scores)}
    else:
        raise ValueError(f"scope must be one of {list(get_args(Scope))}, got {scope!r}")
    if not isinstance(sparsity, Mapping):
        check_sparsity(sparsity)
        sparsity = dict.fromkeys(members, sparsity)
    elif scope != "modality":
        raise ValueError(f"one sparsity for each modality needs the scope 'modality', got {scope!r}")
    if sparsity.keys() != members.keys():
        raise ValueError(f"sparsity names {sorted(sparsity)}, the groups with weights are {sorted(members)}")
    for group, names in members.items():
        check_sparsity(sparsity[group], f"sparsity of {group!r}")
        yield group if scope == "global" else f"{group!r}", names, sparsity[group]


def _members(scores: Mapping[str, Tensor], groups: Mapping[str, str] | None) -> dict[str, list[str]]:
    if groups is None:
        raise ValueError("the scope 'modality' needs the group of each parameter in `groups`")
    missing = [name for name in scores if name not in groups]
    if missing:
        raise ValueError(f"`groups` names no group for {missing}: each parameter with scores needs one")
    members: dict[str, list[str]] = {}
    for name in scores:
        members.setdefault(groups[name], []).append(name)
    return members


def _keep_best_(
    selection: Selection, label: str, sizes: Mapping[str, int], sparsity: float, min_density: float
) -> None:
    """What each tensor's floor protects, and the best of the rest."""
    count, floors = _count_and_floors(selection.num_alive, label, sizes, sparsity, min_density)
    names = list(sizes)
    while True:
        selection.keep_best_(names, count)
        kept = selection.count_kept(names)
        short = [name for name in names if kept[name] < floors[name]]
        if not short:
            return
        # These get their floors and no more: what they take from the others makes those choosier still.
        selection.forget_(names)
        for name in short:
            selection.keep_best_([name], floors[name])
        count -= sum(floors[name] for name in short)
        names = [name for name in names if name not in short]


def _count_and_floors(
    alive: Mapping[str, int], label: str, sizes: Mapping[str, int], sparsity: float, min_density: float
) -> tuple[int, dict[str, int]]:
    """How many weights stay of these tensors together, and at least of each."""
    total = sum(sizes.values())
    count = total - round(sparsity * total)
    check_enough(label, sparsity, count, sum(alive[name] for name in sizes), total)
    floors = {name: _floor(size, alive[name], min_density) for name, size in sizes.items()}
    _check_floors(label, sparsity, count, total, min_density, sum(floors.values()))
    return count, floors


def _count_in_row(
    selection: Selection, label: str, shape: torch.Size, name: str, sparsity: float, min_density: float
) -> int:
    """How many weights stay in each row of one tensor."""
    rows, columns = shape[0], shape[1:].numel()
    count = columns - round(sparsity * columns)
    check_enough(f"a row of {label}", sparsity, count, selection.fewest_in_a_row(name), columns)
    floor = _floor(shape.numel(), selection.num_alive[name], min_density)
    _check_floors(label, sparsity, rows * count, shape.numel(), min_density, floor)
    return count


def check_enough(label: str, sparsity: float, count: int, alive: int, total: int) -> None:
    """Raise a `ValueError` if the target keeps more weights than are left."""
    if count > alive:
        raise ValueError(
            f"sparsity {sparsity:.6g} of {label} is below what is already pruned, "
            f"{1 - alive / total:.6g}: masks only shrink, ask for more or start "
            f"from a dense checkpoint"
        )


def _check_floors(
    label: str, sparsity: float, count: int, total: int, min_density: float, protected: int
) -> None:
    if protected > count:
        raise ValueError(
            f"sparsity {sparsity:.6g} of {label} keeps {count} of {total} weights, but "
            f"min_density={min_density:g} protects {protected}: lower one of them"
        )


def _floor(size: int, alive: int, min_density: float) -> int:
    if min_density == 0:
        return 0
    return min(alive, max(1, math.ceil(round(min_density * size, 9))))  # 0.07 * 100 is more than 7
