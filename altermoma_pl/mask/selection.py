"""The best of very many weights: exact, without a copy or a gathered tensor, on one or several processes.

This is radix selection, in chunks: values are mapped to whole numbers in the same order, of which histograms
are made, sixteen bits at a time from the top (Alabi et al., "Fast k-selection algorithms for graphics
processing units", 2012): two reads for float32, four for float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from altermoma_pl.model.contexts import bits_of
from altermoma_pl.model.distributed import (
    check_division,
    gathered,
    is_sharded,
    like,
    local,
    rank,
    sharded_like,
    sum_,
    sums,
)

Tensors = Mapping[str, Tensor]
"""By parameter name."""

CHUNK = 2**17  # small: chunks stay in the cache between operations, and allocators reuse their memory
_BINS = 2**16


class Selection:
    """Weights that compete by score, then by tie breaker, then by position, of which the earlier wins.

    Positions are ordered by tensor, then row-major; the rows of a process come before those of the next.
    If scores are sharded, all processes must call the same methods. What keeps the best raises a `ValueError`
    if a score that competes is not finite.

    Args:
        scores: Parameter name -> score of each weight; all are sharded or none.
        within: Parameter name -> which weights compete; None for all.
        ties: Parameter name -> second score, read only if first ones are equal where it matters: it may
            be computed on access.

    Raises:
        ValueError: If only some scores are sharded.
    """

    def __init__(self, scores: Tensors, within: Tensors | None = None, ties: Tensors | None = None) -> None:
        self._scores, self._within, self._ties = scores, within, ties
        check_division(scores.values())
        self._sharded = is_sharded(scores.values())
        whole = [name for name, score in scores.items() if not isinstance(score, DTensor)]
        if self._sharded and whole:
            raise ValueError(
                f"scores of {whole} are whole on each process, others are sharded: shard all or none"
            )
        # Not like the scores: masks lie row-major whatever the layout of those.
        self._kept = {
            name: torch.zeros(local(score).shape, dtype=torch.bool, device=score.device)
            for name, score in scores.items()
        }

    @property
    def kept(self) -> dict[str, Tensor]:
        """Parameter name -> boolean tensor of the score's shape, and sharded like it: what is kept."""
        return {name: like(self._kept[name], score) for name, score in self._scores.items()}

    @torch.no_grad()
    def keep_best_(self, names: list[str], count: int) -> None:
        """Keep, of these parameters together, the `count` best weights and no others."""
        for name in names:
            self._kept[name].zero_()
        order = self._by_score(names)
        key, left, equal = kth_largest(order, count, lambda: self._check_finite(names))
        if left < equal and self._ties is not None:
            # Second scores are read here only: they may be computed, and most often nothing is tied.
            self._keep_(order, key + 1)
            order = self._by_tie(order, key)
            key, left, equal = kth_largest(order, left)
        self._keep_(order, key if left == equal else key + 1)
        if left < equal:
            self._keep_first_(order, key, left)

    def count_kept(self, names: list[str]) -> dict[str, int]:
        """Parameter name -> number of weights that are kept, of all processes."""
        return self._of_all({name: int(self._kept[name].count_nonzero()) for name in names})

    @torch.no_grad()
    def keep_best_in_rows_(self, name: str, count: int) -> None:
        """Keep the `count` best weights in each row of a parameter of two or more dimensions."""
        self._check_finite([name])
        dtype, ties = common_dtype([self._scores[name].dtype]), None
        tensors = [self._kept[name], *self._competing(name)]
        size = max(1, CHUNK // max(1, tensors[0].shape[1:].numel()))
        for start in range(0, len(tensors[0]), size):
            rows = slice(start, start + size)
            kept, score, *alive = (tensor[rows].flatten(1) for tensor in tensors)
            keys = only(ordered(score, dtype), *alive)
            ranked, order = keys.sort(dim=1, descending=True, stable=True)
            inside, outside = ranked[:, max(count - 1, 0) : count], ranked[:, count : count + 1]
            if self._ties is not None and bool((inside == outside).any()):
                ties = self._tie(name) if ties is None else ties
                second = ordered(ties[rows].flatten(1), common_dtype([ties.dtype]))
                # A stable sort by the first key of what is sorted by the second one is by both.
                order = second.argsort(dim=1, descending=True, stable=True)
                order = order.gather(1, keys.gather(1, order).argsort(dim=1, descending=True, stable=True))
            kept.scatter_(1, order[:, :count], True)

    def _check_finite(self, names: list[str]) -> None:
        """Raise a `ValueError` with the name of the first parameter whose competing scores are not finite."""
        bad = dict.fromkeys(names, 0)
        for name in names:
            for score, *alive in pieces(*self._competing(name)):
                wrong = ~torch.isfinite(score)
                bad[name] += int((wrong & alive[0] if alive else wrong).count_nonzero())
        # Added up before the first is raised, so that all processes raise the same error.
        for name, count in self._of_all(bad).items():
            if count:
                raise ValueError(f"score of {name!r} is not finite at {count} weights")

    def _competing(self, name: str) -> list[Tensor]:
        """The rows of a score and, if not all weights compete, which do."""
        score = self._scores[name]
        rows = [local(score).detach()]
        return rows if self._within is None else [*rows, _own_rows(self._within[name], score)]

    def _of_all(self, counts: dict[str, int]) -> dict[str, int]:
        """The sums over processes."""
        return dict(zip(counts, sums(list(counts.values())), strict=True)) if self._sharded else counts

    def _tie(self, name: str) -> Tensor:
        score, tie = self._scores[name], self._ties[name]  # type: ignore[index]
        if tie.shape != score.shape:
            raise ValueError(
                f"score of {name!r} has shape {tuple(score.shape)}, its tie breaker {tuple(tie.shape)}"
            )
        return _own_rows(tie, score)

    def _by_score(self, names: list[str]) -> Order:
        dtype = common_dtype([self._scores[name].dtype for name in names])

        def read() -> Iterator[tuple[str, Tensor, Tensor]]:
            for name in names:
                for kept, score, *alive in pieces(self._kept[name], *self._competing(name)):
                    yield name, kept, only(ordered(score, dtype), *alive)

        return Order(read, names, dtype, self._scores[names[0]].device, self._sharded)

    def _by_tie(self, order: Order, threshold: int) -> Order:
        """Among the weights whose key in `order` is the threshold."""
        equal = self._of_all(count_equal(order, threshold))
        names = [name for name in order.names if equal[name]]  # no other's second scores are needed
        dtype = common_dtype([self._tie(name).dtype for name in names])

        def read() -> Iterator[tuple[str, Tensor, Tensor]]:
            for name in names:
                competing = self._competing(name)
                for kept, tie, score, *alive in pieces(self._kept[name], self._tie(name), *competing):
                    first = only(ordered(score, order.dtype), *alive)
                    yield name, kept, only(ordered(tie, dtype), first == threshold)

        return replace(order, read=read, names=names, dtype=dtype)

    def _keep_(self, order: Order, least: int) -> None:
        """Keep what has at least this key."""
        for _, kept, keys in order.read():
            kept |= keys >= least

    def _keep_first_(self, order: Order, key: int, count: int) -> None:
        """Keep the first `count` weights with this key."""
        own = count_equal(order, key)
        each = gathered(own) if self._sharded else [own]
        before = each[: rank()] if self._sharded else []
        # Positions run through a tensor's rows on all processes before the next tensor's, so what a process
        # may keep of a tensor is what those before it leave of the count.
        left = {}
        for name in order.names:
            left[name] = min(max(count - sum(counts[name] for counts in before), 0), own[name])
            count = max(count - sum(counts[name] for counts in each), 0)
        for name, kept, keys in order.read():
            first = keys == key
            found = int(first.count_nonzero())
            if found > left[name]:
                first &= first.cumsum(0) <= left[name]
            left[name] = max(left[name] - found, 0)
            kept |= first


def _own_rows(tensor: Tensor, score: Tensor) -> Tensor:
    """What this process holds of a tensor, placed like the score."""
    return local(sharded_like(tensor, score)).detach()


@dataclass(frozen=True)
class Order:
    """One key by which weights compete.

    Args:
        read: Parameter name, place in the mask and keys of chunk after chunk, anew with every call. The
            lowest key stands where a weight does not compete.
        names: Of the parameters.
        dtype: Of the values behind the keys, see `common_dtype`.
        device: Where histograms are added up.
        sharded: Whether each process reads some rows only.
    """

    read: Callable[[], Iterator[tuple[str, Tensor, Tensor]]]
    names: list[str]
    dtype: torch.dtype
    device: torch.device
    sharded: bool


def kth_largest(order: Order, count: int, check: Callable[[], None] | None = None) -> tuple[int, int, int]:
    """The `count`-th largest key, how many weights with this key are needed, and how many there are.

    At least `count` weights must compete; the 0-th largest is above all keys. If infinity or not-a-number
    competes, `check` is called.
    """
    key, digit = 0, 0
    top = _bits(order.dtype) - 16
    for shift in range(top, -1, -16):
        counts = _histogram(order, shift, None if shift == top else key)
        if shift == top and check is not None and order.dtype.is_floating_point:
            # Infinity and not-a-number have the first and the last digits, of which 0 does not compete.
            infinity = torch.tensor([-torch.inf, torch.inf], dtype=order.dtype)
            low, high = ((ordered(infinity, order.dtype) >> top) + _BINS // 2).tolist()
            if counts[1 : low + 1].any() or counts[high:].any():
                check()
        from_above = counts.flip(0).cumsum(0)
        place = int(torch.searchsorted(from_above, count))
        count -= int(from_above[place - 1]) if place else 0
        digit = _BINS - 1 - place
        key = digit - _BINS // 2 if shift == top else key * _BINS + digit
    return key, count, int(counts[digit])


def _histogram(order: Order, shift: int, prefix: int | None) -> Tensor:
    """How often each value of sixteen bits occurs in the keys that begin with `prefix`."""
    total = torch.zeros(_BINS, dtype=torch.int64, device=order.device)
    for _, _, keys in order.read():
        if prefix is None:
            digits = (keys >> shift).add_(_BINS // 2)
        else:
            digits = keys[keys >> shift + 16 == prefix] >> shift & _BINS - 1
        total += torch.bincount(digits, minlength=_BINS).to(order.device)
    return sum_(total) if order.sharded else total


def count_equal(order: Order, key: int) -> dict[str, int]:
    """Parameter name -> how many weights on this process have this key."""
    counts = dict.fromkeys(order.names, 0)
    for name, _, keys in order.read():
        counts[name] += int((keys == key).count_nonzero())
    return counts


def ordered(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Whole numbers in the order of the values: their bits, of which a negative float's are inverted.

    The sixteen highest bits of the result are never the lowest ones that there are. The type is float32,
    float64 or int64 and holds the values exactly.
    """
    if not dtype.is_floating_point:
        return values.to(dtype)
    keys = bits_of(values.to(dtype) + 0)  # no -0.0
    limits, bits = torch.iinfo(keys.dtype), _bits(dtype)
    keys ^= (keys >> bits - 1) & limits.max
    return keys.clamp_(min=limits.min + 2 ** (bits - 16))


def only(keys: Tensor, where: Tensor | None = None) -> Tensor:
    """The keys, and the lowest there is where the booleans say no."""
    if where is None:
        return keys
    bound = where.to(keys.dtype)
    bound -= 1
    bound ^= torch.iinfo(keys.dtype).max
    return torch.minimum(keys, bound)  # several times faster than masked_fill_ or where


def pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Flat chunks, row-major, of tensors of one shape: views, or copies where one is laid out otherwise."""
    first = tensors[0]
    if first.numel() <= CHUNK:
        yield tuple(tensor.reshape(-1) for tensor in tensors)
    elif all(tensor.is_contiguous() for tensor in tensors):
        yield from zip(*(torch.split(tensor.view(-1), CHUNK) for tensor in tensors), strict=True)
    elif len(first) == 1:
        yield from pieces(*(tensor[0] for tensor in tensors))
    else:
        rows = max(1, CHUNK * len(first) // first.numel())
        for parts in zip(*(torch.split(tensor, rows) for tensor in tensors), strict=True):
            yield from pieces(*parts)


def common_dtype(dtypes: list[torch.dtype]) -> torch.dtype:
    """The narrowest type with keys that holds all of these."""
    dtype = reduce(torch.promote_types, dtypes)
    return torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else torch.int64


def _bits(dtype: torch.dtype) -> int:
    return 8 * dtype.itemsize
