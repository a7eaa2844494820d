"""A benchmark of seconds, which notes each of its runs in a file."""

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from altermoma_pl import AlterMOMACallback, Calibration, Criterion, Magnitude, OneShot, Random
from altermoma_pl.compare import Benchmark, Direction, Method, Values
from tests.helpers.lightning_models import MODALITIES, Fusion, fit, loader

METHODS = {"magnitude": Method(Magnitude()), "random": Method(Random())}
OPTIONS = {"sparsities": [0.5, 0.75], "seeds": 2, "schedule": OneShot(), "num_epochs": 2, "min_density": 0.0}
TABLES = ("tables.md", "tables.tex", "results.csv", "summary.json")


@dataclass(frozen=True)
class Toy(Benchmark):
    """The toy fusion model, measured by its loss, and by its loss without the camera.

    Args:
        width: Changes nothing but the identity.
        diary: A file to which each run is added as a line.
        pause: Seconds of each run, at least.
    """

    width: int = 8
    diary: str = field(default="", repr=False)
    pause: float = field(default=0.0, repr=False)

    @property
    def modalities(self) -> Mapping[str, Sequence[str]]:
        return MODALITIES

    @property
    def metrics(self) -> Mapping[str, Direction]:
        return {"loss": "lower"}

    def train_dense(self, seed: int, folder: Path) -> Values:
        assert list(folder.iterdir()) == []
        (folder / "half.pt").write_text("half of it")
        self._note(f"dense {seed}")
        module = Fusion(lr=0.01 * (seed + 1))
        fit(module, max_epochs=2)
        torch.save(module.state_dict(), folder / "dense.pt")
        return measured(module)

    def prune(self, seed: int, folder: Path, callback: AlterMOMACallback, num_epochs: int) -> Values:
        self._note(f"{callback.criterion!r} {callback.sparsity} {seed}")
        module = Fusion()
        module.load_state_dict(torch.load(folder / "dense.pt", weights_only=True))
        fit(module, callback, max_epochs=num_epochs)
        return measured(module) | {"epochs": num_epochs, "threads": torch.get_num_threads()}

    def _note(self, text: str) -> None:
        if self.diary:
            with open(self.diary, "a") as file:
                file.write(text + "\n")
        time.sleep(self.pause)


@dataclass(frozen=True)
class Failing(Criterion):
    """Cannot score.

    Args:
        hard: Take the whole process down.
    """

    hard: bool = False

    def score(self, calibration: Calibration) -> dict[str, torch.Tensor]:
        if self.hard:
            os._exit(3)
        raise ArithmeticError("no score today")


@torch.no_grad()
def measured(module: Fusion) -> Values:
    module.eval()
    x, y = next(iter(loader(batch_size=32, seed=2)))
    blind = x.clone()
    blind[:, :3] = 0
    return {"loss": module.loss((x, y)), "loss/camera_dropped": module.loss((blind, y))}


def tables(folder: Path) -> dict[str, bytes]:
    """The files that repeat byte for byte."""
    return {name: (folder / name).read_bytes() for name in TABLES}


def notes(path: Path) -> list[str]:
    return path.read_text().splitlines()


def strict_json(text: str) -> object:
    """Parsed; NaN and infinity, which json does not have, are errors."""

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    return json.loads(text, parse_constant=refuse)
