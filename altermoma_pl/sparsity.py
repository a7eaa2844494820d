"""From scores and a target to masks. Knows nothing of models."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from altermoma_pl.masks import Masks

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
        tie_breaker: Parameter name -> second score.

    Raises:
        ValueError: If a score is not finite, a shape differs, the sparsity is outside [0, 1) or below
            what `within` prunes already, a group is unknown or missing, or the floors need more weights
            than the target keeps.
    """
    _check_scores(scores, within)
    if tie_breaker is not None:
        _check_alike(scores, tie_breaker, "tie breaker")
    check_density(min_density)
    keep: dict[str, Tensor] = {}
    for label, names, share in _scopes(scores, sparsity, scope, groups):
        candidates = [within[n] if within else torch.ones_like(scores[n], dtype=torch.bool) for n in names]
        values = [scores[n] for n in names]
        ties = [tie_breaker[n] for n in names] if tie_breaker is not None else None
        keep_best = _keep_best_in_rows if scope == "row" else _keep_best
        kept = keep_best(label, values, candidates, share, min_density, ties)
        keep.update(zip(names, kept, strict=True))
    return Masks({name: keep[name] for name in scores})


def check_sparsity(sparsity: float, what: str = "sparsity") -> None:
    """Raise a `ValueError` unless `sparsity` is in [0, 1)."""
    if not isinstance(sparsity, (int, float)) or not 0 <= sparsity < 1:
        raise ValueError(f"{what} must be a share of zeros in [0, 1), got {sparsity!r}")


def check_density(min_density: float) -> None:
    """Raise a `ValueError` unless `min_density` is in [0, 1]."""
    if not 0 <= min_density <= 1:
        raise ValueError(f"min_density must be in [0, 1], got {min_density!r}")


def _check_scores(scores: Mapping[str, Tensor], within: Masks | None) -> None:
    if not scores:
        raise ValueError("there are no scores: nothing to rank")
    if within is not None:
        _check_alike(scores, within, "mask")
    for name, score in scores.items():
        live = score if within is None else score[within[name].to(score.device)]
        if not torch.isfinite(live).all():
            raise ValueError(
                f"score of {name!r} is not finite at {int((~torch.isfinite(live)).sum())} weights"
            )


def _check_alike(scores: Mapping[str, Tensor], others: Mapping[str, Tensor], what: str) -> None:
    if others.keys() != scores.keys():
        difference = sorted(others.keys() ^ scores.keys())
        raise ValueError(f"scores and {what}s name different parameters: {difference}")
    for name, score in scores.items():
        if others[name].shape != score.shape:
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
    if isinstance(sparsity, Mapping) and scope != "modality":
        raise ValueError(f"one sparsity for each modality needs the scope 'modality', got {scope!r}")
    if not isinstance(sparsity, Mapping):
        check_sparsity(sparsity)
    if scope == "global":
        yield "the model", list(scores), sparsity  # type: ignore[misc]
    elif scope in ("layer", "row"):
        for name in scores:
            yield f"{name!r}", [name], sparsity  # type: ignore[misc]
    elif scope == "modality":
        yield from _modality_scopes(scores, sparsity, groups)
    else:
        raise ValueError(f"scope must be one of {list(get_args(Scope))}, got {scope!r}")


def _modality_scopes(
    scores: Mapping[str, Tensor], sparsity: float | Mapping[str, float], groups: Mapping[str, str] | None
) -> Iterator[tuple[str, list[str], float]]:
    if groups is None:
        raise ValueError("the scope 'modality' needs the group of each parameter in `groups`")
    missing = [name for name in scores if name not in groups]
    if missing:
        raise ValueError(f"`groups` names no group for {missing}: each parameter with scores needs one")
    members: dict[str, list[str]] = {}
    for name in scores:
        members.setdefault(groups[name], []).append(name)
    shares = sparsity if isinstance(sparsity, Mapping) else dict.fromkeys(members, sparsity)
    if shares.keys() != members.keys():
        raise ValueError(f"sparsity names {sorted(shares)}, the groups with weights are {sorted(members)}")
    for group, names in members.items():
        check_sparsity(shares[group], f"sparsity of {group!r}")
        yield f"{group!r}", names, shares[group]


