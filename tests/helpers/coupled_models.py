"""Small models, one for each way in which layers share channels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional


class Case(NamedTuple):
    """A model, its inputs, and the number of channels of each of its groups."""

    make: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...]
    groups: dict[str, int]
    declared: dict[str, dict[str, str]] | None = None

    def model(self) -> nn.Module:
        """In evaluation mode, with norms that are not the identity."""
        torch.manual_seed(0)
        model = self.make().eval()
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None:
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
            if getattr(module, "affine", False):
                module.weight.data.uniform_(0.5, 2)
                module.bias.data.normal_()
        return model

    def inputs(self) -> tuple[torch.Tensor, ...]:
        generator = torch.Generator().manual_seed(1)
        return tuple(
            torch.randint(5, s[1:], generator=generator) if s[0] == 0 else torch.randn(s, generator=generator)
            for s in self.shapes
        )


class Net(nn.Module):
    """Layers by name, and a function of them and the inputs."""

    def __init__(self, function: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.function(self, *inputs)


class Attention(nn.Module):
    """Of several heads; queries, keys and values from one layer or from three."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.num_heads, self.fused = 4, fused
        self.qkv = nn.Linear(16, 48) if fused else nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.proj = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, _ = x.shape
        if self.fused:
            q, k, v = self.qkv(x).view(b, n, 3, self.num_heads, 4).permute(2, 0, 3, 1, 4)
        else:
            q, k, v = (f(x).view(b, n, self.num_heads, 4).transpose(1, 2) for f in self.qkv)
        y = functional.scaled_dot_product_attention(q, k, v)  # (b, heads, n, 4)
        return self.proj(y.transpose(1, 2).reshape(b, n, -1))


class Tied(nn.Module):
    """Two linear layers with one weight, and two norms with one buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3, 8)
        self.one, self.two = nn.Linear(8, 6), nn.Linear(8, 6)
        self.two.weight = self.one.weight
        self.norm, self.other = nn.BatchNorm1d(6, affine=False), nn.BatchNorm1d(6, affine=False)
        self.other.running_mean = self.norm.running_mean
        self.head = nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        return self.head(torch.relu(self.norm(self.one(x))) + torch.tanh(self.other(self.two(x))))


class Double(torch.autograd.Function):
    """Times two, by an operator of one's own."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return 2 * gradient


