"""`altermoma export`: from a checkpoint of a pruned run to a smaller model, as a file, with what it costs."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from altermoma_pl.callback import AlterMOMACallback
from altermoma_pl.callback.checkpoints import load_checkpoint, pruning_states_of
from altermoma_pl.export.costs import CostReport, measure, time_onnx
from altermoma_pl.export.costs.timing import quartiles
from altermoma_pl.export.files import check_onnx, to_onnx, to_torch_export
from altermoma_pl.export.run import Run
from altermoma_pl.export.tensors import example_tensors
from altermoma_pl.granularity.channels import Slim, owners, slim
from altermoma_pl.granularity.channels.declared import Declared
from altermoma_pl.granularity.channels.rebuilding import KEY, reshape_like_, slim_entry, slim_optimizer_states
from altermoma_pl.mask.masks import Masks
from altermoma_pl.model.modality import SHARED

Format = Literal["checkpoint", "torch-export", "onnx"]
BATCHES = (1, 8)  # of which latencies are measured
SUFFIXES = {"checkpoint": ".slim.ckpt", "torch-export": ".pt2", "onnx": ".onnx"}


@dataclass(frozen=True)
class Exported:
    """What was written.

    Args:
        path: The file.
        costs: Of the dense and the masked model, the slim one where channels were removed, and the
            recalibrated one if that was asked for; None if not measured.
        notes: What a user should know, a line each.
    """

    path: Path
    costs: CostReport | None
    notes: tuple[str, ...]


@dataclass
class _Models:
    """The models of the table by name, the last of which is written, and what is known of them."""

    by_name: dict[str, LightningModule]
    slimmed: Slim | None = None
    modalities: dict[str, str] = field(default_factory=dict)  # of the slim model's groups of channels
    notes: list[str] = field(default_factory=list)

    @property
    def last(self) -> tuple[str, LightningModule]:
        return list(self.by_name.items())[-1]


def export(
    checkpoint: str,
    config: str,
    format: Format = "checkpoint",
    output: str | None = None,
    recalibrate: int = 0,
    validate: bool = False,
    opset: int | None = None,
    repeats: int = 20,
    trust: bool = False,
) -> Exported:
    """Remove the pruned channels of a checkpoint's model and write it.

    Where single weights are pruned, there are none to remove: the masked model is written.

    Args:
        checkpoint: Saved by a Trainer with `AlterMOMACallback`, or of a slim model (see `Slimmed`).
        config: YAML file with `model` and, for example inputs, `data`, each as class_path and init_args; what
            else it holds is not read. A module's `example_input_array` comes before the data.
        format: "checkpoint", which Lightning resumes from (see `Slimmed`), "torch-export" or "onnx".
        output: The file; None for the checkpoint's name with another ending.
        recalibrate: Number of training batches on which running statistics of batch norms are measured anew.
        validate: Whether to validate all models but the dense one, whose weights are gone.
        opset: Of ONNX; None for the exporter's.
        repeats: Of each latency; 0 to measure no costs.
        trust: Load objects other than tensors and builtins too, which can run code.

    Raises:
        ModuleNotFoundError: Where an extra is missing.
        ValueError: If the checkpoint was not pruned or is damaged, the configuration names no model, inputs
            are missing or refused, options do not go together, or the model cannot be slimmed or exported.
    """
    path = Path(output or checkpoint.removesuffix(".ckpt") + SUFFIXES[format])
    _check_options(path, checkpoint, format, recalibrate, validate, opset, repeats)
    saved = load_checkpoint(checkpoint, trust)
    states = {} if KEY in saved else pruning_states_of(saved, checkpoint)
    run = Run.load(config)
    _check_data(run, recalibrate, validate)
    inputs = run.example_inputs()
    models = _models(run.module, saved, states, checkpoint, inputs)
    _check_slim(models, format, checkpoint)
    if recalibrate:
        name, model = models.last
        models.by_name[f"{name}, recalibrated"] = run.recalibrated(model, recalibrate)
    batches = run.inputs_of(BATCHES) if repeats else {}
    costs = _costs(models, run, batches, validate, repeats) if repeats else None
    path.parent.mkdir(parents=True, exist_ok=True)
    _, model = models.last
    if models.slimmed and format == "checkpoint":
        torch.save(_slim_checkpoint(saved, models, models.slimmed, costs), path)
    elif format == "torch-export":
        to_torch_export(model, inputs, path)
    else:
        to_onnx(model, inputs, path, opset=opset)
        gap = check_onnx(path, model, inputs)
        models.notes.append(f"onnxruntime differs from torch by {gap:.1e}, relative to the outputs.")
        if repeats:
            models.notes += _onnx_times(path, models, batches, inputs, opset, repeats)
    return Exported(path, costs, tuple(models.notes))


def _check_options(
    path: Path,
    checkpoint: str,
    format: Format,
    recalibrate: int,
    validate: bool,
    opset: int | None,
    repeats: int,
) -> None:
    if path.resolve() == Path(checkpoint).resolve():
        raise ValueError(f"--output {path} is the checkpoint itself: give another file")
    if opset is not None and format != "onnx":
        raise ValueError(f"--opset is of ONNX, the format is {format!r}: give --format onnx")
    for name, value in {"recalibrate": recalibrate, "repeats": repeats}.items():
        if value < 0:
            raise ValueError(f"--{name} must be 0 or more, got {value}")
    if validate and not repeats:
        raise ValueError("--validate shows its metrics beside the costs: give --repeats 1 or more")


def _check_data(run: Run, recalibrate: int, validate: bool) -> None:
    if run.data is None:
        for name, wanted in {"recalibrate": recalibrate, "validate": validate}.items():
            if wanted:
                raise ValueError(f"--{name} needs `data:` in the configuration, for batches")


def _models(
    module: LightningModule,
    saved: dict[str, Any],
    states: Mapping[str, Any],
    path: str,
    inputs: tuple[Any, ...],
) -> _Models:
    """The dense, the masked and, where channels are pruned, the slim model; `module` gets the weights."""
    module.eval()
    models = _Models({"dense": copy.deepcopy(module)})
    if KEY in saved:
        reshape_like_(module, saved["state_dict"], saved[KEY])
        _load(module, saved, path)
        models.by_name["slim"] = module
        return models
    masks = _all_masks(states, path)
    _load(module, saved, path)
    models.by_name["masked"] = module
    # Rows can be empty in masks of single weights, too: what was pruned is told by the latest event.
    if not any("widths" in state.events[-1] for state in states.values() if state.events):
        models.notes.append("Single weights are pruned: zeros in dense tensors take as much time as others.")
        return models
    slimmed = models.slimmed = slim(module, masks, inputs, _declared(states))
    producers = {name for group in slimmed.channels.values() for name in group.producers}
    group_of = dict.fromkeys(producers, SHARED)
    for state in states.values():
        group_of |= state.group_of
    models.modalities = owners(slimmed.channels, group_of)
    models.by_name["slim"] = slimmed.model  # type: ignore[assignment]
    models.notes += [f"{layer}: {why}" for layer, why in slimmed.still_masked.items()]
    return models


def _check_slim(models: _Models, format: Format, path: str) -> None:
    if format != "checkpoint" or models.slimmed:
        return
    if "slim" in models.by_name:
        raise ValueError(f"{path} is of a slim model already: give --format torch-export or onnx")
    raise ValueError(
        f"{path} has single weights pruned: there are no channels to remove, and the checkpoint itself loads "
        "into the plain model; prune with granularity='channel', or give --format torch-export or onnx"
    )


def _all_masks(states: Mapping[str, Any], path: str) -> Masks:
    masks: dict[str, Tensor] = {}
    for state in states.values():
        masks |= dict(state.masks or {})
    merged = Masks(masks)
    if not masks or merged.sparsity == 0:
        raise ValueError(f"{path} is not pruned: its masks keep everything; give a checkpoint after an event")
    return merged


def _declared(states: Mapping[str, Any]) -> Declared:
    """The groups of channels that were declared for the latest events."""
    declared: dict[str, Mapping[str, str]] = {}
    for state in states.values():
        declared |= state.events[-1].get("declared", {}) if state.events else {}
    return declared


def _load(module: LightningModule, saved: Mapping[str, Any], path: str) -> None:
    try:
        module.load_state_dict(saved["state_dict"])
    except RuntimeError as error:
        raise ValueError(
            f"the weights of {path} do not fit {type(module).__name__} as it is configured: {error}"
        ) from error


def _costs(
    models: _Models, run: Run, batches: Mapping[int, tuple[Any, ...]], validate: bool, repeats: int
) -> CostReport:
    if tuple(batches) != BATCHES:
        sizes, wanted = (" and ".join(map(str, each)) for each in (batches, BATCHES))
        models.notes.append(
            f"Measured with batches of {sizes}, not of {wanted}: the data does not give those."
        )
    metrics = {}
    if validate:
        metrics = {name: run.validated(model) for name, model in models.by_name.items() if name != "dense"}
    return measure(models.by_name, batches, repeats=repeats, metrics=metrics)


def _onnx_times(
    path: Path,
    models: _Models,
    batches: Mapping[int, tuple[Any, ...]],
    inputs: tuple[Any, ...],
    opset: int | None,
    repeats: int,
) -> list[str]:
    """A line for each batch size: the latency beside that of the dense model, which is written for this."""
    notes, count = [], torch.get_num_threads()
    threads = f"{count} thread{'s' * (count != 1)}"
    with TemporaryDirectory() as folder:
        dense = to_onnx(models.by_name["dense"], inputs, Path(folder) / "dense.onnx", opset=opset)
        for batch, example in batches.items():
            tensors = example_tensors(models.by_name["dense"], example)
            taken = time_onnx({"dense": dense, "file": path}, tensors, repeats)
            low, median, high = (1e3 * value for value in quartiles(taken["file"]))
            reference = 1e3 * quartiles(taken["dense"])[1]
            notes.append(
                f"onnxruntime, batch {batch}, {threads}: {median:.2f} ms "
                f"[{low:.2f}, {high:.2f}], dense {reference:.2f} ms: {reference / median:.2f} times as fast."
            )
    return notes


def _slim_checkpoint(
    saved: dict[str, Any], models: _Models, slimmed: Slim, costs: CostReport | None
) -> dict[str, Any]:
    """The checkpoint with what is left, which Lightning can resume from."""
    entry = slim_entry(slimmed.attributes, slimmed.widths, models.modalities)
    if costs is not None:
        entry["costs"] = costs.to_json()
    _, model = models.last
    new = {**saved, "state_dict": model.state_dict(), KEY: entry}
    new["callbacks"] = {
        key: value
        for key, value in saved.get("callbacks", {}).items()
        if not key.startswith(AlterMOMACallback.__name__)
    }
    trained = {name: p for name, p in models.by_name["masked"].named_parameters() if p.requires_grad}
    try:
        new["optimizer_states"] = slim_optimizer_states(
            saved.get("optimizer_states", []), trained, slimmed.resizing
        )
    except ValueError as error:
        models.notes.append(f"The optimizers' state was left out: {error}. Start a new fit from the weights.")
        new["optimizer_states"] = []
    return new
