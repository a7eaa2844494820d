"""Toy two-tower nets whose numbers fit in the head, and nets with the traits of real projects."""

import inspect
import json
import random
from pathlib import Path

import numpy as np
import torch
from torch import nn

from altermoma_pl import Calibration

ORACLES = json.loads((Path(__file__).parent / "oracles.json").read_text())
BRANCHES = {"camera": ["camera"], "lidar": ["lidar"]}


def covers(*oracles):
    """Mark a test as that of entries of oracles.json: each must have one."""
    return lambda test: test


def concrete_subclasses(base):
    """All subclasses of this package that can be made, however deep."""
    pending, found = [base], set()
    while pending:
        cls = pending.pop()
        pending += cls.__subclasses__()
        if not inspect.isabstract(cls) and cls.__module__.startswith("altermoma_pl"):
            found.add(cls)
    return sorted(found, key=lambda cls: cls.__name__)


def snapshot(model):
    """The bits of everything that a criterion must leave alone, by a readable name."""
    state = {f"training {path}": module.training for path, module in model.named_modules()}
    for name, parameter in model.named_parameters():
        state[f"parameter {name}"] = _bits(parameter)
        state[f"gradient {name}"] = None if parameter.grad is None else _bits(parameter.grad)
        state[f"requires_grad {name}"] = parameter.requires_grad
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            full = f"{path}.{name}" if path else name
            state[f"buffer {full}"] = None if buffer is None else _bits(buffer)
    state["rng torch"] = torch.get_rng_state().tolist()
    state["rng random"] = random.getstate()
    kind, keys, *rest = np.random.get_state()
    state["rng numpy"] = (kind, keys.tolist(), *rest)
    return state


def _bits(tensor):
    return str(tensor.dtype), tuple(tensor.shape), tensor.detach().contiguous().numpy().tobytes()


def fill(model, start=1):
    """Weights 1, 2, 3.. through all floating-point parameters, in the model's order."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                size = parameter.numel()
                parameter.copy_(torch.arange(start, start + size).view(parameter.shape))
                start += size
    return model


def scatter(model, seed=0):
    """Small weights of both signs, the same each time."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return model


def squared_error(model, batch):
    """Half the squared error, summed over everything but averaged over samples."""
    *inputs, target = batch
    return 0.5 * (model(*inputs) - target).pow(2).sum() / len(target)


def linear(rows, **kwargs):
    weight = torch.tensor(rows, **kwargs)
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    layer.weight = nn.Parameter(weight)
    return layer


class Scalar(nn.Module):
    """y = f1 * c * x + f2 * l * z: four scalar weights c = 2, l = 3, f = (1, -1), in float64."""

    def __init__(self):
        super().__init__()
        self.camera = linear([[2.0]], dtype=torch.float64)
        self.lidar = linear([[3.0]], dtype=torch.float64)
        self.fusion = linear([[1.0, -1.0]], dtype=torch.float64)

    def forward(self, x, z):
        return self.fusion(torch.cat([self.camera(x), self.lidar(z)], -1))


def scalar_batch(x, z, target):
    return tuple(torch.tensor([[float(v)]], dtype=torch.float64) for v in (x, z, target))


class OracleNet(nn.Module):
    """y = Wf [Wc xc; Wl xl] of the oracle `alter_moma`."""

    def __init__(self):
        super().__init__()
        oracle = ORACLES["alter_moma"]
        self.camera = linear(oracle["Wc"], dtype=torch.float64)
        self.lidar = linear(oracle["Wl"], dtype=torch.float64)
        self.fusion = linear(oracle["Wf"], dtype=torch.float64)

    def forward(self, xc, xl):
        return self.fusion(torch.cat([self.camera(xc), self.lidar(xl)], -1))


def oracle_batches():
    return [
        tuple(torch.tensor(sample[key], dtype=torch.float64).view(1, -1) for key in ("xc", "xl", "t"))
        for sample in ORACLES["alter_moma"]["data"]
    ]


class TwoTower(nn.Module):
    """Two small towers with batch norm, a head with dropout."""

    def __init__(self, width=4, dropout=0.5):
        super().__init__()
        self.camera = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.GELU())
        self.lidar = nn.Sequential(nn.Linear(2, width), nn.BatchNorm1d(width), nn.GELU())
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(2 * width, 1))

    def forward(self, image, points):
        return self.head(torch.cat([self.camera(image), self.lidar(points)], -1))


