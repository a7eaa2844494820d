"""Channels removed from the example model: metrics, FLOPs and latency, beside Torch-Pruning's.

python examples/benchmarks/channels.py --json channels.json

For each seed the dense model is trained (once, kept in `--folder`), pruned to each share of its channels and
fine-tuned by `AlterMOMACallback`, and slimmed. Torch-Pruning prunes the same dense model by the norms of its
groups to the FLOPs that ours has left, and is fine-tuned for as many steps; so is, for fairness, the dense
model. Models that are there already are not trained again; latencies are measured anew.
"""

import copy
import json
import statistics
import sys
import warnings
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout, so that `examples` is found

from altermoma_pl import AlterEva, AlterMOMACallback, Channel, Cubic, slim
from altermoma_pl.export import example_tensors, to_onnx
from altermoma_pl.export.costs.measuring import measure, time_onnx
from altermoma_pl.export.costs.report import CostReport
from altermoma_pl.granularity.channels.flops import count_flops
from altermoma_pl.model.contexts import modes_restored
from examples.benchmarks.fusion import Fusion
from examples.benchmarks.measuring import options
from examples.data.batch import Batch
from examples.data.dataset import collate
from examples.models.module import FusionModule

SHARES = (0.3, 0.5)
BATCHES = (1, 8)
METRICS = ("miou", "ap")
EVENTS = Cubic(0, 2)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table of all seeds, and one of latencies for each."""
    arguments = options(
        __doc__,
        argv,
        seeds=3,
        epochs=8,
        pruning_batches=128,
        size="medium",
        round_to=16,
        precision="32-true",
        folder="runs/channels",
        repeats=60,
    )
    bench = Fusion(size=arguments.size, image_size=(96, 320), extent=38.4, cell=0.8)
    if arguments.quick:
        bench = Fusion(
            num_train=16, num_val=4, num_calibration=8, camera_epochs=1, lidar_epochs=1, fusion_epochs=1
        )
        arguments.epochs, arguments.pruning_batches, arguments.seeds, arguments.round_to = 3, 2, 1, 8
    given = {"pruning_batches": arguments.pruning_batches, "precision": arguments.precision}
    bench = Fusion(**{**vars(bench), **given})
    warnings.simplefilter("ignore")
    rows = [row for seed in range(arguments.seeds) for row in of_seed(bench, seed, arguments)]
    show(rows, arguments)


Made = tuple[FusionModule, Mapping[str, float]]
"""A model, and its metrics."""


def of_seed(bench: Fusion, seed: int, arguments: Namespace) -> list[dict[str, Any]]:
    """One row for each model of a seed: name, metrics, FLOPs, latencies."""
    models = Models(bench, seed, Path(arguments.folder) / str(seed), arguments.epochs, arguments.round_to)
    models.add("dense", models.dense)
    models.add("dense, trained on", models.trained_on)
    steps = 4 if arguments.quick else 16
    for share in SHARES:
        smaller = models.add(f"AlterEva {share:.0%}", partial(models.pruned, share, steps))
        flops = flops_of(smaller, models.batches[1])
        models.add(f"Torch-Pruning {share:.0%}", partial(models.torch_pruned, flops))
    # The images are channels last; weights that are not would be copied in every pass.
    modules = {
        name: module.eval().to(memory_format=torch.channels_last) for name, (module, _) in models.made.items()
    }
    report = measure(
        modules,
        models.batches,
        repeats=arguments.repeats,
        metrics={name: {m: values[m] for m in METRICS} for name, (_, values) in models.made.items()},
    )
    Console(width=200).print(report.to_text(width=200), highlight=False)
    milliseconds = onnx_latency(models, arguments.repeats)
    dense = milliseconds["dense"]
    rows = [row_of(name, seed, report) for name in models.made]
    return [
        row | {"ms, onnxruntime": (own := milliseconds[row["model"]]), "speed-up, onnxruntime": dense / own}
        for row in rows
    ]


class Models:
    """The models of a seed; what was trained once is kept in a folder."""

    def __init__(self, bench: Fusion, seed: int, folder: Path, epochs: int, round_to: int) -> None:
        self.bench, self.seed, self.folder = bench, seed, folder
        self.epochs, self.round_to = epochs, round_to
        self.data = bench.data(seed)
        self.batches = {size: (first_batch(self.data, size),) for size in BATCHES}
        self.made: dict[str, Made] = {}

    def add(self, name: str, make: Callable[[], Made]) -> FusionModule:
        """The model of this name, made unless it is there."""
        path = self.folder / f"{name}.pt"
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            torch.save(make(), path)
        self.made[name] = torch.load(path, weights_only=False)  # our own file
        return self.made[name][0]

    def dense(self) -> Made:
        """Each sensor alone, then fused."""
        if not (self.folder / "dense.ckpt").exists():
            self.bench.train_dense(self.seed, self.folder)
        return self._measured(self._dense())

    def trained_on(self) -> Made:
        """The dense model, for as many steps as the others."""
        module = self._dense()
        self.bench.fine_tune(module, self.data, self.epochs, [])
        return self._measured(module)

    def pruned(self, share: float, steps: int) -> Made:
        """Masked while it is fine-tuned, then slimmed; reactivated for so many steps."""
        modalities = {name: list(patterns) for name, patterns in self.bench.modalities.items()}
        callback = AlterMOMACallback(
            modalities,
            share,
            AlterEva(num_probe_batches=steps // 2, num_reactivation_steps=steps),
            EVENTS,
            granularity=Channel(round_to=self.round_to),
            seed=self.seed,
            figures=False,
        )
        module = self._dense()
        self.bench.fine_tune(module, self.data, self.epochs, [callback])
        assert callback.masks is not None  # noqa: S101 (there was an event)
        smaller = slim(module, callback.masks, self.batches[1]).model
        assert isinstance(smaller, FusionModule)  # noqa: S101
        return self._measured(smaller)

    def torch_pruned(self, flops: float) -> Made:
        """Cut to these FLOPs, then fine-tuned."""
        module = magnitude_pruned(self._dense(), self.batches[1], flops, self.round_to)
        self.bench.fine_tune(module, self.data, self.epochs, [])
        return self._measured(module)

    def _dense(self) -> FusionModule:
        return self.bench.dense(self.seed, self.folder, self.epochs)

    def _measured(self, module: FusionModule) -> Made:
        return module, self.bench.measure(module, self.data)


def onnx_latency(models: Models, repeats: int) -> dict[str, float]:
    """Median milliseconds of each model as an ONNX file, batch 1."""
    files = {
        name: to_onnx(module, models.batches[8], models.folder / f"{name}.onnx")
        for name, (module, _) in models.made.items()
    }
    tensors = example_tensors(models.made["dense"][0], models.batches[1])
    taken = time_onnx(files, tensors, repeats)
    return {name: 1e3 * statistics.median(times) for name, times in taken.items()}


def first_batch(data: Any, size: int) -> Batch:
    """The first frames of the validation split."""
    batch: Batch = next(iter(DataLoader(data.dataset("val"), batch_size=size, collate_fn=collate)))
    return batch


def magnitude_pruned(module: FusionModule, inputs: tuple[Batch], flops: float, round_to: int) -> FusionModule:
    """Pruned by Torch-Pruning's own group magnitudes, globally, to at most these FLOPs."""
    import torch_pruning

    low, high, best = 0.0, 0.95, module
    for _ in range(8):
        ratio, tried = (low + high) / 2, copy.deepcopy(module)
        # Left out: what it cannot know, the outputs and the layer whose outputs mean depths and features; and
        # the stem, since training a strided 1x1 convolution of 8 channels crashes in torch 2.13 on a CPU.
        parts = tried.model
        camera, objects = parts.encoders["camera"], parts.heads["object"]
        fixed = [objects.heatmap, objects.regression, parts.heads["map"][1]]
        fixed += [camera.vtransform.depthnet, camera.backbone.stem[0]]
        torch_pruning.pruner.BasePruner(
            tried,
            inputs[0],
            torch_pruning.importance.GroupMagnitudeImportance(p=2),
            global_pruning=True,
            pruning_ratio=ratio,
            round_to=round_to,
            ignored_layers=fixed,
            forward_fn=lambda model, batch: [*model(batch).objects, model(batch).map_logits],
        ).step()
        if flops_of(tried, inputs) <= flops:
            high, best = ratio, tried
        else:
            low = ratio
    return best


