"""A problem whose redundancy is known: does a score find it?

Three hidden vectors make the target: one that both sensors see, and one that only the camera or only the
LiDAR sees. Each sensor's tower has one sub-tower for what both see and one for what it sees alone. The
camera's view of the shared vector is the noisier one, so once the two are fused, the camera's shared
sub-tower is redundant, by construction, and its private sub-tower is not.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch import seed_everything
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics.functional.classification import binary_auroc

from altermoma_pl import AlterMOMACallback, Calibration, Rewinding
from altermoma_pl.compare import Benchmark, Direction, Values

LATENT, OBSERVED, TARGETS = 4, 16, 8
SENSORS, PARTS = ("camera", "lidar"), ("shared", "private")
# What each sensor observes, in the order of a batch.
VIEWS = tuple((sensor, part) for sensor in SENSORS for part in PARTS)
PRIVATE_NOISE = 0.05
BATCH_SIZE = 128
WEIGHT_DECAY = 1e-4


class PlantedData:
    """Batches ((B, 16) for each of `VIEWS`, target (B, 8)), the same each time they are iterated.

    Args:
        seed: Of the world: how hidden vectors become observations and targets.
        split: Tells batches of one world apart.
        num_batches: Length.
        redundancy: Correlation of what the LiDAR sees with the shared vector, which has unit variance.
        noise: Standard deviation of the noise on the shared vector, by sensor.
    """

    def __init__(
        self, seed: int, split: int, num_batches: int, redundancy: float, noise: Mapping[str, float]
    ) -> None:
        world = torch.Generator().manual_seed(seed)
        self.mixing = [_normal(LATENT, OBSERVED, generator=world) / LATENT**0.5 for _ in VIEWS]
        self.hidden = _normal(3 * LATENT, 32, generator=world) / (3 * LATENT) ** 0.5
        self.output = _normal(32, TARGETS, generator=world) / 32**0.5
        self.seed, self.split, self.num_batches = seed, split, num_batches
        self.redundancy, self.noise = redundancy, noise

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        draws = torch.Generator().manual_seed(1000 * self.seed + self.split + 1)
        for _ in range(self.num_batches):
            yield self._batch(draws)

    def _batch(self, draws: torch.Generator) -> tuple[Tensor, ...]:
        shared, camera, lidar, other = (_normal(BATCH_SIZE, LATENT, generator=draws) for _ in range(4))
        seen_by_lidar = self.redundancy * shared + (1 - self.redundancy**2) ** 0.5 * other
        hidden = {("camera", "shared"): shared, ("camera", "private"): camera}
        hidden |= {("lidar", "shared"): seen_by_lidar, ("lidar", "private"): lidar}
        observed = []
        for (sensor, part), mixing in zip(VIEWS, self.mixing, strict=True):
            noise = self.noise[sensor] if part == "shared" else PRIVATE_NOISE
            vector = hidden[sensor, part] + noise * _normal(BATCH_SIZE, LATENT, generator=draws)
            observed.append((vector @ mixing).tanh())
        target = 2 * torch.tanh(torch.cat([shared, camera, lidar], 1) @ self.hidden) @ self.output
        return (*observed, target)


class PlantedNet(nn.Module):
    """Towers of two sub-towers each, and a head on what they see.

    Args:
        sensors: Which towers there are.
        width: Hidden units of a sub-tower.
    """

    def __init__(self, sensors: Sequence[str] = SENSORS, width: int = 32) -> None:
        super().__init__()
        for sensor in sensors:
            parts = {part: _mlp(OBSERVED, width, 8) for part in PARTS}
            setattr(self, sensor, nn.ModuleDict(parts))
        self.sensors = tuple(sensors)
        self.head = _mlp(2 * 8 * len(sensors), 2 * width, TARGETS)

    def forward(self, *observed: Tensor) -> Tensor:
        """(B, 16) for each of `VIEWS` -> (B, 8)."""
        towers = (
            getattr(self, sensor)[part](x)
            for (sensor, part), x in zip(VIEWS, observed, strict=True)
            if sensor in self.sensors
        )
        return self.head(torch.cat(list(towers), dim=1))


class PlantedModule(LightningModule):
    """Regression with AdamW and a cosine decay over `cycle` steps.

    Args:
        net: The net.
        learning_rate: Its peak.
        cycle: Length of one decay in steps; it starts anew after that.
        calibration: Batches to score on.
    """

    def __init__(self, net: PlantedNet, learning_rate: float, cycle: int, calibration: PlantedData) -> None:
        super().__init__()
        self.net, self.learning_rate, self.cycle, self.calibration = net, learning_rate, cycle, calibration

    def calibration_dataloader(self) -> PlantedData:
        """Batches to score on."""
        return self.calibration

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        """Mean squared error."""
        return mean_squared_error(self, batch)

    def configure_optimizers(self) -> dict[str, object]:
        """AdamW; the decay is by step."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.learning_rate, weight_decay=WEIGHT_DECAY)
        schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, self.cycle)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@dataclass(frozen=True)
