"""Camera-LiDAR fusion on synthetic scenes: what a criterion is for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lightning import Trainer
from lightning.pytorch import seed_everything

from altermoma_pl import AlterMOMACallback, Rewinding
from altermoma_pl.compare import Benchmark, Direction, Values
from examples.data.datamodule import DrivingData
from examples.data.scene import SceneOptions
from examples.grid import BEVGrid
from examples.models.evaluate import evaluate_views
from examples.models.fusion import SENSORS
from examples.models.module import FusionModule
from examples.models.views import VIEWS


@dataclass(frozen=True)
class Fusion(Benchmark):
    """The example model, pre-trained by sensor and fused, then pruned; measured by mIoU and AP.

    Values are named `miou`, `ap`, and `miou/camera_dropped` etc. for each failing sensor (see
    `examples.models.views`). Every seed has scenes, weights and an order of training of its own.

    Args:
        size: Of the model.
        image_size: Height and width of the images, multiples of 16.
        extent: Metres from the car forward, and half as many to each side.
        cell: Metres of a cell of the bird's-eye view.
        beams: Rows of the LiDAR. Few, so that it leaves something for the camera to add.
        columns: Rays of a row.
        num_train: Training frames.
        num_val: Validation frames.
        num_calibration: Frames to score on.
        batch_size: Frames per training batch.
        camera_epochs: Pre-training of the camera, which learns its depths from the LiDAR points.
        lidar_epochs: Pre-training of the LiDAR.
        fusion_epochs: Training of the fused model.
        pruning_batches: Batches of an epoch of pruning.
        learning_rate: Of all training before pruning.
        pruning_learning_rate: Of pruning and fine-tuning.
        accelerator: "cpu" or "cuda".
        precision: Of training, as a `Trainer` takes it. Metrics are always taken in float32.
        cache_dir: Folder of the synthetic scenes.
    """

    size: Literal["tiny", "small", "medium", "large"] = "tiny"
    image_size: tuple[int, int] = (48, 160)
    extent: float = 24.0
    cell: float = 1.0
    beams: int = 12
    columns: int = 96
    num_train: int = 512
    num_val: int = 96
    num_calibration: int = 64
    batch_size: int = 4
    camera_epochs: int = 8
    lidar_epochs: int = 10
    fusion_epochs: int = 5
    pruning_batches: int = 40
    learning_rate: float = 3e-3
    pruning_learning_rate: float = 2e-3
    accelerator: Literal["cpu", "cuda"] = "cpu"
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    cache_dir: str = field(default="~/.cache/altermoma_pl", repr=False)  # changes no result

    @property
    def modalities(self) -> Mapping[str, Sequence[str]]:
        """The two encoders."""
        return {sensor: [f"model.encoders.{sensor}"] for sensor in SENSORS}

    @property
    def metrics(self) -> Mapping[str, Direction]:
        """Mean IoU of the maps, average precision of the objects."""
        return {"miou": "higher", "ap": "higher"}

    def train_dense(self, seed: int, folder: Path) -> Values:
        """Each sensor alone, then both."""
        data, checkpoints, values = self.data(seed), {}, {}
        for sensor in SENSORS:
            seed_everything(seed, verbose=False)
            alone = self._module(
                data,
                sensors=[sensor],
                learning_rate=self.learning_rate,
                depth_weight=1.0 if sensor == "camera" else 0.0,
            )
            epochs = self.camera_epochs if sensor == "camera" else self.lidar_epochs
            self._fit(alone, data, epochs).save_checkpoint(folder / f"{sensor}.ckpt")
            checkpoints[sensor] = str(folder / f"{sensor}.ckpt")
            values |= _values(self._views(alone, data, ["both"]), f"{sensor}_alone")
        seed_everything(seed, verbose=False)
        fused = self._module(
            data, backbones=checkpoints, heads=checkpoints["lidar"], learning_rate=self.learning_rate
        )
        self._fit(fused, data, self.fusion_epochs).save_checkpoint(folder / "dense.ckpt")
        return _values(self._views(fused, data)) | values

    def prune(self, seed: int, folder: Path, callback: AlterMOMACallback, num_epochs: int) -> Values:
        """Prune and fine-tune the dense model, with one cycle of the learning rate, or one a round."""
        schedule = callback.schedule
        cycle = schedule.epochs_per_round if isinstance(schedule, Rewinding) else None
        data, model = self.data(seed), self.dense(seed, folder, cycle or num_epochs)
        self.fine_tune(model, data, num_epochs, [callback])
        return self.measure(model, data)

    def dense(self, seed: int, folder: Path, cycle: int) -> FusionModule:
        """The dense model, to be pruned and fine-tuned with cycles of the learning rate of so many epochs."""
        seed_everything(seed, verbose=False)
        return self._module(
            self.data(seed),
            weights=str(folder / "dense.ckpt"),
            learning_rate=self.pruning_learning_rate,
            decay_epochs=cycle,
        )

    def fine_tune(
        self, model: FusionModule, data: DrivingData, num_epochs: int, callbacks: Sequence[AlterMOMACallback]
    ) -> None:
        """Train a dense or pruned model for some epochs."""
        self._fit(model, data, num_epochs, callbacks, limit_train_batches=self.pruning_batches)

    def measure(self, model: FusionModule, data: DrivingData) -> Values:
        """All metrics, with both sensors and with each one failing."""
        return _values(self._views(model, data))

    def data(self, seed: int) -> DrivingData:
        """The scenes of a seed."""
        grid = BEVGrid(0.0, self.extent, -self.extent / 2, self.extent / 2, self.cell)
        data = DrivingData(
            num_train=self.num_train,
            num_val=self.num_val,
            num_calibration=self.num_calibration,
            image_size=self.image_size,
            batch_size=self.batch_size,
            seed=seed,
            cache_dir=self.cache_dir,
            grid=grid,
            eval_batch_size=32,
            options=SceneOptions(vivid=True, fault_share=0.2, beams=self.beams, columns=self.columns),
        )
        data.prepare_data()
        data.setup()
        return data

    def _views(
        self, module: FusionModule, data: DrivingData, views: Sequence[str] = tuple(VIEWS)
    ) -> dict[str, dict[str, float]]:
        """View -> metric -> value, measured where the model was trained: a Trainer moves it to the CPU."""
        module.to("cpu" if self.accelerator == "cpu" else "cuda")
        return evaluate_views(module.model, data.val_dataloader(), views)

    def _module(self, data: DrivingData, **options: Any) -> FusionModule:
        return FusionModule(
            size=self.size,
            num_map_classes=len(data.map_classes),
            map_classes=list(data.map_classes),
            image_size=self.image_size,
            grid=data.grid,
            **options,
        )

    def _fit(
        self,
        model: FusionModule,
        data: DrivingData,
        num_epochs: int,
        callbacks: Sequence[AlterMOMACallback] = (),
        limit_train_batches: int | None = None,
    ) -> Trainer:
        trainer = Trainer(
            max_epochs=num_epochs,
            accelerator=self.accelerator,
            devices=1,
            precision=self.precision,
            callbacks=list(callbacks),
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            num_sanity_val_steps=0,
            limit_train_batches=limit_train_batches,
            limit_val_batches=0,
            gradient_clip_val=10.0,
        )
        trainer.fit(model, datamodule=data)
        return trainer


def _values(views: Mapping[str, Mapping[str, float]], suffix: str = "") -> Values:
    """View -> metric -> value, flat: `miou` for both sensors, `miou/camera_dropped` and so on."""
    values = {}
    for view, metrics in views.items():
        name = suffix or ("" if view == "both" else view.replace(" ", "_").lower())
        values |= {f"{metric}/{name}" if name else metric: value for metric, value in metrics.items()}
    return values
