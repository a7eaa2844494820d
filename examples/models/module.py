"""The fusion model as a LightningModule."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from lightning import LightningModule
from torch import Tensor, nn

from altermoma_pl.metrics import BEVIoU, CentreDistanceAP
from examples.data.batch import CLASSES, Batch
from examples.grid import BEVGrid
from examples.models.evaluate import update_metrics
from examples.models.fusion import DEFAULT_GRID, SENSORS, FusionModel, FusionOutput
from examples.models.pretrained import load_encoder, load_heads, load_model

WARM_UP_SHARE = 0.1


class FusionModule(LightningModule):
    """Trains `FusionModel` on objects and maps.

    Logs `train/loss` with its parts and, under `val/` and `test/`, `loss`, `miou`, `ap` and the
    value of each class.

    Args:
        sensors: Which of "camera" and "lidar" the model sees; one of them for pre-training.
        size: "tiny" for benchmarks, "small" and "medium" for a CPU, "large" for a GPU.
        num_map_classes: Number of map classes S of the batches.
        map_classes: Their names in the log; numbers if left out.
        learning_rate: Peak learning rate, after a linear warm-up and before a cosine decay to 0.
        decay_epochs: Length of one cycle of warm-up and decay in epochs. After it the next one begins, so
            that every round of a run that rewinds its weights sees the same. None: one cycle over the
            whole training.
        weight_decay: Of AdamW.
        depth_weight: Weight of a loss that has the camera's depths explain the LiDAR points, 0 for none;
            for pre-training the camera.
        backbones: Checkpoint of a single-sensor run per sensor, from which the encoder is loaded.
        heads: Checkpoint of a single-sensor run, from which decoder and heads are loaded.
        weights: Checkpoint of a run of the same model, from which all weights are loaded.
        image_size: (height, width) of the images, multiples of 16.
        grid: Cells of the bird's-eye view.

    Raises:
        ValueError: An argument is out of range or a checkpoint does not fit.
    """

    def __init__(
        self,
        sensors: Sequence[str] = SENSORS,
        size: Literal["tiny", "small", "medium", "large"] = "small",
        num_map_classes: int = 1,
        map_classes: list[str] | None = None,
        learning_rate: float = 1e-3,
        decay_epochs: int | None = None,
        weight_decay: float = 0.01,
        depth_weight: float = 0.0,
        backbones: dict[str, str] | None = None,
        heads: str | None = None,
        weights: str | None = None,
        image_size: tuple[int, int] = (96, 320),
        grid: BEVGrid = DEFAULT_GRID,
    ) -> None:
        super().__init__()
        names = map_classes or [str(number) for number in range(num_map_classes)]
        if len(names) != num_map_classes:
            raise ValueError(
                f"map_classes must name {num_map_classes} classes (num_map_classes), got {names}."
            )
        if decay_epochs is not None and decay_epochs < 1:
            raise ValueError(f"decay_epochs must be at least 1, or None for one cycle, got {decay_epochs}.")
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.decay_epochs = decay_epochs
        self.depth_weight = depth_weight
        self.map_classes = names
        self.model = FusionModel(sensors, size, len(CLASSES), num_map_classes, image_size, grid)
        for sensor, path in (backbones or {}).items():
            load_encoder(self.model, sensor, path)
        if heads is not None:
            load_heads(self.model, heads)
        if weights is not None:
            load_model(self.model, weights)
        self.metrics = nn.ModuleDict(
            {
                stage: nn.ModuleDict({"miou": BEVIoU(num_map_classes), "ap": CentreDistanceAP(len(CLASSES))})
                for stage in ("val", "test")
            }
        )

    def forward(self, batch: Batch) -> FusionOutput:
        """Predict every map of the batch."""
        return self.model(batch)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Scalars `loss` and its parts `heatmap`, `regression`, `map` and, weighted, `depth` if asked for.

        Needs no Trainer.
        """
        output = self.model(batch)
        losses = self.model.loss(output, batch)
        if self.depth_weight:
            losses["depth"] = self.depth_weight * self.model.depth_loss(output, batch)
            losses["loss"] = losses["loss"] + losses["depth"]
        return losses

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Log the losses and return their sum."""
        losses = self.loss(batch)
        self._log_losses("train", losses, batch)
        return losses["loss"]

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log the losses and update the metrics."""
        self._evaluate("val", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Log the losses and update the metrics."""
        self._evaluate("test", batch)

    def on_validation_epoch_end(self) -> None:
        """Log the metrics."""
        self._log_metrics("val")

    def on_test_epoch_end(self) -> None:
        """Log the metrics."""
        self._log_metrics("test")

    def configure_optimizers(self) -> Any:
        """AdamW with a warm-up and, where the number of steps is known, a cosine decay, or cycles of both."""
        optimizer = torch.optim.AdamW(
            self.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay
        )
        repeat = self.decay_epochs is not None
        factor = partial(learning_rate_factor, num_steps=self._cycle(), repeat=repeat)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def _cycle(self) -> float:
        """Optimizer steps of one cycle of the learning rate."""
        total = self.trainer.estimated_stepping_batches  # makes the loader, whose length is used below
        if self.decay_epochs is None:
            return total
        batches = self.trainer.num_training_batches / self.trainer.accumulate_grad_batches
        return self.decay_epochs * math.ceil(batches) if math.isfinite(batches) else batches

    def _evaluate(self, stage: str, batch: Batch) -> None:
        output = self.model(batch)
        self._log_losses(stage, self.model.loss(output, batch), batch)
        metrics = self.metrics[stage]
        update_metrics(self.model, output, batch, metrics["miou"], metrics["ap"])

    def _log_losses(self, stage: str, losses: dict[str, Tensor], batch: Batch) -> None:
        values = {f"{stage}/{name}": value.detach() for name, value in losses.items()}
        size = len(batch.image)
        self.log_dict(values, batch_size=size, sync_dist=stage != "train")

    def _log_metrics(self, stage: str) -> None:
        names = {"miou": self.map_classes, "ap": CLASSES}
        for name, metric in self.metrics[stage].items():
            self.log(f"{stage}/{name}", metric.compute(), prog_bar=True, sync_dist=True)
            for kind, value in zip(names[name], metric.per_class(), strict=True):
                if not value.isnan():  # absent classes
                    self.log(f"{stage}/{name}_{kind}", value, sync_dist=True)
            metric.reset()


def learning_rate_factor(step: int, num_steps: float, repeat: bool = False) -> float:
    """Share of the peak learning rate at a step, in (0, 1] before the last step.

    Args:
        step: From 0.
        num_steps: Length of the training, or of a cycle; infinite for no decay.
        repeat: Whether step `num_steps`, where the cosine ends at 0, is step 0 of the next cycle.
    """
    if repeat and math.isfinite(num_steps):
        step = step % int(num_steps)
    warm_up = min(100.0, WARM_UP_SHARE * num_steps)
    if step < warm_up:
        return (step + 1) / (warm_up + 1)
    if math.isinf(num_steps):
        return 1.0
    progress = min(1.0, (step - warm_up) / max(1.0, num_steps - warm_up))
    return (1 + math.cos(math.pi * progress)) / 2
