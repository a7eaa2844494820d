"""Context managers that change a model and bring it back, exactly, also after an exception."""

from __future__ import annotations

import random
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from altermoma_pl.model.distributed import like, local

_NORM = nn.modules.batchnorm._NormBase
_NOISY = (_NORM, nn.modules.dropout._DropoutNd, nn.MultiheadAttention)
# Stochastic depth has no class in torch; these are the names that it goes by.
_STOCHASTIC_DEPTH = ("DropPath", "StochasticDepth", "DropBlock")


@contextmanager
def restored(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Bring `model` and all random number generators back on exit, bit for bit.

    Covers parameters, buffers, `requires_grad`, train and eval flags, gradients (None stays None, and
    inside all gradients are None), plain attributes of modules such as counters, lists and metric
    states, and the states of torch (CPU and CUDA), numpy and `random`.

    Yields:
        A function that brings back the same state at once; the context goes on.
    """
    undo = [each for module in model.modules() for each in _undo(vars(module), depth=2)]
    undo.extend(_undo_draws())
    parameters = [(p, p.requires_grad, p.grad) for p in model.parameters()]

    def reset() -> None:
        for bring_back in undo:
            bring_back()
        for parameter, requires_grad, _ in parameters:
            parameter.requires_grad_(requires_grad)
            parameter.grad = None

    for parameter, _, _ in parameters:
        parameter.grad = None
    try:
        yield reset
    finally:
        reset()
        for parameter, _, gradient in parameters:
            parameter.grad = gradient


@contextmanager
def modes_restored(model: nn.Module) -> Iterator[None]:
    """Bring the train and eval flag of every module back on exit."""
    with ExitStack() as undo:
        for module in model.modules():
            undo.callback(setattr, module, "training", module.training)
        yield


@contextmanager
def generators_restored() -> Iterator[None]:
    """Bring the generators of torch (CPU and CUDA), numpy and `random` back on exit."""
    with ExitStack() as undo:
        for bring_back in _undo_draws():
            undo.callback(bring_back)
        yield


@contextmanager
def deactivated(model: nn.Module, modality: Iterable[str]) -> Iterator[None]:
    """Multiply every parameter of a modality by zero inside the context (mu = 0 in the paper).

    Weights, biases and norm affine parameters alike, so that the branch emits zeros rather than a
    constant. Integers and geometry constants are not among the names that `Modalities.resolve` gives.

    Args:
        model: The model.
        modality: The parameter names, `modalities.resolve(model)["camera"]`.

    Raises:
        ValueError: If a name is not a parameter of `model`, or there is none.
    """
    parameters = dict(model.named_parameters())
    names = list(modality)
    unknown = [name for name in names if name not in parameters]
    if unknown or not names:
        raise ValueError(
            f"cannot deactivate {unknown or 'nothing'}: give names of parameters of "
            f"{type(model).__name__}, as Modalities.resolve returns them"
        )
    with ExitStack() as undo:
        for name in names:
            values = parameters[name].detach()  # the same memory
            undo.callback(values.copy_, values.clone())
            values.zero_()
        yield


@contextmanager
def noise_free(model: nn.Module) -> Iterator[None]:
    """Inside, norm layers use their running statistics and dropout is off; all else keeps its mode."""
    with modes_restored(model):
        for module in model.modules():
            if isinstance(module, _NORM) and module.running_mean is None:
                continue  # evaluation mode would change nothing
            if isinstance(module, _NOISY) or type(module).__name__ in _STOCHASTIC_DEPTH:
                module.training = False
        yield


def seed_generators(seed: int) -> None:
    """Seed torch (all devices), numpy where it is loaded, and `random`; use inside `restored`."""
    torch.manual_seed(seed)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)


def bits_of(tensor: Tensor) -> Tensor:
    """The same memory as whole numbers of the same width; a view, whatever the strides."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.view(integers[tensor.element_size()])


def _undo(value: Any, depth: int) -> Iterator[Callable[[], object]]:
    """What brings back the content of a tensor, or of a container and what it holds to the given depth.

    The same objects are filled again, because others may hold a reference to them. Only exact
    builtins, and the ordered dictionary that modules of older torch keep their parameters in: any
    other subclass may have a meaning of its own.
    """
    held: list[Any] = []
    if isinstance(value, Tensor) and value.layout == torch.strided:
        storage = local(value).detach()  # the same memory, even if user code points `value.data` elsewhere
        yield partial(_refill_tensor, value, storage, storage.clone())
    elif type(value) in (dict, OrderedDict):
        held = list(value.values())
        yield partial(_refill_dict, value, dict(value))
    elif type(value) is list:
        held = list(value)
        yield partial(value.__setitem__, slice(None), held)
    for each in held if depth else ():
        yield from _undo(each, depth - 1)


def _refill_dict(value: dict[Any, Any], items: dict[Any, Any]) -> None:
    if list(value) != list(items):  # the order counts: it is that of named_parameters()
        value.clear()
    value.update(items)


@torch.no_grad()
def _refill_tensor(tensor: Tensor, storage: Tensor, content: Tensor) -> None:
    if local(tensor).data_ptr() != storage.data_ptr():
        tensor.data = like(storage, tensor)
    # By the bits, of which NaN has the same as itself, and -0 others than 0.
    now, then = (bits_of(torch.view_as_real(x) if x.is_complex() else x) for x in (storage, content))
    if not torch.equal(now, then):
        storage.copy_(content)


def _undo_draws() -> Iterator[Callable[[], object]]:
    """What brings back each generator of random numbers."""
    yield partial(torch.set_rng_state, torch.get_rng_state())
    yield partial(random.setstate, random.getstate())
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        yield partial(torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all())
    if "numpy" in sys.modules:
        numpy = sys.modules["numpy"].random
        yield partial(numpy.set_state, numpy.get_state())