def _scatter(m: Any, points: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
    features = torch.relu(m.norm(m.point(points)))  # (N, 8)
    canvas = features.new_zeros(features.shape[1], 16)
    canvas = canvas.index_copy(1, cells, features.t())
    return m.head(torch.relu(m.conv(canvas.view(1, -1, 4, 4))))


def _squeeze(m: Any, x: torch.Tensor) -> torch.Tensor:
    x = torch.relu(m.a(x))
    gate = torch.sigmoid(m.up(torch.relu(m.down(x.mean((2, 3), keepdim=True)))))
    return m.head(x * gate)


def _dense(m: Any, x: torch.Tensor) -> torch.Tensor:
    x = m.a(x)
    x = torch.cat([x, torch.relu(m.b(x))], 1)
    x = torch.cat([x, torch.relu(m.c(x))], 1)
    return m.head(torch.relu(m.norm(x)))


def _glu(m: Any, x: torch.Tensor) -> torch.Tensor:
    value, gate = m.a(x).chunk(2, 1)
    return m.head(value * torch.sigmoid(gate))


def _islands(m: Any, x: torch.Tensor) -> torch.Tensor:
    x = torch.relu(m.b(torch.relu(m.a(x)).detach()))
    return m.head(torch.relu(m.depth(x)))


def _block(m: Any, x: torch.Tensor) -> torch.Tensor:
    x = m.embed(x)
    x = x + m.attention(m.norm(x))
    return m.head((x + m.fc2(functional.gelu(m.fc1(x)))).mean(1))


def block(fused: bool, norm: bool) -> Net:
    """A transformer's block."""
    return Net(
        _block,
        embed=nn.Linear(6, 16),
        norm=nn.LayerNorm(16) if norm else nn.Identity(),
        attention=Attention(fused),
        fc1=nn.Linear(16, 12),
        fc2=nn.Linear(12, 16),
        head=nn.Linear(16, 3),
    )


def multihead() -> Net:
    """With the attention of torch."""

    def function(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.embed(x)
        x = x + m.attention(x, x, x, need_weights=False)[0]
        return m.head((x + m.fc2(torch.relu(m.fc1(x)))).mean(1))

    return Net(
        function,
        embed=nn.Linear(6, 8),
        attention=nn.MultiheadAttention(8, 2, batch_first=True),
        fc1=nn.Linear(8, 12),
        fc2=nn.Linear(12, 8),
        head=nn.Linear(8, 3),
    )


def conv(inputs: int, outputs: int, **options: Any) -> nn.Conv2d:
    """3 x 3 of the same size."""
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


def chain(middle: nn.Module, outputs: int = 8, kind: Any = nn.Conv2d) -> nn.Sequential:
    """A convolution, a layer, and a convolution that reads it."""
    return nn.Sequential(kind(3, 8, 1), middle, nn.ReLU(), kind(outputs, 2, 1))


IMAGE = ((2, 3, 4, 4),)
TOKENS = ((2, 5, 6),)
CASES = {
    "residual": Case(
        lambda: Net(
            lambda m, x: m.head(torch.relu(m.stem(x) + m.b(torch.relu(m.norm(m.a(m.stem(x))))))),
            stem=conv(3, 8), a=conv(8, 6), norm=nn.BatchNorm2d(6), b=conv(6, 8), head=conv(8, 2),
        ),
        IMAGE, {"stem": 8, "a": 6},
    ),
    "projected": Case(
        lambda: Net(
            lambda m, x: m.head(torch.relu(m.side(m.stem(x)) + m.a(torch.relu(m.stem(x))))),
            stem=conv(3, 8), a=conv(8, 6), side=nn.Conv2d(8, 6, 1), head=conv(6, 2),
        ),
        IMAGE, {"stem": 8, "a": 6},
    ),
    "concat": Case(
        lambda: Net(
            lambda m, x, y: m.head(torch.relu(m.fuse(torch.cat([m.camera(x), m.lidar(y)], 1)))),
            camera=conv(3, 8), lidar=conv(2, 6), fuse=conv(14, 4), head=conv(4, 2),
        ),
        ((2, 3, 4, 4), (2, 2, 4, 4)), {"camera": 8, "lidar": 6, "fuse": 4},
    ),
    "inputs": Case(
        lambda: Net(
            lambda m, x, y: m.head(torch.relu(m.camera(x) + m.lidar(y))),
            camera=conv(3, 8), lidar=conv(2, 8), head=conv(8, 2),
        ),
        ((2, 3, 4, 4), (2, 2, 4, 4)), {"camera": 8},
    ),
    "depthwise": Case(lambda: chain(conv(8, 8, groups=8)), IMAGE, {"0": 8}),
    "grouped": Case(lambda: chain(conv(8, 12, groups=2), 12), IMAGE, {"0": 4, "1": 6}),
    "transposed": Case(lambda: chain(nn.ConvTranspose2d(8, 6, 2, stride=2), 6), IMAGE, {"0": 8, "1": 6}),
    "grouped transposed": Case(
        lambda: chain(nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2), 6), IMAGE, {"0": 4, "1": 3}
    ),
    "flatten": Case(
        lambda: nn.Sequential(
            conv(3, 8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 6), nn.ReLU(), nn.Linear(6, 2)
        ),
        IMAGE, {"0": 8, "3": 6},
    ),
    "attention": Case(
        lambda: block(False, False), TOKENS, {"embed": 16, "attention.qkv.0": 4, "fc1": 12}
    ),
    "fused attention": Case(
        lambda: block(True, False), TOKENS, {"embed": 16, "attention.qkv": 4, "fc1": 12}
    ),
    "normed attention": Case(lambda: block(True, True), TOKENS, {"attention.qkv": 4, "fc1": 12}),
    "multihead": Case(multihead, TOKENS, {"fc1": 12}),
    "shared": Case(
        lambda: Net(
            lambda m, x: m.head(m.c(torch.relu(m.c(torch.relu(m.stem(x)))))),
            stem=conv(3, 8), c=conv(8, 8), head=conv(8, 2),
        ),
        IMAGE, {"stem": 8},
    ),
    "tied": Case(Tied, ((4, 3),), {"stem": 8, "one": 6}),
    "PReLU": Case(lambda: chain(nn.PReLU(8)), IMAGE, {"0": 8}),
    "embedding": Case(
        lambda: Net(
            lambda m, x, y: m.head(torch.relu(m.embedding(x) + m.a(y))),
            embedding=nn.Embedding(5, 6), a=nn.Linear(2, 6), head=nn.Linear(6, 2),
        ),
        ((0, 4, 3), (4, 3, 2)), {"a": 6},
    ),
    "no affine": Case(lambda: chain(nn.BatchNorm2d(8, affine=False)), IMAGE, {"0": 8}),
    "instance norm": Case(lambda: chain(nn.InstanceNorm2d(8)), IMAGE, {"0": 8}),
    "one dimension": Case(lambda: chain(nn.Conv1d(8, 6, 3), 6, nn.Conv1d), ((2, 3, 9),), {"0": 8, "1": 6}),
    "three dimensions": Case(
        lambda: chain(nn.Conv3d(8, 6, 2), 6, nn.Conv3d), ((2, 3, 3, 3, 3),), {"0": 8, "1": 6}
    ),
    "pillars": Case(
        lambda: Net(
            _scatter, point=nn.Linear(4, 8), norm=nn.BatchNorm1d(8), conv=conv(8, 6), head=conv(6, 2)
        ),
        ((5, 4), (0, 5)), {"point": 8, "conv": 6},
    ),
    "chunk": Case(lambda: Net(_glu, a=conv(3, 12), head=conv(6, 2)), IMAGE, {"a": 6}),
    "squeeze": Case(
        lambda: Net(_squeeze, a=conv(3, 8), down=nn.Conv2d(8, 4, 1), up=nn.Conv2d(4, 8, 1), head=conv(8, 2)),
        IMAGE, {"a": 8, "down": 4},
    ),
    "dense net": Case(
        lambda: Net(
            _dense, a=conv(3, 8), b=conv(8, 6), c=conv(14, 6), norm=nn.BatchNorm2d(20), head=conv(20, 2)
        ),
        IMAGE, {"a": 8, "b": 6, "c": 6},
    ),
    "own operator": Case(
        lambda: Net(lambda m, x: m.head(Double.apply(m.a(x))), a=conv(3, 8), head=conv(8, 2)),
        IMAGE, {"a": 8},
    ),
    "island": Case(
        lambda: Net(_islands, a=conv(3, 8), b=conv(8, 6), depth=conv(6, 6, groups=6), head=conv(6, 2)),
        IMAGE, {"bridge": 8, "b": 6}, {"bridge": {"a": "out", "b": "in"}},
    ),
}  # fmt: skip
