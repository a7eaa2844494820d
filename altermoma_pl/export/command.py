"""`altermoma export`: from a checkpoint of a pruned run to a smaller model, as a file, with what it costs."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, cast

import torch
from lightning.pytorch import LightningModule
from torch import nn

from altermoma_pl.callback import AlterMOMACallback
from altermoma_pl.callback.checkpoints import load_checkpoint, pruning_states_of
from altermoma_pl.callback.state import PruningState
from altermoma_pl.export.costs.measuring import measure, quartiles, time_onnx
from altermoma_pl.export.costs.report import CostReport
from altermoma_pl.export.files import check_onnx, to_onnx, to_torch_export, whole
from altermoma_pl.export.program import example_tensors
from altermoma_pl.export.run import Run
from altermoma_pl.granularity.channels.groups import owners
from altermoma_pl.granularity.channels.resizing import KEY, reshape_like_, slim_entry, slim_optimizer_states
from altermoma_pl.granularity.channels.slimming import Slim, slim
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
        OSError: Where a file cannot be read or written.
        ValueError: If the checkpoint was not pruned or is damaged, the configuration names no model, inputs
            are missing or refused, options do not go together, or the model cannot be slimmed or exported.
    """
    path = Path(output or checkpoint.removesuffix(".ckpt") + SUFFIXES[format])
    _check_options(path, checkpoint, format, recalibrate, validate, opset, repeats)
    saved = load_checkpoint(checkpoint, trust)
    states = {} if KEY in saved else pruning_states_of(saved, checkpoint)
    run = Run.load(config)
    for option, value in {"recalibrate": recalibrate, "validate": validate}.items():
        if value and run.data is None:
            raise ValueError(f"--{option} needs `data:` in the configuration, for batches")
    inputs = run.example_inputs()
    models, slimmed = _models(run.module, saved, states, checkpoint, inputs)
    notes = _notes(models, slimmed, format, checkpoint)
    name, model = [*models.items()][-1]
    if recalibrate:
        model = models[f"{name}, recalibrated"] = run.recalibrated(model, recalibrate)
    batches = run.inputs_of(BATCHES) if repeats else {}
    costs = None
    if repeats:
        if tuple(batches) != BATCHES:
            sizes, wanted = (" and ".join(map(str, each)) for each in (batches, BATCHES))
            notes.append(f"Measured with batches of {sizes}, not of {wanted}: the data does not give those.")
        metrics = {key: run.validated(models[key]) for key in [*models][1:] if validate}
        costs = measure(models, batches, repeats=repeats, metrics=metrics)
    if format == "checkpoint" and slimmed is not None:
        content, left_out = _slim_checkpoint(saved, states, models["masked"], slimmed, model)
        notes += left_out
        if costs is not None:
            content[KEY]["costs"] = costs.to_json()
        with whole(path) as temporary:
            torch.save(content, temporary)
    elif format == "torch-export":
        to_torch_export(model, inputs, path)
    else:
        to_onnx(model, inputs, path, opset=opset)
        gap = check_onnx(path, model, inputs)
        notes.append(f"onnxruntime differs from torch by {gap:.1e}, relative to the outputs.")
        if batches:
            notes += _onnx_times(path, models["dense"], inputs, batches, opset, repeats)
    return Exported(path, costs, tuple(notes))


def _check_options(
    path: Path, source: str, format: str, recalibrate: int, validate: bool, opset: int | None, repeats: int
) -> None:
    if path.resolve() == Path(source).resolve():
        raise ValueError(f"--output {path} is the checkpoint itself: give another file")
    if opset is not None and format != "onnx":
        raise ValueError(f"--opset is of ONNX, the format is {format!r}: give --format onnx")
    for name, value in {"recalibrate": recalibrate, "repeats": repeats}.items():
        if value < 0:
            raise ValueError(f"--{name} must be 0 or more, got {value}")
    if validate and not repeats:
        raise ValueError("--validate shows its metrics beside the costs: give --repeats 1 or more")


