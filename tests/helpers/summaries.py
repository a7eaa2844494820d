"""Summaries of made-up values."""

from dataclasses import dataclass

from altermoma_pl import AlterEva, Magnitude, OneShot
from altermoma_pl.compare import Method, Summary
from altermoma_pl.compare.grid import Cell, Grid
from tests.helpers.toy import Toy


@dataclass(frozen=True)
class TwoMetrics(Toy):
    @property
    def metrics(self):
        return {"iou": "higher", "loss": "lower"}


def complete(criterion, **options):
    return Method(
        criterion, **{"schedule": OneShot(), "num_epochs": 2, "scope": "global", "min_density": 0.0} | options
    )


def summary(methods=None, sparsities=(0.9,), seeds=(0, 1), **changes):
    """The first has IoUs of 0.5 and 0.7 and losses of 1 and 2; each further one 0.1 and 0.5 worse."""
    methods = methods or {"ours_1": complete(AlterEva()), "a|b [paper]": complete(Magnitude())}
    grid = Grid(TwoMetrics(), methods, sparsities, seeds)
    values = {
        cell: {
            "iou": 0.5 + 0.2 * cell.seed - 0.1 * list(methods).index(cell.method),
            "loss": 1.0 + cell.seed + 0.5 * list(methods).index(cell.method),
            "iou/camera_dropped": 0.25,
            "kept/camera": 0.05,
            "kept/shared": 0.2,
            "sparsity": cell.sparsity,
            "seconds/scoring": 0.5,
            "seconds/all": 2.0 + cell.seed,
        }
        | changes
        for cell in grid.cells
    }
    dense = {seed: {"iou": 1.0, "iou/camera_dropped": 0.5, "seconds/train": 3.0} for seed in seeds}
    return Summary(grid, next(iter(methods)), dense, values)


FIRST = Cell(0, 0.9, "ours_1")
