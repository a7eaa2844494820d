"""Where the k-th of very many values lies, exactly, read in chunks: radix selection.

Values are mapped to whole numbers in the same order, of which histograms are made, sixteen bits at a time
from the top (Alabi et al., "Fast k-selection algorithms for graphics processing units", 2012): two reads
for float32, four for float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from altermoma_pl.model.contexts import bits_of
from altermoma_pl.model.distributed import sum_

CHUNK = 2**17  # small: chunks stay in the cache between operations, and allocators reuse their memory
_BINS = 2**16


@dataclass(frozen=True)
class Order:
    """One key by which weights compete.

    Args:
        read: Parameter name, place in the mask and keys of chunk after chunk, anew with every call. The
            lowest key stands where a weight does not compete.
        names: Of the parameters, of which those without such weights may be left out of `read`.
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

    Args:
        order: What competes; at least `count` weights.
        count: From 0; the 0-th largest is above all keys.
        check: Called if what competes includes infinity or not-a-number.
    """
    key, digit = 0, 0
    top = _bits(order.dtype) - 16
    for shift in range(top, -1, -16):
        counts = _histogram(order, shift, None if shift == top else key)
        if shift == top and check is not None and _any_not_finite(counts, order.dtype):
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

    The sixteen highest bits of the result are never the lowest ones that there are.

    Args:
        values: Of any shape and of a type that `dtype` holds exactly.
        dtype: float32, float64 or int64.
    """
    if not dtype.is_floating_point:
        return values.to(dtype)
    keys = bits_of(values.to(dtype) + 0)  # no -0.0
    limits, bits = torch.iinfo(keys.dtype), _bits(dtype)
    keys ^= (keys >> bits - 1) & limits.max
    return keys.clamp_(min=limits.min + 2 ** (bits - 16))


def only(keys: Tensor, conditions: list[Tensor]) -> Tensor:
    """The keys, and the lowest there is where a condition is not met."""
    if not conditions:
        return keys
    bound = reduce(torch.logical_and, conditions).to(keys.dtype)
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


def blocks(*tensors: Tensor) -> Iterator[tuple[slice, list[Tensor]]]:
    """Some rows of tensors of one shape with two or more dimensions, each row flat."""
    first = tensors[0]
    size = max(1, CHUNK // max(1, first.shape[1:].numel()))
    for start in range(0, len(first), size):
        rows = slice(start, start + size)
        yield rows, [tensor[rows].flatten(1) for tensor in tensors]


def common_dtype(dtypes: list[torch.dtype]) -> torch.dtype:
    """The narrowest type with keys that holds all of these."""
    dtype = reduce(torch.promote_types, dtypes)
    return torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else torch.int64


def _any_not_finite(counts: Tensor, dtype: torch.dtype) -> bool:
    """Whether a histogram of the highest bits shows infinity or not-a-number among what competes."""
    if not dtype.is_floating_point:
        return False
    limits = ordered(torch.tensor([-torch.inf, torch.inf], dtype=dtype), dtype) >> _bits(dtype) - 16
    low, high = (limits + _BINS // 2).tolist()
    return bool(counts[1 : low + 1].any() | counts[high:].any())


def _bits(dtype: torch.dtype) -> int:
    return 8 * dtype.itemsize
