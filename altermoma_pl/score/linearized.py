"""A network made linear and positive while it runs, whatever its modules and its loss are."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.nn import functional as F  # noqa: N812
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

_LAYERS = (
    F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d,
)  # fmt: skip
_CASTS = (
    Tensor.to, Tensor.float, Tensor.half, Tensor.bfloat16, Tensor.double, Tensor.type, Tensor.type_as,
)  # fmt: skip
_IN_PLACE = ("__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__iand__", "__ior__")


class Linearized(TorchFunctionMode):
    """Inside, functions of torch are replaced by linear ones that keep positive numbers positive.

    Only where a result depends on parameters: geometry, targets and masks are computed as ever.

    - Linear layers and convolutions use |weight| and no bias. One whose input depends on no parameter
      is an entry: it sees ones instead of data.
    - Batch norm is x |gamma| / sqrt(var + eps); other norms are x |gamma|. One on data is an entry too.
    - Activations are ReLU, dropout and exponentials are the identity.
    - A softmax has the value of a uniform one over what is not masked, a sigmoid the value 1/2, whatever
      their input; their derivative is that of a share, so that what feeds a gate receives flow as well.
    - Everything floating is float64, also where user code casts it down.

    It does not reach into compiled or scripted modules, nor into norms written out by hand.

    Attributes:
        layers: Of each linear layer and convolution that ran, its node in the graph and the sum of its
            output.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers: list[tuple[Node | None, Tensor]] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Called by torch instead of each of its functions; this mode is off inside."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in ("__get__", "__set__"):  # properties
            return func(*args, **kwargs)
        if func in _CASTS:
            return _cast(func, *args, **kwargs)
        if name in _IN_PLACE or (name.endswith("_") and not name.endswith("__")):
            others, kwargs = tree_map(partial(_alike, args[0]), (args[1:], kwargs))
            return func(args[0], *others, **kwargs)
        args, kwargs = tree_map(_double, (args, kwargs))
        if not any(isinstance(a, Tensor) and a.requires_grad for a in (*args, *kwargs.values())):
            return tree_map(_double, func(*args, **kwargs))
        if func in _LAYERS:
            return self._layer(func, *args, **kwargs)
        if func in _NORM_FUNCTIONS or func is F.multi_head_attention_forward:
            named = inspect.signature(func).bind(*args, **kwargs).arguments
            return _NORM_FUNCTIONS.get(func, self._multi_head_attention)(**named)
        return tree_map(_double, _REPLACEMENTS.get(func, func)(*args, **kwargs))

    def heads(self) -> list[Tensor]:
        """Summed outputs of the layers that feed no other layer."""
        inner = upstream(node for node, _ in self.layers)
        return [total for node, total in self.layers if node not in inner]

    def _layer(
        self, func: Callable[..., Tensor], input: Tensor, weight: Tensor, bias: Any = None, *args: Any,
        **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        output = func(_entering(input), weight.abs(), None, *args, **kwargs)
        if output.requires_grad:
            self.layers.append((output.grad_fn, output.sum()))  # now: users may change it in place
        return output

    def _multi_head_attention(
        self, query: Tensor, key: Tensor, value: Tensor, num_heads: int, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        if options.get("use_separate_proj_weight"):
            weights = [options[f"{name}_proj_weight"] for name in "qkv"]
        else:
            weights = options["in_proj_weight"].chunk(3)
        q, k, v = (  # (length, [batch,] width) -> ([batch,] heads, length, width / heads)
            torch.unflatten(self._layer(F.linear, x, weight), -1, (num_heads, -1)).movedim(0, -2)
            for x, weight in zip((query, key, value), weights, strict=True)
        )
        mask, padding = options.get("attn_mask"), options.get("key_padding_mask")
        if mask is not None and mask.ndim > 2 and q.ndim > 3:
            mask = mask.view(-1, num_heads, *mask.shape[1:])
        shares = _shares(q, k, mask, None if padding is None else padding[..., None, None, :])
        output = (shares @ v).movedim(-2, 0).flatten(-2)
        output = self._layer(F.linear, output, options["out_proj_weight"])
        if not options.get("need_weights", True):
            return output, None
        return output, shares.mean(-3) if options.get("average_attn_weights", True) else shares


def upstream(nodes: Iterable[Node | None]) -> set[Node]:
    """All that the nodes were computed from; a node itself only if another of them needs it."""
    found: set[Node] = set()
    pending = [node for node in nodes if node is not None]
    while pending:
        parents = {parent for parent, _ in pending.pop().next_functions if parent is not None} - found
        found |= parents
        pending += parents
    return found


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _alike(tensor: Tensor, value: Any) -> Any:
    """What is combined with a tensor in place, in that tensor's type."""
    floating = isinstance(value, Tensor) and value.is_floating_point() and tensor.is_floating_point()
    return value.to(tensor.dtype) if floating else value


def _cast(func: Callable[..., Any], tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    result = func(tensor, *args, **kwargs)
    if isinstance(result, Tensor) and result.is_floating_point() and tensor.is_floating_point():
        return tensor.to(result.device).double()
    return _double(result)


def _entering(input: Tensor) -> Tensor:
    """Ones for data, and what depends on parameters as it is."""
    return input if input.requires_grad else torch.ones_like(input)


def _gate(input: Tensor) -> Tensor:
    """The value 1 with the derivative of log x: a gate's input gets the flow that goes through it."""
    flow = input.clamp(min=0)
    size = flow.detach()
    return 1 + (flow - size) / size.where(size > 0, 1.0)


def _softmax(input: Tensor, dim: int | None = None, *_: Any, **__: Any) -> Tensor:
    dim = -1 if dim is None else dim
    allowed = (input.detach() >= 0).double()  # flow is not negative, what masks add is
    return allowed / allowed.sum(dim, keepdim=True).clamp(min=1) * _gate(input)


def _shares(query: Tensor, key: Tensor, *masks: Tensor | None) -> Tensor:
    """Of all that no mask forbids, by True or by a negative number that would be added."""
    flow = query @ key.transpose(-2, -1)
    for mask in masks:
        if mask is not None:
            flow = flow.masked_fill(mask if mask.dtype == torch.bool else mask < 0, -1.0)
    return _softmax(flow, -1)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, **_: Any,
) -> Tensor:  # fmt: skip
    if is_causal:
        attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:  # here True allows
        attn_mask = ~attn_mask
    return _shares(query, key, attn_mask) @ value


def _glu(input: Tensor, dim: int = -1) -> Tensor:
    value, gate = input.chunk(2, dim)
    return value * (0.5 * _gate(gate))


def _batch_norm(
    input: Tensor, weight: Any = None, running_var: Any = None, eps: float = 1e-5, **_: Any
) -> Tensor:
    output = _channel_norm(input, weight)
    return output if running_var is None else _channel_norm(output, (running_var + eps).rsqrt())


def _channel_norm(input: Tensor, weight: Tensor | None = None, **_: Any) -> Tensor:
    return _layer_norm(input, None if weight is None else weight.view(-1, *[1] * (input.ndim - 2)))


def _layer_norm(input: Tensor, weight: Tensor | None = None, **_: Any) -> Tensor:
    return _entering(input) if weight is None else _entering(input) * weight.abs()


def _unbounded(input: Tensor, *_: Any, reduction: str = "mean", **__: Any) -> Tensor:
    """In place of a loss that refuses inputs that are no probabilities; its value is not used."""
    return input if reduction == "none" else input.mean()


_NORM_FUNCTIONS: dict[Any, Callable[..., Tensor]] = {  # called with all arguments by keyword
    F.batch_norm: _batch_norm,
    F.instance_norm: _channel_norm,
    F.group_norm: _channel_norm,
    F.layer_norm: _layer_norm,
    F.rms_norm: _layer_norm,
}

_REPLACEMENTS: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((
        F.relu, F.relu6, F.hardtanh, F.leaky_relu, F.rrelu, F.prelu, F.elu, F.celu, F.selu, F.gelu, F.silu,
        F.mish, F.hardswish, F.softplus, F.threshold, F.tanhshrink, F.softsign,
        F.tanh, torch.tanh, Tensor.tanh,
    ), lambda input, *_, **__: input.relu()),
    **dict.fromkeys((
        F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout,
        F.normalize, torch.exp, Tensor.exp,
    ), lambda input, *_, **__: input),
    **dict.fromkeys((
        F.sigmoid, torch.sigmoid, Tensor.sigmoid, F.hardsigmoid,
    ), lambda input, *_, **__: 0.5 * _gate(input)),
    **dict.fromkeys((F.softmax, torch.softmax, Tensor.softmax), _softmax),
    F.glu: _glu,
    F.scaled_dot_product_attention: _attention,
    F.binary_cross_entropy: _unbounded,
}  # fmt: skip
