"""The LightningDataModule of the examples: synthetic or real driving data, by one argument."""

from pathlib import Path

import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader

from examples.data.dataset import DrivingDataset, EpochSampler, Frame, collate
from examples.data.geometry import OBJECT_MAPS
from examples.data.kitti import read_split
from examples.data.scene import SceneOptions
from examples.data.synthetic import STATIC_MAPS, SyntheticConfig, generate
from examples.grid import BEVGrid


class DrivingData(LightningDataModule):
    """Batches of camera images, LiDAR points, boxes and maps.

    Three splits: `train` and `val`, and `calibration`, on which scores are measured: the first
    frames of the training list, held out from training. Training frames come in an order that
    depends only on the seed and the epoch, on one device.

    Args:
        root: A KITTI root, which holds `training/` and `ImageSets/`. None: synthetic data, made on
            first use and cached.
        num_train: Training frames; of a KITTI root, at most so many.
        num_val: Validation frames; of a KITTI root, at most so many.
        num_calibration: Calibration frames.
        image_size: Height and width of the images; real ones are resized.
        batch_size: Frames per batch. An incomplete last training batch is dropped.
        eval_batch_size: Of validation; None for `batch_size`. Calibration keeps `batch_size`, by which
            the criteria count.
        num_workers: Loader processes. Each keeps its own decoded frames: with data that fit in
            memory, 0 is best.
        seed: Of the synthetic data, the training order and the flips.
        cache_dir: Folder of the synthetic data.
        grid: Grid of the maps.
        flip: Whether to mirror half of the training frames left to right.
        options: Of the synthetic scenes and sensors.
    """

    def __init__(
        self,
        root: str | None = None,
        num_train: int = 512,
        num_val: int = 128,
        num_calibration: int = 64,
        image_size: tuple[int, int] = (96, 320),
        batch_size: int = 4,
        num_workers: int = 0,
        seed: int = 0,
        cache_dir: str = "~/.cache/altermoma_pl",
        grid: BEVGrid = BEVGrid(),  # noqa: B008 (frozen)
        flip: bool = True,
        eval_batch_size: int | None = None,
        options: SceneOptions = SceneOptions(),  # noqa: B008 (frozen)
    ) -> None:
        super().__init__()
        counts = {
            "num_train": num_train,
            "num_val": num_val,
            "num_calibration": num_calibration,
            "batch_size": batch_size,
            "eval_batch_size": batch_size if eval_batch_size is None else eval_batch_size,
        }
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"{name} must be 1 or more, got {value}")
        if num_train < batch_size:
            raise ValueError(
                f"num_train must be at least batch_size = {batch_size}, got {num_train}: an "
                "incomplete training batch is dropped"
            )
        if flip and grid.y_min != -grid.y_max:
            raise ValueError(
                f"flip=True needs a grid that is symmetric in y, got y from {grid.y_min} to "
                f"{grid.y_max}; make it symmetric or pass flip=False"
            )
        self.root = root
        self.num_train = num_train
        self.num_val = num_val
        self.num_calibration = num_calibration
        self.image_size = (image_size[0], image_size[1])
        self.batch_size = batch_size
        self.eval_batch_size = counts["eval_batch_size"]
        self.num_workers = num_workers
        self.seed = seed
        self.cache_dir = cache_dir
        self.grid = grid
        self.flip = flip
        self.options = options
        self._datasets: dict[str, DrivingDataset] = {}

    @property
    def map_classes(self) -> tuple[str, ...]:
        """Names of the segmentation maps, in order. KITTI has no maps of the ground."""
        return (*(STATIC_MAPS if self.root is None else ()), *OBJECT_MAPS)

    def prepare_data(self) -> None:
        """Generate the synthetic data unless they are cached."""
        self._kitti_root()

    def setup(self, stage: str | None = None) -> None:
        """Parse calibrations and labels of all splits; whatever is wrong with them is raised here.

        Args:
            stage: Not used: every stage may score, which needs the calibration split.
        """
        if self._datasets:
            return
        root = self._kitti_root()
        train = read_split(root, "train")
        val = read_split(root, "val")
        held_out = self.num_calibration
        if len(train) < held_out + self.batch_size:
            raise ValueError(
                f"the training list of {root} has {len(train)} frames, but {held_out} are held out "
                f"for calibration and a batch needs {self.batch_size}; lower num_calibration or "
                "batch_size"
            )
        frames = {
            "calibration": train[:held_out],
            "train": train[held_out : held_out + self.num_train],
            "val": val[: self.num_val],
        }
        self._datasets = {
            split: DrivingDataset(root, members, self.image_size, self.grid, self.root is None)
            for split, members in frames.items()
        }

    def train_dataloader(self) -> DataLoader[Frame]:
        """Shuffled training batches."""
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> DataLoader[Frame]:
        """Validation batches, in file order."""
        return self._loader("val")

    def calibration_dataloader(self) -> DataLoader[Frame]:
        """Batches for scoring, in file order, seen neither in training nor in validation."""
        return self._loader("calibration")

    def dataset(self, split: str) -> DrivingDataset:
        """The frames of "train", "val" or "calibration"."""
        if not self._datasets:
            raise RuntimeError("the data are not set up; call prepare_data() and setup() first")
        if split not in self._datasets:
            raise ValueError(f"unknown split {split!r}; known are {', '.join(self._datasets)}")
        return self._datasets[split]

    def _kitti_root(self) -> Path:
        if self.root is not None:
            return Path(self.root).expanduser()
        config = SyntheticConfig(
            num_train=self.num_calibration + self.num_train,
            num_val=self.num_val,
            image_size=self.image_size,
            grid=self.grid,
            seed=self.seed,
            options=self.options,
        )
        return generate(config, Path(self.cache_dir).expanduser())

    def _loader(self, split: str, shuffle: bool = False) -> DataLoader[Frame]:
        dataset = self.dataset(split)
        return DataLoader(
            dataset,
            batch_size=self.eval_batch_size if split == "val" else self.batch_size,
            sampler=EpochSampler(len(dataset), self.seed, self.flip) if shuffle else None,
            drop_last=shuffle,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            collate_fn=collate,
        )
