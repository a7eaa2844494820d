"""N:M sparsity: of every M consecutive weights along the input dimension, N stay. Knows nothing of models."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.distributed.tensor import DTensor

from altermoma_pl.mask.masks import Masks
from altermoma_pl.mask.selection import Selection, Tensors
from altermoma_pl.mask.top_k import check_enough, check_scores, check_sparsity

_TOLERANCE = 1e-9  # a schedule reaches its last target but for rounding


def keep_n_of_m(
    scores: Tensors,
    n: int,
    m: int,
    sparsity: float | None = None,
    within: Masks | None = None,
    input_dims: Mapping[str, int] | None = None,
) -> Masks:
    """Keep the `n` weights with the highest scores in each block of `m`, of equal ones the earlier.

    A block is `m` consecutive indices of the input dimension, all other indices being equal: of a linear
    layer's weight (out, in) a piece of a row, of a convolution's (out, in, height, width) `m` input channels
    at one kernel position, as in NVIDIA's ASP. Hardware multiplies rows with such zeros along the dimension
    that is summed over, and reads that dimension from consecutive addresses, to tell which inputs the `n`
    weights of a block meet. So a linear layer's weight is laid out as it is; a convolution's must become the
    matrix (out, height * width * in), channels last, in which a block is consecutive.

    With a `sparsity` below 1 - n/m, an event of a gradual schedule, the `m` - `n` lowest of each block are
    candidates, and of all candidates those with the lowest scores are pruned: exactly round(sparsity * size)
    weights. What later events keep is then a part of it, whatever their scores.

    Args:
        scores: Parameter name -> score of each weight, higher is kept; two dimensions or more.
        n: How many stay, at least 1.
        m: Of how many, more than `n`.
        sparsity: Share of zeros in [0, 1 - n/m], of all weights; None for the largest.
        within: Masks to shrink; what they prune stays pruned.
        input_dims: Parameter name -> input dimension, where it is not 1: 0 for a transposed convolution.

    Raises:
        ValueError: If a score is not finite, sharded, or not divisible into blocks, a shape differs, the
            sparsity is above 1 - n/m or below what `within` prunes already, or `within` leaves fewer than `n`
            weights in a block.
    """
    check_scores(scores, within)
    dims = _checked_dims(scores, n, m, input_dims)
    final = 1 - n / m
    target = final if sparsity is None else sparsity
    check_sparsity(target)
    if target > final + _TOLERANCE:
        raise ValueError(
            f"sparsity {target:.6g} is above {final:.6g}, which is all that {n}:{m} prunes: "
            f"set sparsity to {final:.6g}, or keep fewer of each {m}"
        )
    if within is not None:
        check_blocks_left(within, n, m, input_dims)
    best = {
        name: _best_of_blocks(name, score, n, m, dims[name], None if within is None else within[name])
        for name, score in scores.items()
    }
    if target >= final:
        return Masks(best)
    # The best of all blocks, and of all other weights those with the highest scores.
    total = sum(score.numel() for score in scores.values())
    count = total - round(target * total)
    check_enough("the model", target, count, total if within is None else within.num_kept, total)
    others = {name: ~mask for name, mask in best.items()}
    if within is not None:
        others = {name: other & within[name].to(other.device) for name, other in others.items()}
    selection = Selection(scores, others)
    selection.keep_best_(list(scores), max(0, count - total // m * n))
    return Masks({name: best[name] | mask for name, mask in selection.kept.items()})


def check_blocks_left(within: Tensors, n: int, m: int, input_dims: Mapping[str, int] | None = None) -> None:
    """Raise a `ValueError` if masks leave fewer than `n` weights in a block, or there are no such blocks."""
    for name, dim in _checked_dims(within, n, m, input_dims).items():
        left = _blocks(within[name], m, dim).sum(1)
        if (left < n).any():
            raise ValueError(
                f"masks of before leave {left.min()} of {m} weights in a block of {name!r}, {n}:{m} keeps "
                f"{n}: start from a dense checkpoint or one of the same N:M"
            )


def at_most(mask: Tensor, n: int, m: int, input_dim: int = 1) -> bool:
    """Whether there are blocks and none keeps more than `n` weights of `m`: all that hardware asks for."""
    return mask.shape[input_dim] % m == 0 and bool((_blocks(mask, m, input_dim).sum(1) <= n).all())


def _checked_dims(weights: Tensors, n: int, m: int, input_dims: Mapping[str, int] | None) -> dict[str, int]:
    """Parameter name -> input dimension, of whole tensors that are divisible into blocks."""
    unknown = sorted((input_dims or {}).keys() - weights.keys())
    if unknown:
        raise ValueError(f"input_dims names {unknown}, but there are only {list(weights)}")
    dims = dict.fromkeys(weights, 1) | dict(input_dims or {})
    for name, dim in dims.items():
        tensor, shape = weights[name], tuple(weights[name].shape)
        if isinstance(tensor, DTensor):
            raise ValueError(
                f"{name!r} is sharded over processes, and {n}:{m} sparsity needs whole tensors: "
                f"use one device or DDP"
            )
        without = f"exclude it with prunable: ['!{name}']"
        if len(shape) < 2:
            raise ValueError(f"{name!r} of shape {shape} has no input dimension for {n}:{m}: {without}")
        if not 0 <= dim < len(shape):
            raise ValueError(f"input_dims[{name!r}] must be in [0, {len(shape) - 1}], got {dim!r}")
        if shape[dim] % m:
            raise ValueError(
                f"input dimension {dim} of {name!r}, {shape[dim]} of shape {shape}, is not divisible by "
                f"{m} as {n}:{m} needs it: {without}"
            )
    return dims


def _blocks(tensor: Tensor, m: int, dim: int) -> Tensor:
    """A tensor as blocks (number of blocks, m); a view if `dim` is the last and the layout allows it."""
    return tensor.movedim(dim, -1).reshape(-1, m)


def _best_of_blocks(name: str, score: Tensor, n: int, m: int, dim: int, alive: Tensor | None) -> Tensor:
    """The `n` best of each block of one score, of its shape."""
    rows = None if alive is None else {name: _blocks(alive, m, dim)}
    selection = Selection({name: _blocks(score, m, dim)}, rows)
    selection.keep_best_in_rows_(name, n)
    moved = score.movedim(dim, -1).shape
    return selection.kept[name].view(moved).movedim(-1, dim).contiguous()