class Planted(Benchmark):
    """Planted redundancy: the area under the ROC curve for finding it, and the loss after pruning.

    `auc` is that of a criterion's scores of the dense model for telling the camera's private weights (to
    be kept) from its shared ones (redundant): 0.5 is chance, 1 is perfect.

    Args:
        redundancy: Correlation of what the LiDAR sees with the shared vector, in [0, 1]. At 0 it does not
            see it, and nothing is redundant.
        camera_noise: Of the camera on the shared vector, whose entries have a standard deviation of 1.
        lidar_noise: Of the LiDAR on it.
        width: Hidden units of a sub-tower.
        num_steps: Of each sensor's pre-training, and of fusion.
        steps_per_epoch: Of pruning.
        learning_rate: Of training; pruning takes half of it.

    Raises:
        ValueError: If `redundancy` is outside [0, 1].
    """

    redundancy: float = 1.0
    camera_noise: float = 0.6
    lidar_noise: float = 0.05
    width: int = 32
    num_steps: int = 700
    steps_per_epoch: int = 50
    learning_rate: float = 3e-3

    def __post_init__(self) -> None:
        if not 0 <= self.redundancy <= 1:
            raise ValueError(f"redundancy must be in [0, 1], got {self.redundancy}")

    @property
    def modalities(self) -> Mapping[str, Sequence[str]]:
        """The two towers."""
        return {sensor: [f"net.{sensor}"] for sensor in SENSORS}

    @property
    def metrics(self) -> Mapping[str, Direction]:
        """Does the score find the redundancy, and how good is the pruned net?"""
        return {"auc": "higher", "loss": "lower"}

    def data(self, seed: int, split: int, num_batches: int) -> PlantedData:
        """Batches of the world of a seed."""
        noise = {"camera": self.camera_noise, "lidar": self.lidar_noise}
        return PlantedData(seed, split, num_batches, self.redundancy, noise)

    def train_dense(self, seed: int, folder: Path) -> Values:
        """Pre-train each tower alone, fuse, train on."""
        seed_everything(seed, verbose=False)
        fused, values = PlantedNet(width=self.width), {}
        for split, sensor in enumerate(SENSORS):
            alone = PlantedNet([sensor], self.width)
            values[f"loss/{sensor}_alone"] = self._train(alone, seed, split)
            getattr(fused, sensor).load_state_dict(getattr(alone, sensor).state_dict())
        values["loss"] = self._train(fused, seed, split=2)
        torch.save(fused.state_dict(), folder / "dense.pt")
        return values

    def prune(self, seed: int, folder: Path, callback: AlterMOMACallback, num_epochs: int) -> Values:
        """Score the dense net for the area, then prune and fine-tune."""
        net = PlantedNet(width=self.width)
        net.load_state_dict(torch.load(folder / "dense.pt", weights_only=True))
        seed_everything(seed, verbose=False)
        schedule = callback.schedule
        epochs = schedule.epochs_per_round if isinstance(schedule, Rewinding) else num_epochs
        cycle = self.steps_per_epoch * epochs
        module = PlantedModule(net, self.learning_rate / 2, cycle, self.data(seed, 4, 64))
        auc = self._area(module, seed, callback)
        _trainer([callback], num_epochs).fit(module, self.data(seed, 3, self.steps_per_epoch))
        return {"auc": auc, "loss": self._loss(net, seed)}

    def _area(self, module: PlantedModule, seed: int, callback: AlterMOMACallback) -> float:
        calibration = Calibration(
            module,
            mean_squared_error,
            module.calibration,
            self.data(seed, 3, self.steps_per_epoch),
            self.modalities,
            seed=seed,
        )
        scores = callback.criterion.score(calibration)
        kinds = {part: [s.flatten() for n, s in scores.items() if f"camera.{part}." in n] for part in PARTS}
        redundant, needed = torch.cat(kinds["shared"]), torch.cat(kinds["private"])
        label = torch.cat([torch.zeros(len(redundant)), torch.ones(len(needed))]).int()
        # By rank: torchmetrics would squash values outside [0, 1] by a sigmoid, which makes ties.
        order = torch.cat([redundant, needed]).double().unique(return_inverse=True)[1]
        return float(binary_auroc(order / max(1, int(order.max())), label))

    def _train(self, net: PlantedNet, seed: int, split: int) -> float:
        optimizer = torch.optim.AdamW(net.parameters(), lr=self.learning_rate, weight_decay=WEIGHT_DECAY)
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.num_steps)
        for *observed, target in self.data(seed, split, self.num_steps):
            optimizer.zero_grad()
            functional.mse_loss(net(*observed), target).backward()
            optimizer.step()
            decay.step()
        return self._loss(net, seed)

    @torch.no_grad()
    def _loss(self, net: PlantedNet, seed: int) -> float:
        losses = [functional.mse_loss(net(*x), y) for *x, y in self.data(seed, 5, 32)]
        return float(torch.stack(losses).mean())


def mean_squared_error(module: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    """Loss of a `PlantedModule` on a batch."""
    *observed, target = batch
    return functional.mse_loss(module.net(*observed), target)


def _mlp(inputs: int, width: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, outputs)
    )


def _trainer(callbacks: list[Callback], num_epochs: int) -> Trainer:
    return Trainer(
        max_epochs=num_epochs,
        accelerator="cpu",
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )


def _normal(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=generator)
