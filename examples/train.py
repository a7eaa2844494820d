"""Pre-train each sensor alone, fuse, fine-tune, prune: the situation that AlterMOMA is about.

    python examples/train.py --config examples/configs/kitti.yaml --data.root /path/to/kitti

`run` is what `quickstart.py` calls; every argument can stand in the YAML or be given as a flag.
"""

import inspect
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from lightning import Callback, Trainer, seed_everything
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout, so that `examples` is found

from altermoma_pl import AlterMOMACallback, SparsityReport
from examples.data.datamodule import DrivingData
from examples.models.evaluate import evaluate, evaluate_views
from examples.models.module import FusionModule
from examples.models.views import VIEWS

MODALITIES = {"camera": ["model.encoders.camera"], "lidar": ["model.encoders.lidar"]}


@dataclass(frozen=True)
class Epochs:
    """Length of each stage in epochs.

    Args:
        camera: Pre-training of the camera branch.
        lidar: Pre-training of the LiDAR branch.
        fusion: Training of the fused, dense model.
        pruning: Pruning and fine-tuning; the schedule's events lie within.
    """

    camera: int = 8
    lidar: int = 6
    fusion: int = 4
    pruning: int = 8


@dataclass(frozen=True)
class Result:
    """What a run measured.

    Args:
        alone: Sensor -> metric -> value of the model pre-trained on it; empty if that was skipped.
        dense: View (see `VIEWS`) -> metric -> value, before pruning.
        pruned: The same after pruning and fine-tuning.
        report: What the pruned model keeps.
        output_dir: Where checkpoints, figures and `result.json` lie.
    """

    alone: dict[str, dict[str, float]]
    dense: dict[str, dict[str, float]]
    pruned: dict[str, dict[str, float]]
    report: SparsityReport
    output_dir: Path


def run(
    data: DrivingData,
    pruning: AlterMOMACallback,
    size: Literal["tiny", "small", "medium", "large"] = "small",
    epochs: Epochs = Epochs(),
    learning_rate: float = 2e-3,
    pruning_learning_rate: float = 1e-3,
    dense: str | None = None,
    output_dir: str = "runs/experiment",
    seed: int = 0,
    accelerator: str = "auto",
    progress_bar: bool = True,
) -> Result:
    """Train, prune and evaluate.

    Args:
        data: The data.
        pruning: The callback.
        size: Of the model: "tiny" for benchmarks, "small" and "medium" for a CPU, "large" for a GPU.
        epochs: Length of each stage.
        learning_rate: Of pre-training and fusion.
        pruning_learning_rate: While pruning and fine-tuning.
        dense: Checkpoint of a dense fusion model (`dense.ckpt` of an earlier run): skips the first
            three stages.
        output_dir: For checkpoints, figures, results, and `model.yaml`, by which `altermoma export` makes the
            model of the checkpoints.
        seed: Of weights and everything random in training.
        accelerator: As for Lightning's Trainer.
        progress_bar: Whether to show Lightning's progress bars.
    """
    folder = Path(output_dir)
    data.prepare_data()
    data.setup()
    shape: dict[str, Any] = {
        "size": size,
        "num_map_classes": len(data.map_classes),
        "map_classes": list(data.map_classes),
        "image_size": data.image_size,
        "grid": data.grid,
    }
    _save_configuration(folder, shape, data)

    def module(**options: Any) -> FusionModule:
        return FusionModule(**shape, **options)

    def train(name: str, model: FusionModule, num_epochs: int, callbacks: list[Callback]) -> None:
        print(f"{name}: {num_epochs} epochs", flush=True)
        trainer = Trainer(
            max_epochs=num_epochs,
            accelerator=accelerator,
            devices=1,
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=progress_bar,
            num_sanity_val_steps=0,
            limit_val_batches=0,  # evaluated once, at the end of the last stage
            gradient_clip_val=10.0,
        )
        trainer.fit(model, datamodule=data)
        trainer.save_checkpoint(folder / f"{name}.ckpt")

    seed_everything(seed, verbose=False)
    alone = {}
    if dense is None:
        backbones = {}
        for sensor, num_epochs in (("camera", epochs.camera), ("lidar", epochs.lidar)):
            model = module(sensors=[sensor], learning_rate=learning_rate)
            train(sensor, model, num_epochs, [])
            alone[sensor] = evaluate(model.model, data.val_dataloader())
            backbones[sensor] = str(folder / f"{sensor}.ckpt")
        # The LiDAR model's decoder and heads: what it has learned of the scene need not be learned anew.
        fused = module(backbones=backbones, heads=backbones["lidar"], learning_rate=learning_rate)
        train("dense", fused, epochs.fusion, [])
        dense = str(folder / "dense.ckpt")
    model = module(weights=dense, learning_rate=pruning_learning_rate)
    dense_metrics = evaluate_views(model.model, data.val_dataloader())
    if pruning.output_dir is None:
        pruning.output_dir = str(folder / "pruning")
    seed_everything(seed, verbose=False)
    train("pruned", model, epochs.pruning, [pruning])
    pruned_metrics = evaluate_views(model.model, data.val_dataloader())
    result = Result(alone, dense_metrics, pruned_metrics, pruning.report(), folder)
    _save(result)
    return result


def _save_configuration(folder: Path, shape: dict[str, Any], data: DrivingData) -> None:
    names = inspect.signature(DrivingData).parameters
    arguments = {FusionModule: shape, DrivingData: {name: getattr(data, name) for name in names}}
    model, datamodule = (
        {
            "class_path": f"{kind.__module__}.{kind.__qualname__}",
            # Through json, since YAML has no tuples.
            "init_args": json.loads(json.dumps(options, default=asdict)),
        }
        for kind, options in arguments.items()
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.yaml").write_text(yaml.safe_dump({"model": model, "data": datamodule}, sort_keys=False))


def _save(result: Result) -> None:
    values = {
        "alone": result.alone,
        "dense": result.dense,
        "pruned": result.pruned,
        "sparsity": result.report.sparsity,
        "kept": {name: total.kept for name, total in result.report.groups.items()},
    }
    (result.output_dir / "result.json").write_text(json.dumps(values, indent=2) + "\n")


def table(result: Result) -> Table:
    """Each sensor alone, dense and pruned, side by side: metrics, each sensor dropped, kept shares."""
    groups = result.report.groups
    rows = Table(title=f"Pruned to {result.report.sparsity:.0%} sparsity", title_justify="left")
    rows.add_column("")
    for header in (*(f"{sensor} alone" for sensor in result.alone), "dense", "pruned"):
        rows.add_column(header, justify="right")
    for view in VIEWS:
        rows.add_section()
        for key, name in (("miou", "mIoU"), ("ap", "AP")):
            alone = [m[key] if view == "both" else None for m in result.alone.values()]
            label = name if view == "both" else f"{name}, {view}"
            rows.add_row(label, *map(_number, (*alone, result.dense[view][key], result.pruned[view][key])))
    rows.add_section()
    for group, total in groups.items():
        rows.add_row(f"kept, {group}", *[""] * len(result.alone), _number(1.0), _number(total.kept))
    return rows


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


if __name__ == "__main__":
    from jsonargparse import auto_cli

    Console().print(table(auto_cli(run, as_positional=False)))
