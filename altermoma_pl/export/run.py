"""What a configuration names: the module, and the batches that it is shown."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from altermoma_pl.export.program import example_tensors, map_inputs
from altermoma_pl.model.contexts import modes_restored
from altermoma_pl.model.inputs import as_arguments

MAX_METRICS = 8


@dataclass(frozen=True, eq=False)
class Run:
    """A module and, where there is one, its datamodule, both made anew.

    Args:
        module: With the weights it is made with.
        data: Set up for "fit".
    """

    module: LightningModule
    data: LightningDataModule | None

    @classmethod
    def load(cls, config: str) -> Run:
        """From a YAML file with `model` and, if wanted, `data`.

        Raises:
            ValueError: If the file is no YAML or names no model, or arguments do not fit.
        """
        import yaml
        from jsonargparse import ArgumentError, ArgumentParser

        try:
            content = yaml.safe_load(Path(config).read_text())
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{config} is no YAML: {error}") from error
        if not isinstance(content, dict) or not content.get("model"):
            raise ValueError(f"{config} names no model: it needs `model:` with class_path and init_args")
        parser = ArgumentParser(exit_on_error=False)
        parser.add_subclass_arguments(LightningModule, "model", required=True)
        parser.add_subclass_arguments(LightningDataModule, "data", required=False)
        wanted = {key: content[key] for key in ("model", "data") if content.get(key)}
        try:
            options = parser.parse_object(wanted)
        except ArgumentError as error:
            raise ValueError(f"{config}: {error}") from error
        made = parser.instantiate(options)
        data = made.get("data")
        if data is not None:
            data.prepare_data()
            data.setup("fit")
        return cls(made.model, data)

    def example_inputs(self) -> tuple[Any, ...]:
        """The arguments of `forward`: of the module's `example_input_array`, or its first validation batch.

        Raises:
            ValueError: If there is neither.
        """
        if self.module.example_input_array is not None:
            return as_arguments(self.module.example_input_array)
        if self.data is None:
            raise ValueError(
                f"example inputs are missing: give `data:` in the configuration, or "
                f"{type(self.module).__name__} an attribute `example_input_array`"
            )
        return (next(iter(self._val_loader())),)

    def inputs_of(self, sizes: Sequence[int]) -> dict[int, tuple[Any, ...]]:
        """Batch size -> arguments of `forward`, of these sizes where batches can be made anew.

        That is where `example_input_array` is of tensors with one first dimension, of which items are then
        left out or repeated, or where a `DataLoader` batches by itself (a size beyond the dataset's is cut to
        it). Elsewhere there is one entry: `example_inputs` by the first dimension of its first tensor.
        """
        inputs = self.example_inputs()
        tensors = [*example_tensors(self.module, inputs).values()]
        lengths = {len(tensor) if tensor.ndim else 0 for tensor in tensors}
        if self.module.example_input_array is None:
            loader = self._val_loader()
            if isinstance(loader, DataLoader) and loader.batch_sampler is not None:
                data, collate = loader.dataset, loader.collate_fn
                largest = len(data) if hasattr(data, "__len__") else max(sizes)
                within = dict.fromkeys(min(size, largest) for size in sizes)
                return {n: (next(iter(DataLoader(data, n, collate_fn=collate))),) for n in within}
        elif len(lengths) == 1 and 0 not in lengths:
            return {size: map_inputs(self.module, inputs, partial(_resized, size)) for size in sizes}
        return {max(1, len(tensors[0])) if tensors[0].ndim else 1: inputs}

    def _val_loader(self) -> Any:
        assert self.data is not None  # noqa: S101 (`example_inputs` refuses it)
        loader = self.data.val_dataloader()
        return loader[0] if isinstance(loader, (list, tuple)) else loader

    def validated(self, model: LightningModule) -> dict[str, float]:
        """What a model logs in validation: what is meant for the progress bar, or else the first few."""
        extras = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
        off: dict[str, Any] = dict.fromkeys(extras, False)
        trainer = Trainer(accelerator="cpu", **off)
        # A copy, since a Trainer leaves itself in the module.
        results = trainer.validate(copy.deepcopy(model), datamodule=self.data, verbose=False)
        logged = {key: value for result in results for key, value in result.items()}
        shown = [key for key in logged if key in trainer.progress_bar_metrics]
        return {key: logged[key] for key in shown or [*logged][:MAX_METRICS]}

    def recalibrated(self, model: LightningModule, num_batches: int) -> LightningModule:
        """A copy with running statistics of batch norms measured anew on training batches.

        Batches go through `predict_step`, by default `forward`.

        Raises:
            ValueError: If the model does not accept the batches, there are none, or it has no batch norm.
        """

        def predict(module: Any, batch: Any) -> Any:
            try:
                return module.predict_step(batch, 0)
            except Exception as error:  # of the user's code
                raise ValueError(
                    f"{type(module).__name__} does not accept a training batch: {type(error).__name__}: "
                    f"{error}; give it a `predict_step(batch, batch_idx)` that takes what of the batch "
                    "`forward` needs"
                ) from error

        assert self.data is not None  # noqa: S101 (`export` refuses it)
        model = copy.deepcopy(model)
        recalibrate_(model, itertools.islice(self.data.train_dataloader(), num_batches), predict)
        return model


def _resized(size: int, _: str, tensor: Tensor) -> Tensor:
    return tensor[torch.arange(size, device=tensor.device) % len(tensor)]


@torch.no_grad()
def recalibrate_(model: nn.Module, batches: Iterable[Any], forward: Callable[[Any, Any], Any]) -> int:
    """Set running means and variances of batch norms to the mean over batches, and count these.

    In place. Nothing is trained, and all else runs in evaluation mode meanwhile. Ten training batches were
    enough elsewhere (openvinotoolkit/nncf#41).

    Raises:
        ValueError: If no layer has running statistics, or there is no batch.
    """
    kind = nn.modules.batchnorm._BatchNorm
    norms = [m for m in model.modules() if isinstance(m, kind) and m.running_mean is not None]
    if not norms:
        raise ValueError(f"{type(model).__name__} has no batch norm with running statistics to measure anew")
    momenta = {norm: norm.momentum for norm in norms}
    count = 0
    try:
        with modes_restored(model):
            model.eval()
            for norm in norms:
                norm.train()
                norm.momentum = None  # the mean over all batches, rather than a moving one
            for count, batch in enumerate(batches, 1):
                if count == 1:
                    for norm in norms:
                        norm.reset_running_stats()
                forward(model, batch)
    finally:
        for norm, momentum in momenta.items():
            norm.momentum = momentum
    if count == 0:
        raise ValueError("there is no batch to measure running statistics on")
    return count
