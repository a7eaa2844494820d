"""From scores and a target to masks. Knows nothing of models."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Literal, get_args

from torch import Tensor
from torch.distributed.tensor import DTensor

from altermoma_pl.mask.masks import Masks
from altermoma_pl.mask.selection import Selection, Tensors
from altermoma_pl.model.distributed import gathered, local

Scope = Literal["global", "modality", "layer", "row"]
_Shares = float | Mapping[str, float]


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
    for names, count, in_row, floors in _counts(scores, sparsity, scope, within, min_density, groups):
        if in_row is None:
            _keep_best_(selection, names, count, floors)
        else:
            selection.keep_best_in_rows_(names[0], in_row)
    return Masks(selection.kept)


def num_kept(
    within: Masks, sparsity: _Shares, scope: Scope, min_density: float, groups: Mapping[str, str] | None
) -> int:
    """How many weights `top_k` keeps within masks, whatever the scores; it raises what that raises."""
    return sum(count for _, count, *_ in _counts(within, sparsity, scope, within, min_density, groups))


def check_sparsity(sparsity: float, what: str = "sparsity") -> None:
    """Raise a `ValueError` unless `sparsity` is in [0, 1)."""
    if isinstance(sparsity, bool) or not isinstance(sparsity, (int, float)) or not 0 <= sparsity < 1:
        raise ValueError(f"{what} must be a share of zeros in [0, 1), got {sparsity!r}")


def check_density(min_density: float) -> None:
    """Raise a `ValueError` unless `min_density` is in [0, 1]."""
    if not 0 <= min_density <= 1:
        raise ValueError(f"min_density must be in [0, 1], got {min_density!r}")


def check_scores(scores: Tensors, within: Masks | None) -> None:
    """Raise a `ValueError` if there are no scores, or `within` has other names or shapes."""
    if not scores:
        raise ValueError("there are no scores: nothing to rank")
    if within is not None:
        _check_alike(scores, within, "mask")


def _check_alike(scores: Tensors, others: Tensors, what: str, shapes: bool = True) -> None:
    if others.keys() != scores.keys():
        difference = sorted(others.keys() ^ scores.keys())
        raise ValueError(f"scores and {what}s name different parameters: {difference}")
    for name, score in scores.items():
        if shapes and others[name].shape != score.shape:
            raise ValueError(
                f"score of {name!r} has shape {tuple(score.shape)}, its {what} {tuple(others[name].shape)}"
            )


def _scopes(
    weights: Tensors, sparsity: _Shares, scope: Scope, groups: Mapping[str, str] | None
) -> Iterator[tuple[str, list[str], float]]:
    """Label, parameter names and target of each set over which weights compete."""
    if scope not in get_args(Scope):
        raise ValueError(f"scope must be one of {list(get_args(Scope))}, got {scope!r}")
    if scope != "modality":
        groups = {name: "the model" if scope == "global" else name for name in weights}
    elif groups is None:
        raise ValueError("the scope 'modality' needs the group of each parameter in `groups`")
    missing = [name for name in weights if name not in groups]
    if missing:
        raise ValueError(f"`groups` names no group for {missing}: each parameter with scores needs one")
    members: dict[str, list[str]] = {}
    for name in weights:
        members.setdefault(groups[name], []).append(name)
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


def _counts(
    weights: Tensors,
    sparsity: _Shares,
    scope: Scope,
    within: Masks | None,
    min_density: float,
    groups: Mapping[str, str] | None,
) -> Iterator[tuple[list[str], int, int | None, dict[str, int]]]:
    """Of each set over which weights compete the parameter names, and how many weights stay.

    Then how many of these stay in a row, where rows compete, and how many at least of each parameter.
    """
    sizes = {name: tensor.numel() for name, tensor in weights.items()}
    alive = sizes if within is None else within.counts
    # At least one weight if there is a floor; rounded, because 0.07 * 100 is more than 7.
    least = {
        name: max(int(min_density > 0), math.ceil(round(min_density * sizes[name], 9))) for name in sizes
    }
    for label, names, share in _scopes(weights, sparsity, scope, groups):
        tensor, in_row = weights[names[0]], None
        total = sum(sizes[name] for name in names)
        if scope == "row" and tensor.ndim > 1:
            columns = tensor.shape[1:].numel()
            in_row = columns - round(share * columns)
            left = columns
            if within is not None:  # the fewest in a row, of all processes
                mask = within[names[0]]
                fewest = min(local(mask).flatten(1).sum(1).tolist(), default=columns)
                left = min(gathered(fewest)) if isinstance(mask, DTensor) else fewest
            check_enough(f"a row of {label}", share, in_row, left, columns)
            count = tensor.shape[0] * in_row
        else:
            count = total - round(share * total)
            check_enough(label, share, count, sum(alive[name] for name in names), total)
        floors = {name: min(alive[name], least[name]) for name in names}
        protected = sum(floors.values())
        if protected > count:
            raise ValueError(
                f"sparsity {share:.6g} of {label} keeps {count} of {total} weights, but "
                f"min_density={min_density:g} protects {protected}: lower one of them"
            )
        yield names, count, in_row, floors


def _keep_best_(selection: Selection, names: list[str], count: int, floors: Mapping[str, int]) -> None:
    """The best of these weights, and of each parameter at least its floor."""
    while True:
        selection.keep_best_(names, count)
        kept = selection.count_kept(names)
        short = [name for name in names if kept[name] < floors[name]]
        if not short:
            return
        # These get their floors and no more: what they take from the others makes those choosier still.
        for name in short:
            selection.keep_best_([name], floors[name])
        count -= sum(floors[name] for name in short)
        names = [name for name in names if name not in short]


def check_enough(label: str, sparsity: float, count: int, alive: int, total: int) -> None:
    """Raise a `ValueError` if the target keeps more weights than are left."""
    if count > alive:
        raise ValueError(
            f"sparsity {sparsity:.6g} of {label} is below what is already pruned, "
            f"{1 - alive / total:.6g}: masks only shrink, ask for more or start from a dense checkpoint"
        )


class Computed(Mapping[str, Tensor]):
    """Tensors by parameter name that are computed when asked for, each time anew, to save memory."""

    def __init__(self, names: Iterable[str], compute: Callable[[str], Tensor]) -> None:
        self._names, self._compute = dict.fromkeys(names), compute

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._compute(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
