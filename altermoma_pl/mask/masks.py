"""Masks: which weights stay (True) and which are pruned (False)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from altermoma_pl.model.contexts import bits_of
from altermoma_pl.model.distributed import full, is_sharded, local, sharded_like, sums

_IN_CACHE = 2**18  # elements; the mask becomes integers of the tensor's width, which then fit in the cache


class Masks(Mapping[str, Tensor]):
    """Parameter name -> boolean tensor of the parameter's shape, True = keep.

    Masks of sharded parameters are sharded alike (`DTensor`). Their counts are those of all processes, which
    therefore must make such masks together.

    Args:
        masks: The tensors by parameter name; not copied, and not to be changed.

    Raises:
        TypeError: If a name is not a string or a mask is not a boolean tensor.
        ValueError: If there is no mask.
    """

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        self._masks = dict(masks)
        if not self._masks:
            raise ValueError("masks are empty: at least one parameter must be masked")
        for name, mask in self._masks.items():
            if not isinstance(name, str):
                raise TypeError(f"masks are keyed by parameter name, got {name!r}")
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
                found = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
                raise TypeError(f"mask of {name!r} must be a boolean tensor, got {found}")
        if self.sharded:
            _ = self.counts  # now, when all processes are here: one of them may print masks later

    @classmethod
    def dense(cls, tensors: Mapping[str, Tensor]) -> Masks:
        """Masks that keep everything, shaped and placed like `tensors`."""
        return cls({name: torch.ones_like(t, dtype=torch.bool) for name, t in tensors.items()})

    def __getitem__(self, name: str) -> Tensor:
        return self._masks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Masks):
            return NotImplemented
        return list(self) == list(other) and all(torch.equal(self[name], other[name]) for name in self)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Masks({len(self)} tensors, {self.num_kept} of {self.num_weights} weights kept)"

    @cached_property
    def counts(self) -> dict[str, int]:
        """Parameter name -> number of its weights that stay."""
        own = [int(local(mask).count_nonzero()) for mask in self._masks.values()]
        return dict(zip(self._masks, sums(own) if self.sharded else own, strict=True))

    @property
    def num_weights(self) -> int:
        """Number of masked weights, kept or not."""
        return sum(mask.numel() for mask in self._masks.values())

    @property
    def num_kept(self) -> int:
        """Number of weights that stay."""
        return sum(self.counts.values())

    @property
    def sparsity(self) -> float:
        """Share of zeros in [0, 1]."""
        return 1 - self.num_kept / self.num_weights

    @property
    def sharded(self) -> bool:
        """Whether this process holds only some rows of each mask."""
        return is_sharded(self._masks.values())

    @property
    def digest(self) -> bytes:
        """32 bytes that tell masks apart: of every bit, or of the counts where masks are sharded."""
        digest = hashlib.sha256(repr(self.counts).encode())
        if not self.sharded:
            for mask in self._masks.values():
                digest.update(_pack(mask).numpy().tobytes())
        return digest.digest()

    def check_fits(self, model: nn.Module) -> None:
        """Raise a `ValueError` if a masked parameter is missing in `model` or has another shape."""
        parameters = dict(model.named_parameters())
        for name, mask in self.items():
            if name not in parameters:
                raise ValueError(f"masked parameter {name!r} does not exist in {type(model).__name__}")
            if parameters[name].shape != mask.shape:
                found, shape = tuple(mask.shape), tuple(parameters[name].shape)
                raise ValueError(f"mask of {name!r} has shape {found}, the parameter has {shape}")

    @torch.no_grad()
    def apply_(self, model: nn.Module) -> None:
        """Set the pruned weights of `model` to zero, in place."""
        parameters = dict(model.named_parameters())
        for name, mask in self.items():
            keep_only_(parameters[name], mask)

    def to(self, model: nn.Module) -> Masks:
        """The same masks, each on the device of its parameter in `model`, and sharded as that is."""
        parameters = dict(model.named_parameters())
        return Masks({name: sharded_like(mask, parameters[name]) for name, mask in self.items()})

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """One bit per weight: parameter name -> `{"shape": list, "bits": uint8 tensor on the CPU}`.

        All rows, whatever this process holds; sharded masks must be asked by all processes.
        """
        return {
            # Gathered as numbers: processes do not exchange booleans.
            name: {"shape": list(mask.shape), "bits": _pack(full(mask.to(torch.uint8)))}
            for name, mask in self.items()
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Masks:
        """Rebuild masks from `state_dict()`, on the CPU; raises a `ValueError` if it is anything else."""
        name = None
        try:
            masks = {}
            for name, entry in state.items():
                masks[name] = _unpack(entry["bits"], torch.Size(entry["shape"]))
            return cls(masks)
        except Exception as error:  # damage is of any kind
            raise ValueError(
                f"state of masks must map each parameter name to its 'shape' and the 'bits' that fill it, "
                f"which is not so at {name!r}: {error!r}, got {state!r:.80}"
            ) from error


def keep_only_(tensor: Tensor, mask: Tensor) -> None:
    """Set to +0, in place and whatever was there, what `mask` does not keep; call it under `no_grad`.

    This runs after every training step, so it is made for speed: the bits of floats, taken as an integer,
    times 1 or 0. Infinity or NaN times 0 would be NaN as floats, and `masked_fill_` goes through elements
    one by one: a product, a chunk at a time, was 3 to 6 times as fast on a CPU, and is fastest if both have
    the same memory layout. Of a sharded tensor the rows of this process are set.
    """
    tensor, mask = local(tensor), local(mask)
    if not tensor.is_floating_point():
        tensor.masked_fill_(~mask, 0)
        return
    bits = bits_of(tensor)
    if tensor.numel() <= _IN_CACHE or tensor.is_cuda:
        bits.mul_(mask)
        return
    rows = max(1, _IN_CACHE * len(tensor) // tensor.numel())
    for part, kept in zip(torch.split(bits, rows), torch.split(mask, rows), strict=True):
        part.mul_(kept)


def _pack(mask: Tensor) -> Tensor:
    """Eight booleans to a byte, the first in the lowest bit, on the CPU."""
    return torch.from_numpy(np.packbits(mask.flatten().cpu().numpy(), bitorder="little"))


def _unpack(bits: Tensor, shape: torch.Size) -> Tensor:
    num_bytes = -(-shape.numel() // 8)
    if bits.dtype != torch.uint8 or bits.shape != (num_bytes,):
        raise ValueError(f"{list(bits.shape)} of {bits.dtype} are not the {num_bytes} bytes of {list(shape)}")
    flags = np.unpackbits(bits.cpu().numpy(), count=shape.numel(), bitorder="little")
    return torch.from_numpy(flags).view(shape).bool()


# So that `torch.load(path, weights_only=True)` reads what `torch.save(masks, path)` wrote.
torch.serialization.add_safe_globals([Masks])