def two_tower(seed=0):
    """A TwoTower in train mode with running statistics that are not the initial ones."""
    model = scatter(TwoTower(), seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.weight.add_(1.0)
                module.running_mean.fill_(0.1)
                module.running_var.fill_(2.0)
                module.num_batches_tracked.fill_(7)
    return model


def random_batches(count, seed=0, sizes=(3, 2, 1), samples=5):
    generator = torch.Generator().manual_seed(seed)
    return [tuple(torch.randn(samples, size, generator=generator) for size in sizes) for _ in range(count)]


def calibration(model=None, **changes):
    """Calibration of a two-tower net on three probe and four training batches."""
    arguments = {
        "model": two_tower() if model is None else model,
        "loss_fn": squared_error,
        "probe_batches": random_batches(3, seed=1),
        "training_batches": random_batches(4, seed=2),
        "modalities": BRANCHES,
    }
    return Calibration(**(arguments | changes))


class ThreeModalities(nn.Module):
    """Three scalar towers, weights 1, 2, 3, and a head with weights 4, 5, 6."""

    def __init__(self):
        super().__init__()
        for name in ("camera", "lidar", "radar"):
            setattr(self, name, nn.Linear(1, 1, bias=False))
        self.head = nn.Linear(3, 1, bias=False)
        fill(self)

    def forward(self, camera, lidar, radar):
        return self.head(torch.cat([self.camera(camera), self.lidar(lidar), self.radar(radar)], -1))


class Aliased(nn.Module):
    """The camera tower is registered under two names; the two towers share their stem."""

    def __init__(self, shared_stem=False):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
        self.lidar = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
        self.camera = self.backbone
        if shared_stem:
            self.lidar[0] = self.backbone[0]
        self.head = nn.Linear(4, 1)
        scatter(self)

    def forward(self, image, points):
        return self.head(torch.cat([self.camera(image), self.lidar(points)], -1))


class Geometry(nn.Module):
    """A camera branch that divides by a frozen geometry constant and indexes by an integer one."""

    def __init__(self):
        super().__init__()
        self.camera = nn.Module()
        self.camera.net = nn.Linear(3, 2)
        self.camera.dx = nn.Parameter(torch.tensor([0.5, 0.25]), requires_grad=False)
        self.camera.nx = nn.Parameter(torch.tensor([1, 0]), requires_grad=False)
        self.lidar = nn.Linear(2, 2)
        self.head = nn.Linear(4, 1)
        scatter(self.head)
        scatter(self.camera.net, 1)
        scatter(self.lidar, 2)

    def forward(self, image, points):
        seen = (self.camera.net(image) / self.camera.dx)[:, self.camera.nx]
        return self.head(torch.cat([seen, self.lidar(points)], -1))


class FrozenTower(TwoTower):
    """The camera tower is pre-trained and frozen as a whole."""

    def __init__(self):
        super().__init__()
        self.camera.requires_grad_(False)
        scatter(self)


class Dead(TwoTower):
    """Holds a token and a head that no loss reaches: their gradient is None."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.ones(2))
        self.auxiliary = nn.Linear(4, 2)
        scatter(self)


INTERLEAVED = {"camera": ["towers.camera"], "lidar": ["towers.lidar", "!towers.lidar.fusion_*"]}


class Interleaved(nn.Module):
    """Towers in a ModuleDict that is iterated and never called, fusion blocks inside the LiDAR stream."""

    def __init__(self):
        super().__init__()
        self.towers = nn.ModuleDict({"camera": nn.Linear(3, 2), "lidar": nn.ModuleDict()})
        self.towers["lidar"]["stage_0"] = nn.Linear(2, 2)
        self.towers["lidar"]["fusion_0"] = nn.Linear(4, 2)
        self.towers["lidar"]["stage_1"] = nn.Linear(2, 2)
        self.head = nn.Linear(2, 1)
        scatter(self)

    def forward(self, image, points):
        features = {}
        for name, tower in self.towers.items():
            features[name] = tower(image) if name == "camera" else tower["stage_0"](points)
        fused = self.towers["lidar"]["fusion_0"](torch.cat([features["camera"], features["lidar"]], -1))
        return self.head(self.towers["lidar"]["stage_1"](fused) + fused)


class Nested(nn.Module):
    """The net sits under `model`, as in a LightningModule."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *inputs):
        return self.model(*inputs)


class Compiled(nn.Module):
    """What torch.compile makes of a module's path."""

    def __init__(self, module):
        super().__init__()
        self._orig_mod = module

    def forward(self, *inputs):
        return self._orig_mod(*inputs)
