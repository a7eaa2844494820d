"""N:M sparsity: of every M consecutive weights along the input dimension, N stay. Knows nothing of models."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from altermoma_pl.mask.masks import Masks
from altermoma_pl.mask.selection import Selection
from altermoma_pl.mask.top_k import check_scores, check_sparsity

_TOLERANCE = 1e-9  # a schedule reaches its last target but for rounding


@dataclass(frozen=True)
class Pattern:
    """N:M: `n` of each `m` consecutive weights stay.

    Args:
        n: How many stay, at least 1.
        m: Of how many, more than `n`.

    Raises:
        ValueError: If `n` and `m` are not whole numbers with 1 <= n < m.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        if type(self.n) is not int or type(self.m) is not int or not 1 <= self.n < self.m:
            raise ValueError(
                f"a pattern N:M needs whole numbers with 1 <= N < M, like 2:4, got {self.n!r}:{self.m!r}"
            )

    @classmethod
    def parse(cls, text: object) -> Pattern:
        """The pattern that a text like "2:4" names.

        Raises:
            ValueError: If it names none.
        """
        found = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", text) if isinstance(text, str) else None
        if found is None:
            hint = "; YAML reads 2:4 without quotes as 124" if isinstance(text, int) else ""
            raise ValueError(f'a pattern is text of the form "2:4", N of each M stay, got {text!r}{hint}')
        return cls(int(found[1]), int(found[2]))

    @property
    def sparsity(self) -> float:
        """Share of zeros in (0, 1)."""
        return 1 - self.n / self.m

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


def keep_n_of_m(
    scores: Mapping[str, Tensor],
    pattern: Pattern,
    sparsity: float | None = None,
    within: Masks | None = None,
    input_dims: Mapping[str, int] | None = None,
) -> Masks:
    """Keep the `n` weights with the highest scores in each block of `m`, of equal ones the earlier.

    A block is `m` consecutive indices of the input dimension, all other indices being equal: of a linear
    layer's weight (out, in) a piece of a row, of a convolution's (out, in, height, width) `m` input channels
    at one kernel position, as in NVIDIA's ASP. Hardware multiplies rows whose zeros follow the pattern along
    the dimension that is summed over, and reads that dimension from consecutive addresses, to tell which
    inputs the `n` weights of a block meet. So a linear layer's weight is laid out as it is; a convolution's
    must become the matrix (out, height * width * in), channels last, in which a block is consecutive.

    With a `sparsity` below that of the pattern, an event of a gradual schedule, the `m` - `n` lowest of each
    block are candidates, and of all candidates those with the lowest scores are pruned: exactly
    round(sparsity * size) weights. What later events keep is then a part of it, whatever their scores.

    Args:
        scores: Parameter name -> score of each weight, higher is kept; two dimensions or more.
        pattern: How many stay of how many.
        sparsity: Share of zeros in [0, 1 - n/m], of all weights; None for that of the pattern.
        within: Masks to shrink; what they prune stays pruned.
        input_dims: Parameter name -> input dimension, where it is not 1: 0 for a transposed convolution.

    Raises:
        ValueError: If a score is not finite, sharded, or not divisible into blocks, a shape differs, the
            sparsity is above the pattern's or below what `within` prunes already, or `within` leaves
            fewer than `n` weights in a block.
    """
    check_scores(scores, within)
    for tensors in (scores, within or {}):
        _check_whole(tensors, pattern)
    target = _checked_target(sparsity, pattern)
    dims = _checked_dims(scores, pattern, input_dims)
    best = {
        name: _best_of_blocks(name, score, pattern, dims[name], None if within is None else within[name])
        for name, score in scores.items()
    }
    return Masks(best if target is None else _with_best_of_rest(scores, best, target, within))


def check_pattern(masks: Masks, pattern: Pattern, input_dims: Mapping[str, int] | None = None) -> None:
    """Prove that exactly `n` weights stay in each block, blocks being those of `keep_n_of_m`.

    Raises:
        ValueError: With the first parameter and block where that is not so.
    """
    _check_whole(masks, pattern)
    dims = _checked_dims(masks, pattern, input_dims)
    for name, mask in masks.items():
        counts = _blocks(mask, pattern.m, dims[name]).sum(1)
        wrong = (counts != pattern.n).nonzero()
        if len(wrong):
            first = int(wrong[0])
            raise ValueError(
                f"mask of {name!r} does not follow {pattern}: of the weights "
                f"[{_place(mask.shape, pattern.m, dims[name], first)}] {int(counts[first])} stay"
            )


def at_most(mask: Tensor, pattern: Pattern, input_dim: int = 1) -> bool:
    """Whether no block keeps more than `n` weights: all that hardware asks for.

    Args:
        mask: Booleans, with two dimensions or more.
        pattern: What blocks are, and `n`.
        input_dim: Along which they lie. If `m` does not divide it, there are no blocks: False.
    """
    if mask.shape[input_dim] % pattern.m:
        return False
    return bool((_blocks(mask, pattern.m, input_dim).sum(1) <= pattern.n).all())


