"""`altermoma export`: from a checkpoint of a pruned run to a smaller model, as a file, with what it costs."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn

from altermoma_pl.callback import AlterMOMACallback
from altermoma_pl.checkpoints import load_checkpoint, pruning_states_of
from altermoma_pl.costs import CostReport, measure
from altermoma_pl.export import check_onnx, example_tensors, to_onnx, to_torch_export
from altermoma_pl.masks import Masks
from altermoma_pl.structured.rebuilding import KEY, slim_entry, slim_optimizer_states
from altermoma_pl.structured.recalibration import recalibrate_
from altermoma_pl.structured.slimming import Slim, slim

Format = Literal["checkpoint", "torch-export", "onnx"]
SUFFIXES = {"checkpoint": ".slim.ckpt", "torch-export": ".pt2", "onnx": ".onnx"}


@dataclass(frozen=True)
class Exported:
    """What was written.

    Args:
        path: The file.
        costs: Dense, masked and, where channels were removed, slim; None if not measured.
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

    Args:
        checkpoint: Saved by a Trainer with `AlterMOMACallback`.
        config: YAML file with `model` and, for example inputs, `data`, each as class_path and init_args; what
            else it holds is not read. Without `data` the module needs an `example_input_array`.
        format: "checkpoint", which Lightning resumes from (see `Slimmed`), "torch-export" or "onnx".
        output: The file; None for the checkpoint's name with another ending.
        recalibrate: Number of training batches on which running statistics of batch norms are measured anew.
        validate: Whether to validate the masked and the slim model, before and after `recalibrate`.
        opset: Of ONNX; None for the exporter's.
        repeats: Of each latency; 0 to measure no costs.
        trust: Load objects other than tensors and builtins too, which can run code.

    Raises:
        ModuleNotFoundError: Where an extra is missing.
        ValueError: If the checkpoint was not pruned or is damaged, the configuration names no model, inputs
            are missing or refused, or the model cannot be slimmed or exported.
    """
    saved = load_checkpoint(checkpoint, trust)
    masks = _all_masks(saved, checkpoint)
    module, data = load_run(config)
    inputs = _example_inputs(module, data)
    dense = copy.deepcopy(module)
    _load(module, saved, checkpoint)
    module.eval()
    notes: list[str] = []
    slimmed = _slim(module, masks, inputs, format, notes)
    model = slimmed.model if slimmed else module
    metrics = {"masked": _metrics(module, data, validate)}
    if slimmed:
        metrics["slim"] = _metrics(model, data, validate)
        notes += [f"{path}: {why}" for path, why in slimmed.still_masked.items()]
    if recalibrate:
        _recalibrate(model, data, recalibrate)
        after = _metrics(model, data, validate)
        metrics["slim" if slimmed else "masked"] |= {f"{k}, recalibrated": v for k, v in after.items()}
    costs = None
    if repeats:
        models = {"dense": dense.eval(), "masked": module} | ({"slim": model} if slimmed else {})
        costs = measure(models, {_batch_size(module, inputs): inputs}, repeats=repeats, metrics=metrics)
    path = Path(output) if output else Path(checkpoint).with_suffix(SUFFIXES[format])
    path.parent.mkdir(parents=True, exist_ok=True)
    if format == "checkpoint":
        assert slimmed is not None  # noqa: S101 (_slim raises)
        torch.save(_slim_checkpoint(saved, module, slimmed, costs, notes), path)
    elif format == "torch-export":
        to_torch_export(model, inputs, path)
    else:
        to_onnx(model, inputs, path, opset=opset)
        gap = check_onnx(path, model, inputs)
        notes.append(f"onnxruntime differs from torch by {gap:.1e}, relative to the outputs.")
    return Exported(path, costs, tuple(notes))


def load_run(config: str) -> tuple[LightningModule, LightningDataModule | None]:
    """The module and, where there is one, the datamodule of a YAML file, made anew.

    Raises:
        ValueError: If the file names no model, or arguments do not fit.
    """
    import yaml
    from jsonargparse import ArgumentError, ArgumentParser

    content = yaml.safe_load(Path(config).read_text())
    if not isinstance(content, dict) or "model" not in content:
        raise ValueError(f"{config} names no model: it needs `model:` with class_path and init_args")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningModule, "model", required=True)
    parser.add_subclass_arguments(LightningDataModule, "data", required=False)
    try:
        options = parser.parse_object({key: content[key] for key in ("model", "data") if content.get(key)})
    except ArgumentError as error:
        raise ValueError(f"{config}: {error}") from error
    made = parser.instantiate(options)
    return made.model, made.get("data")


def _all_masks(saved: dict[str, Any], path: str) -> Masks:
    masks: dict[str, Tensor] = {}
    for state in pruning_states_of(saved, path).values():
        masks |= dict(state.masks or {})
    merged = Masks(masks)
    if not masks or merged.sparsity == 0:
        raise ValueError(f"{path} is not pruned: its masks keep everything; give a checkpoint after an event")
    return merged


def _load(module: LightningModule, saved: Mapping[str, Any], path: str) -> None:
    try:
        module.load_state_dict(saved["state_dict"])
    except RuntimeError as error:
        raise ValueError(
            f"the weights of {path} do not fit {type(module).__name__} as it is configured: {error}"
        ) from error


def _example_inputs(module: LightningModule, data: LightningDataModule | None) -> tuple[Any, ...]:
    if data is not None:
        data.prepare_data()
        data.setup("fit")
        loader = data.val_dataloader()
        loader = loader[0] if isinstance(loader, (list, tuple)) else loader
        return (next(iter(loader)),)
    array = module.example_input_array
    if array is None:
        raise ValueError(
            f"example inputs are missing: give `data:` in the configuration, or {type(module).__name__} an "
            f"attribute `example_input_array`"
        )
    return tuple(array) if isinstance(array, (tuple, list)) else (array,)


def _batch_size(module: nn.Module, inputs: tuple[Any, ...]) -> int:
    return len(next(iter(example_tensors(module, inputs).values())))


def _slim(
    module: LightningModule, masks: Masks, inputs: tuple[Any, ...], target: Format, notes: list[str]
) -> Slim | None:
    """The smaller model; None where masks are not of channels, and zeros stay where they are."""
    if any(not bool(mask.any()) or _has_empty_rows(mask) for mask in masks.values() if mask.ndim > 1):
        return slim(module, masks, inputs)
    if target == "checkpoint":
        raise ValueError(
            "the masks are of single weights: there are no channels to remove, and the checkpoint itself "
            "loads into the plain model; prune with the granularity 'channel'"
        )
    notes.append(
        "The masks are of single weights: zeros in dense tensors take as much time as other numbers."
    )
    return None


def _has_empty_rows(mask: Tensor) -> bool:
    return not bool(mask.flatten(1).any(1).all())


def _metrics(module: nn.Module, data: LightningDataModule | None, wanted: bool) -> dict[str, float]:
    if not wanted:
        return {}
    if data is None:
        raise ValueError("--validate needs `data:` in the configuration")
    trainer = Trainer(
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        accelerator="cpu",
    )  # fmt: skip
    results = trainer.validate(module, datamodule=data, verbose=False)  # type: ignore[arg-type]
    return {key: value for result in results for key, value in result.items()}


def _recalibrate(model: nn.Module, data: LightningDataModule | None, count: int) -> None:
    if data is None:
        raise ValueError("--recalibrate needs `data:` in the configuration, for training batches")
    batches = itertools.islice(data.train_dataloader(), count)
    recalibrate_(model, batches, lambda module, batch: module(batch))


def _slim_checkpoint(
    saved: dict[str, Any], module: LightningModule, slimmed: Slim, costs: CostReport | None, notes: list[str]
) -> dict[str, Any]:
    """The checkpoint with what is left, which Lightning can resume from."""
    entry = slim_entry(slimmed.attributes, slimmed.widths)
    if costs is not None:
        entry["costs"] = costs.to_json()
    new = {**saved, "state_dict": slimmed.model.state_dict(), KEY: entry}
    new["callbacks"] = {
        key: value
        for key, value in saved.get("callbacks", {}).items()
        if not key.startswith(AlterMOMACallback.__name__)
    }
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    try:
        new["optimizer_states"] = slim_optimizer_states(
            saved.get("optimizer_states", []), trained, slimmed.resizing
        )
    except ValueError as error:
        notes.append(f"The optimizers' state was left out: {error}. Start a new fit from the weights.")
        new["optimizer_states"] = []
    return new
