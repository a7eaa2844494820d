"""What the operators of one forward pass do: FLOPs, which of them are not counted, memory at once."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from altermoma_pl.model.contexts import generators_restored, modes_restored

# They make or move numbers, one at a time, beside what torch itself tags as a view or as element-wise.
_TRIVIAL = frozenset(
    (
        *("cat", "constant_pad_nd", "copy_", "fill_", "hardswish", "hardswish_", "lift_fresh", "resize_"),
        *("stack", "to_copy", "unsafe_view", "zero_", "empty_like", "full_like", "new_empty", "new_full"),
        *("new_ones", "new_zeros", "ones_like", "zeros_like", "local_scalar_dense"),
    )
)


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of one forward pass, two for each multiply-add.

    Args:
        total: All that were counted; None if there was work, but nothing that can be counted.
        of_module: Module path -> those that run in it and in none of its children; they sum to the total.
        uncounted: What did work that counts as 0: "operator in ModuleType", or the type of a module with
            weights in which no operator of torch was seen. Views, copies and element-wise operators
            are left out.
    """

    total: int | None
    of_module: Mapping[str, int]
    uncounted: tuple[str, ...]


def count_flops(model: nn.Module, inputs: tuple[Any, ...]) -> Flops:
    """Count the FLOPs of `model(*inputs)` in evaluation mode, by `torch.utils.flop_counter`'s formulas.

    Attention is computed by plain matrix products meanwhile, because the fused kernels of the CPU count
    as 0. Zeros count like any other weight. Works on the meta device too.

    Args:
        model: Is left as it was, train flags and random numbers included.
        inputs: Its positional arguments.
    """
    calls = _Calls(model)
    counter, plain = _FlopCounter(calls), sdpa_kernel(SDPBackend.MATH)
    with evaluating(model), plain, _layers_divided(), calls.followed(), counter:
        model(*inputs)
    uncounted = dict.fromkeys([*counter.uncounted, *_silent(calls, counter)])
    known = bool(counter.flops) or not uncounted
    total = sum(counter.flops.values()) if known else None
    return Flops(total, dict(counter.flops), tuple(uncounted))


def peak_memory(model: nn.Module, inputs: tuple[Any, ...], device: torch.device) -> int | None:
    """Most bytes alive at once during `model(*inputs)` in evaluation mode, beyond weights and inputs.

    On the CPU these are the tensors between operators, exactly; scratch memory inside an operator is not
    seen. On CUDA it is what the allocator hands out, scratch memory and rounding included; the peak
    statistics of torch.cuda are reset. None on other devices.
    """
    if device.type == "cpu":
        memory = _LiveMemory()
        with evaluating(model), _layers_divided(), memory:
            model(*inputs)
        return memory.peak
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        with evaluating(model):
            model(*inputs)
        return int(torch.cuda.max_memory_allocated(device)) - before
    return None


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; train flags and random number generators come back."""
    # Not inference mode: in it, operators reach a dispatch mode undivided, so that what they make is hidden.
    with modes_restored(model), generators_restored(), torch.no_grad():
        model.eval()
        yield


class _Calls:
    """Which module is running, the innermost one, and which have run."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules())
        self.ran: set[str] = set()
        self._stack = [""]

    @property
    def path(self) -> str:
        return self._stack[-1]

    @contextmanager
    def followed(self) -> Iterator[None]:
        with ExitStack() as stack:
            for path, module in self.modules.items():
                stack.callback(module.register_forward_pre_hook(self._entering(path)).remove)
                stack.callback(module.register_forward_hook(self._left, always_call=True).remove)
            yield

    def _entering(self, path: str) -> Callable[..., None]:
        def enter(*_: Any) -> None:
            self._stack.append(path)
            self.ran.add(path)

        return enter

    def _left(self, *_: Any) -> None:
        self._stack.pop()


class _FlopCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up FLOPs by module, and notes which operators have no formula."""

    def __init__(self, calls: _Calls) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops: Counter[str] = Counter()
        self.uncounted: list[str] = []
        self.unknown_in: set[str] = set()
        self._calls = calls

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        formula = flop_registry.get(func._overloadpacket)
        if formula is None:
            with self:  # what a model does in inference mode of its own arrives in one piece
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        path = self._calls.path
        if formula is not None:
            self.flops[path] += int(formula(*args, **kwargs, out_val=out))
        elif not _is_trivial(func, args):
            self.unknown_in.add(path)
            self.uncounted.append(f"{_name(func)} in {type(self._calls.modules[path]).__name__}")
        return out


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


def _name(func: Any) -> str:
    return str(func._overloadpacket).removeprefix("aten.").lstrip("_")


def _is_trivial(func: Any, args: tuple[Any, ...]) -> bool:
    makes = not any(isinstance(leaf, Tensor) for leaf in tree_leaves(args))
    return makes or func.is_view or torch.Tag.pointwise in func.tags or _name(func) in _TRIVIAL


def _silent(calls: _Calls, counter: _FlopCounter) -> Iterator[str]:
    """Types of modules with weights that have run without an operator that is counted or known as uncounted.

    Such are extensions that do not go through torch's dispatcher, as sparse convolutions do.
    """
    for path, module in calls.modules.items():
        seen = path not in calls.ran or path in counter.flops or path in counter.unknown_in
        leaf = not seen and next(module.children(), None) is None
        if leaf and any(parameter.dim() > 1 for parameter in module.parameters(recurse=False)):
            yield type(module).__name__


@contextmanager
def _layers_divided() -> Iterator[None]:
    """Encoder layers run operator by operator, not as a fused whole that hides what it makes."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