def flops_of(module: FusionModule, inputs: tuple[Batch]) -> float:
    """FLOPs of a forward pass in evaluation mode."""
    with modes_restored(module):
        return float(count_flops(module.eval(), lambda m: m(*inputs)).total or 0)


def row_of(name: str, seed: int, report: CostReport) -> dict[str, Any]:
    """Absolute values, and ratios to the dense model."""
    cost, dense = report.costs[name], report.costs["dense"]
    row: dict[str, Any] = {"model": name, "seed": seed, "flops": (cost.flops or 0) / (dense.flops or 1)}
    row["parameters"] = cost.num_parameters / dense.num_parameters
    for metric in METRICS:
        row[metric] = cost.metrics[metric]
        row[f"{metric} / dense"] = cost.metrics[metric] / dense.metrics[metric]
    for own, base in zip(cost.latency, dense.latency, strict=True):
        row[f"ms, batch {own.batch}"] = 1e3 * own.median
        row[f"speed-up, batch {own.batch}"] = base.median / own.median
    return row


def show(rows: Sequence[Mapping[str, Any]], arguments: Namespace) -> None:
    """Mean over seeds, and the range."""
    columns = [key for key in rows[0] if key not in ("model", "seed")]
    table = Table("model", *columns, title=f"Channels removed, {arguments.seeds} seeds", title_justify="left")
    for name in dict.fromkeys(row["model"] for row in rows):
        cells = []
        for column in columns:
            values = [row[column] for row in rows if row["model"] == name]
            cells.append(f"{statistics.mean(values):.3f} ({min(values):.3f} - {max(values):.3f})")
        table.add_row(name, *cells)
    Console(width=220).print(table)
    if arguments.json is not None:
        content = {"rows": list(rows), "torch": torch.__version__, "threads": torch.get_num_threads()}
        arguments.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
