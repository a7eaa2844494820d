"""FLOPs of a forward pass: what a model computes, and what it would with fewer channels."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from altermoma_pl.granularity.channels.groups import Channels
from altermoma_pl.granularity.channels.tracing import Forward
from altermoma_pl.model.contexts import generators_restored

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


def count_flops(model: nn.Module, forward: Forward) -> Flops:
    """Count the FLOPs of `forward(model)` by `torch.utils.flop_counter`'s formulas, without gradients.

    Zeros count like any other weight, and attention as the two plain matrix products that it is. Works on
    the meta device too. Random numbers are left as they were; the model runs in the mode that it is in.
    """
    counter = _FlopCounter(model)
    with torch.no_grad(), generators_restored(), layers_divided(), counter.counting():
        forward(model)
    uncounted = tuple(dict.fromkeys([*counter.uncounted, *counter.silent()]))
    known = bool(counter.flops) or not uncounted
    of_module = {counter.paths[module]: flops for module, flops in counter.flops.items()}
    return Flops(sum(of_module.values()) if known else None, of_module, uncounted)


class FlopModel:
    """FLOPs of a forward pass by the widths of its groups: those of a layer go with the size of its weight.

    Operators without a weight, such as attention's products, count as they are.

    Args:
        model: The dense model.
        forward: Runs it on example inputs.
        channels: Its groups.
    """

    def __init__(self, model: nn.Module, forward: Forward, channels: Channels) -> None:
        counted = count_flops(model, forward)
        self.total = float(counted.total or 0)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._flops: Counter[str] = Counter()
        for path, module in model.named_modules():  # layers that share a weight add up
            name = names.get(id(getattr(module, "weight", None)))
            if name is not None:
                self._flops[name] += counted.of_module.get(path, 0)
        self._sizes = {name: model.get_parameter(name).shape for name in self._flops}
        self._slices = [
            (group, each) for group in channels.groups for each in group.slices if each.name in self._flops
        ]

    def __call__(self, widths: Mapping[str, int]) -> float:
        """FLOPs with so many channels of each group."""
        gone: Counter[tuple[str, int]] = Counter()
        for group, each in self._slices:
            gone[each.name, each.dim] += (group.num_channels - widths[group.name]) * each.index.shape[1]
        saved = 0.0
        for name, flops in self._flops.items():
            sizes = enumerate(self._sizes[name])
            saved += flops * (1 - math.prod((size - gone[name, dim]) / size for dim, size in sizes))
        return self.total - saved


@contextmanager
def layers_divided() -> Iterator[None]:
    """Encoder layers run operator by operator, not as a fused whole that hides what it makes."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


# Not torch's FlopCounterMode: it names modules by their class where a method other than `forward` is run, as
# `training_step` is, so that two linear layers become one; and it says nothing of what it does not count.
class _FlopCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up FLOPs by the innermost module that runs, and notes which operators have no formula."""

    supports_higher_order_operators = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops: Counter[nn.Module] = Counter()
        self.uncounted: list[str] = []
        self.paths = {module: path for path, module in model.named_modules()}
        self._running = [model]
        self._ran: set[nn.Module] = set()
        self._seen: set[nn.Module] = set()

    @contextmanager
    def counting(self) -> Iterator[None]:
        def enter(module: nn.Module, _: Any) -> None:
            # One that is made meanwhile is no part of the model: what it does, its caller does.
            self._running.append(module if module in self.paths else self._running[-1])
            self._ran.add(self._running[-1])

        def leave(*_: Any) -> None:
            self._running.pop()

        with (
            register_module_forward_pre_hook(enter),
            register_module_forward_hook(leave, always_call=True),
            sdpa_kernel(SDPBackend.MATH),  # the fused kernels of the CPU have no formula
            self,
        ):
            yield

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        whole = isinstance(func, HigherOrderOperator)  # torch.cond, for one: what is in it is not seen
        formula = None if whole else flop_registry.get(func._overloadpacket)
        if formula is None and not whole:
            with self:  # what a model does in inference mode of its own arrives in one piece
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        module = self._running[-1]
        if formula is not None:
            self.flops[module] += int(formula(*args, **kwargs, out_val=out))
        elif whole or not _is_trivial(func, args):
            self.uncounted.append(f"{_name(func)} in {type(module).__name__}")
        else:
            return out
        self._seen.add(module)
        return out

    def silent(self) -> Iterator[str]:
        """Types of modules with weights that have run without an operator that counts or is named.

        Such are extensions that do not go through torch's dispatcher, as sparse convolutions do.
        """
        for module in self.paths:
            leaf = module in self._ran - self._seen and next(module.children(), None) is None
            if leaf and any(parameter.dim() > 1 for parameter in module.parameters(recurse=False)):
                yield type(module).__name__


def _name(func: Any) -> str:
    return str(getattr(func, "_overloadpacket", func)).removeprefix("aten.").lstrip("_")


def _is_trivial(func: Any, args: tuple[Any, ...]) -> bool:
    makes = not any(isinstance(leaf, Tensor) for leaf in tree_leaves(args))
    return makes or func.is_view or torch.Tag.pointwise in func.tags or _name(func) in _TRIVIAL