def _models(
    module: LightningModule, saved: Any, states: Mapping[str, PruningState], path: str, inputs: Any
) -> tuple[dict[str, LightningModule], Slim | None]:
    """The dense, the masked and the slim model, as far as there are such; what was removed for the last."""
    models = {"dense": copy.deepcopy(module.eval())}
    kept = {name: mask for state in states.values() for name, mask in (state.masks or {}).items()}
    if KEY in saved:
        reshape_like_(module, saved["state_dict"], saved[KEY])
    elif not kept or Masks(kept).sparsity == 0:
        raise ValueError(f"{path} is not pruned: its masks keep everything; give a checkpoint after an event")
    try:
        module.load_state_dict(saved["state_dict"])
    except RuntimeError as error:
        raise ValueError(
            f"the weights of {path} do not fit {type(module).__name__} as it is configured: {error}"
        ) from error
    if KEY in saved:
        return models | {"slim": module}, None
    models["masked"] = module
    latest = [state.events[-1] for state in states.values() if state.events]
    # Rows can be empty in masks of single weights, too: what was pruned is told by the latest event.
    if not any("widths" in event for event in latest):
        return models, None
    declared = {name: group for event in latest for name, group in event.get("declared", {}).items()}
    slimmed = slim(module, Masks(kept), inputs, declared)
    return models | {"slim": cast(LightningModule, slimmed.model)}, slimmed


def _notes(models: Mapping[str, Any], slimmed: Slim | None, format: str, path: str) -> list[str]:
    """What a user should know of the models; refused is a checkpoint from which no channels were removed."""
    if slimmed is not None:
        return [f"{layer}: {why}" for layer, why in slimmed.still_masked.items()]
    if format == "checkpoint" and "slim" in models:
        raise ValueError(f"{path} is of a slim model already: give --format torch-export or onnx")
    if format == "checkpoint":
        raise ValueError(
            f"{path} has single weights pruned: there are no channels to remove, and it loads into the plain "
            "model; prune with granularity='channel', or give --format torch-export or onnx"
        )
    if "slim" in models:
        return []
    return ["Single weights are pruned: zeros in dense tensors take as much time as others."]


def _slim_checkpoint(
    saved: Any, states: Mapping[str, PruningState], masked: nn.Module, slimmed: Slim, model: nn.Module
) -> tuple[dict[str, Any], list[str]]:
    """The checkpoint with what is left, which Lightning can resume from, and a note on what is not in it."""
    notes = []
    trained = {name: p for name, p in masked.named_parameters() if p.requires_grad}
    try:
        optimizers = slim_optimizer_states(saved.get("optimizer_states", []), trained, slimmed.resizing)
    except ValueError as error:
        notes = [f"The optimizers' state was left out: {error}. Start a new fit from the weights."]
        optimizers = []
    modality_of = {name: SHARED for group in slimmed.channels.values() for name in group.producers}
    for state in states.values():
        modality_of |= state.group_of
    entry = slim_entry(slimmed.attributes, slimmed.widths, owners(slimmed.channels, modality_of))
    own = AlterMOMACallback.__name__
    callbacks = {key: each for key, each in saved.get("callbacks", {}).items() if not key.startswith(own)}
    changed = {"state_dict": model.state_dict(), "optimizer_states": optimizers, "callbacks": callbacks}
    return {**saved, **changed, KEY: entry}, notes


def _onnx_times(
    path: Path, dense: nn.Module, inputs: Any, batches: Mapping[int, Any], opset: int | None, repeats: int
) -> list[str]:
    """A line for each batch size: the latency beside that of the dense model, which is written for this."""
    notes, count = [], torch.get_num_threads()
    with TemporaryDirectory() as folder:
        files = {"dense": to_onnx(dense, inputs, Path(folder, "dense.onnx"), opset=opset), "file": path}
        for batch, example in batches.items():
            taken = time_onnx(files, example_tensors(dense, example), repeats)
            low, median, high = (1e3 * value for value in quartiles(taken["file"]))
            reference = 1e3 * quartiles(taken["dense"])[1]
            notes.append(
                f"onnxruntime, batch {batch}, {count} thread{'s' * (count != 1)}: {median:.2f} ms "
                f"[{low:.2f}, {high:.2f}], dense {reference:.2f} ms: {reference / median:.2f} times as fast."
            )
    return notes