def _keep_best(
    label: str,
    scores: list[Tensor],
    candidates: list[Tensor],
    sparsity: float,
    min_density: float,
    ties: list[Tensor] | None,
) -> list[Tensor]:
    total = sum(score.numel() for score in scores)
    count = total - round(sparsity * total)
    live = [int(c.count_nonzero()) for c in candidates]
    _check_enough(label, sparsity, count, sum(live), total)
    floors = [_floor(score.numel(), alive, min_density) for score, alive in zip(scores, live, strict=True)]
    _check_floors(label, sparsity, count, total, min_density, sum(floors))
    device = scores[0].device
    flat, open_ = _flat(scores, device), _flat(candidates, device)
    second = _flat(ties, device) if ties else None
    kept = torch.zeros_like(open_)
    start = 0
    for score, floor in zip(scores, floors, strict=True):
        part = slice(start, start + score.numel())
        kept[part] = _best(flat[part], open_[part], floor, None if second is None else second[part])
        start += score.numel()
    kept |= _best(flat, open_ & ~kept, count - sum(floors), second)
    parts = torch.split(kept, [score.numel() for score in scores])
    return [p.view(s.shape).to(s.device) for p, s in zip(parts, scores, strict=True)]


def _keep_best_in_rows(
    label: str,
    scores: list[Tensor],
    candidates: list[Tensor],
    sparsity: float,
    min_density: float,
    ties: list[Tensor] | None,
) -> list[Tensor]:
    """The same number of weights in each row of one tensor."""
    (score,), (candidate,) = scores, candidates
    shape = (score.shape[0] if score.ndim > 1 else 1, -1) if score.numel() else (1, 0)
    values, open_ = score.detach().reshape(shape), candidate.to(score.device).reshape(shape)
    rows, columns = values.shape
    count = columns - round(sparsity * columns)
    fewest = int(open_.sum(1).min())
    _check_enough(f"a row of {label}", sparsity, count, fewest, columns)
    floor = _floor(score.numel(), int(open_.count_nonzero()), min_density)
    _check_floors(label, sparsity, rows * count, score.numel(), min_density, floor)
    order = torch.arange(columns, device=values.device).expand(rows, columns)
    keys = [values] if ties is None else [ties[0].detach().to(values.device).reshape(shape), values]
    for key in (*keys, open_.int()):  # stable sorts, the most important key last
        order = order.gather(1, key.gather(1, order).argsort(dim=1, descending=True, stable=True))
    kept = torch.zeros_like(open_).scatter_(1, order[:, :count], True)
    return [kept.view(score.shape)]


def _check_enough(label: str, sparsity: float, count: int, alive: int, total: int) -> None:
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
    return min(alive, max(1, math.ceil(min_density * size))) if min_density > 0 else 0


def _flat(tensors: list[Tensor], device: torch.device) -> Tensor:
    return torch.cat([t.detach().flatten().to(device) for t in tensors])


def _best(values: Tensor, candidates: Tensor, count: int, ties: Tensor | None) -> Tensor:
    """Boolean tensor with exactly `count` of the candidates: the highest values, stable among ties."""
    if count == 0:
        return torch.zeros_like(candidates)
    live = values[candidates]
    threshold = live.kthvalue(live.numel() - count + 1).values
    kept = candidates & (values > threshold)
    equal = (candidates & (values == threshold)).nonzero().squeeze(1)
    if ties is not None:
        equal = equal[ties[equal].argsort(descending=True, stable=True)]
    kept[equal[: count - int(kept.count_nonzero())]] = True
    return kept
