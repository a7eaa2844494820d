"""How much memory one forward pass needs at once."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from altermoma_pl.granularity.channels.flops import layers_divided
from altermoma_pl.model.contexts import generators_restored, modes_restored


def peak_memory(model: nn.Module, inputs: tuple[Any, ...], device: torch.device) -> int | None:
    """Most bytes alive at once during `model(*inputs)` in evaluation mode, beyond weights and inputs.

    On the CPU these are the tensors between operators, exactly; scratch memory inside an operator is not
    seen. On CUDA it is what the allocator hands out, scratch memory and rounding included; the peak
    statistics of torch.cuda are reset. None on other devices.
    """
    # Not inference mode: in it, operators reach a dispatch mode undivided, so that what they make is hidden.
    with modes_restored(model), generators_restored(), torch.no_grad():
        model.eval()
        if device.type == "cpu":
            memory = _LiveMemory()
            with layers_divided(), memory:
                model(*inputs)
            return memory.peak
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            model(*inputs)
            return int(torch.cuda.max_memory_allocated(device)) - before
    return None


class _LiveMemory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the bytes of all storages that operators make, until nothing refers to them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._now = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = _storages((args, kwargs))
        out = func(*args, **(kwargs or {}))
        for address, storage in _storages(out).items():
            if address not in given:  # neither a view nor in place
                self._now += storage.nbytes()
                weakref.finalize(storage, self._freed, storage.nbytes()).atexit = False
        self.peak = max(self.peak, self._now)
        return out

    def _freed(self, num_bytes: int) -> None:
        self._now -= num_bytes


def _storages(values: Any) -> dict[int, torch.UntypedStorage]:
    """Address -> storage, of the tensors in nested containers."""
    tensors = [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
    storages = [tensor.untyped_storage() for tensor in tensors if tensor.layout == torch.strided]
    return {storage.data_ptr(): storage for storage in storages}