def _check_whole(tensors: Mapping[str, Tensor], pattern: Pattern) -> None:
    sharded = [name for name, tensor in tensors.items() if isinstance(tensor, DTensor)]
    if sharded:
        raise ValueError(
            f"{sharded[0]!r} is sharded over processes, and {pattern} sparsity needs whole tensors: "
            f"use one device or DDP"
        )


def _checked_target(sparsity: float | None, pattern: Pattern) -> float | None:
    """The sparsity, or None if it is that of the pattern."""
    if sparsity is None:
        return None
    check_sparsity(sparsity)
    if sparsity > pattern.sparsity + _TOLERANCE:
        raise ValueError(
            f"sparsity {sparsity:.6g} is above {pattern.sparsity:.6g}, which is all that {pattern} prunes: "
            f"set sparsity to {pattern.sparsity:.6g}, or a pattern that keeps fewer"
        )
    return sparsity if sparsity < pattern.sparsity else None


def _checked_dims(
    tensors: Mapping[str, Tensor], pattern: Pattern, input_dims: Mapping[str, int] | None
) -> dict[str, int]:
    """Parameter name -> input dimension, each divisible into blocks."""
    given = input_dims or {}
    unknown = sorted(given.keys() - tensors.keys())
    if unknown:
        raise ValueError(f"input_dims names {unknown}, but there are only {list(tensors)}")
    dims = {name: given.get(name, 1) for name in tensors}
    for name, dim in dims.items():
        shape = tuple(tensors[name].shape)
        without = f"exclude it with prunable: ['!{name}']"
        if len(shape) < 2:
            raise ValueError(f"{name!r} of shape {shape} has no input dimension for {pattern}: {without}")
        if not 0 <= dim < len(shape):
            raise ValueError(f"input_dims[{name!r}] must be in [0, {len(shape) - 1}], got {dim!r}")
        if shape[dim] % pattern.m:
            raise ValueError(
                f"input dimension {dim} of {name!r}, {shape[dim]} of shape {shape}, is not divisible by "
                f"{pattern.m} as {pattern} needs it: {without}"
            )
    return dims


def _blocks(tensor: Tensor, m: int, dim: int) -> Tensor:
    """A tensor as blocks (number of blocks, m); a view if `dim` is the last and the layout allows it."""
    return tensor.movedim(dim, -1).reshape(-1, m)


def _best_of_blocks(name: str, score: Tensor, pattern: Pattern, dim: int, alive: Tensor | None) -> Tensor:
    """The `n` best of each block of one score, of its shape."""
    rows = None if alive is None else {name: _blocks(alive, pattern.m, dim)}
    selection = Selection({name: _blocks(score, pattern.m, dim)}, rows)
    fewest = selection.fewest_in_a_row(name)
    if fewest < pattern.n:
        raise ValueError(
            f"masks of before leave {fewest} of {pattern.m} weights in a block of {name!r}, {pattern} keeps "
            f"{pattern.n}: start from a dense checkpoint or one of the same pattern"
        )
    selection.keep_best_in_rows_(name, pattern.n)
    moved = score.movedim(dim, -1).shape
    return selection.kept[name].view(moved).movedim(-1, dim).contiguous()


def _with_best_of_rest(
    scores: Mapping[str, Tensor], best: Mapping[str, Tensor], sparsity: float, within: Masks | None
) -> dict[str, Tensor]:
    """The best of all blocks, and of all other weights those with the highest scores."""
    total = sum(score.numel() for score in scores.values())
    count = total - round(sparsity * total) - sum(int(mask.count_nonzero()) for mask in best.values())
    rest = {
        name: ~mask if within is None else within[name].to(mask.device) & ~mask for name, mask in best.items()
    }
    selection = Selection(scores, rest)
    alive = sum(selection.num_alive.values())
    if count > alive:
        raise ValueError(
            f"sparsity {sparsity:.6g} of the model is below what is already pruned, "
            f"{sparsity + (count - alive) / total:.6g}: masks only shrink, ask for more or start "
            f"from a dense checkpoint"
        )
    selection.keep_best_(list(scores), max(0, count))
    return {name: mask | selection.kept[name] for name, mask in best.items()}


def _place(shape: torch.Size, m: int, dim: int, block: int) -> str:
    """The indices of a block, as one would write them: "3, 4:8, 0"."""
    others = [*shape[:dim], *shape[dim + 1 :], shape[dim] // m]
    indices = []
    for length in reversed(others):
        block, index = divmod(block, length)
        indices.append(index)
    first, *rest = indices
    places = [str(index) for index in reversed(rest)]
    places.insert(dim, f"{first * m}:{(first + 1) * m}")
    return ", ".join(places)
