"""The data module: frames, flips, the order of epochs, splits, and errors before training."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning import LightningModule
from lightning.pytorch.cli import LightningCLI

from examples.data.batch import Batch
from examples.data.datamodule import DrivingData
from examples.data.dataset import EpochSampler, Frame, collate, flip
from examples.data.geometry import in_grid, in_view, points_in_boxes, project
from examples.grid import BEVGrid
from tests.helpers.lightning_models import trainer

REAL = Path(os.environ.get("KITTI_ROOT", Path(__file__).parents[2] / "../shared/data/kitti"))
needs_kitti = pytest.mark.skipif(
    not (REAL / "training").is_dir(), reason="set KITTI_ROOT to a KITTI object root"
)
SMALL = {"num_train": 10, "num_val": 4, "num_calibration": 6, "batch_size": 4, "seed": 2}


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def data(cache_dir):
    module = DrivingData(cache_dir=cache_dir, **SMALL)
    module.prepare_data()
    module.setup("fit")
    return module


def one_box_frame():
    """A car 10 m ahead and 4 m to the left, and a point at its centre."""
    segmentation = torch.zeros(2, 48, 48, dtype=torch.uint8)
    segmentation[0, 12, 29] = 1
    return Frame(
        image=torch.arange(18, dtype=torch.uint8).reshape(3, 2, 3),
        lidar_to_image=torch.tensor([[50.0, -100, 0, 0], [20, 0, -100, 0], [1, 0, 0, 0]]),
        points=torch.tensor([[10.0, 4, -1, 0.3]]),
        boxes=torch.tensor([[10.0, 4, -1, 4, 1.6, 1.5, 0.5]]),
        box_class=torch.tensor([0]),
        segmentation=segmentation,
    )


def equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# Flips.


def test_flip_of_one_box():
    frame, flipped = one_box_frame(), flip(one_box_frame())
    assert flipped.points.tolist() == [[10, -4, -1, pytest.approx(0.3)]]
    assert flipped.boxes[0].tolist() == pytest.approx([10, -4, -1, 4, 1.6, 1.5, -0.5])
    assert flipped.segmentation.nonzero().tolist() == [[0, 12, 18]]
    assert torch.equal(flipped.image, frame.image)


def test_flip_keeps_the_pixel_of_a_point():
    for frame in (one_box_frame(), flip(one_box_frame())):
        pixels, depth = project(frame.points.numpy(), frame.lidar_to_image.numpy())
        np.testing.assert_allclose(pixels, [[10, 30]])  # 50 - 100 * 4 / 10, 20 + 100 / 10
        np.testing.assert_allclose(depth, [10])


def test_flip_is_an_involution(data):
    for frame in data.dataset("val"):
        assert equal(flip(flip(frame)), frame)


def test_flip_keeps_points_in_boxes(data):
    for frame in data.dataset("val"):
        inside, mirrored = (
            points_in_boxes(f.points.double().numpy(), f.boxes.double().numpy()) for f in (frame, flip(frame))
        )
        assert inside.any()
        np.testing.assert_array_equal(inside, mirrored)


# Batches.


def test_collate_says_whose_points_and_boxes_are():
    frame = one_box_frame()
    empty = frame._replace(points=frame.points[:0], boxes=frame.boxes[:0], box_class=frame.box_class[:0])
    batch = collate([frame, empty, flip(frame)])
    assert isinstance(batch, Batch)
    assert batch.image.shape == (3, 3, 2, 3)
    assert batch.point_frame.tolist() == [0, 2]
    assert batch.box_frame.tolist() == [0, 2]
    assert batch.box_frame.dtype == torch.int64
    assert batch.boxes[1].tolist() == pytest.approx([10, -4, -1, 4, 1.6, 1.5, -0.5])


def test_batches_are_as_promised(data):
    batch = next(iter(data.train_dataloader()))
    shapes = {name: tuple(value.shape) for name, value in batch._asdict().items()}
    num_points, num_boxes = len(batch.points), len(batch.boxes)
    assert shapes == {
        "image": (4, 3, 96, 320),
        "lidar_to_image": (4, 3, 4),
        "points": (num_points, 4),
        "point_frame": (num_points,),
        "boxes": (num_boxes, 7),
        "box_class": (num_boxes,),
        "box_frame": (num_boxes,),
        "segmentation": (4, len(data.map_classes), 48, 48),
    }
    assert batch.image.dtype == batch.segmentation.dtype == torch.uint8
    assert batch.points.dtype == batch.boxes.dtype == batch.lidar_to_image.dtype == torch.float32
    assert batch.point_frame.dtype == batch.box_class.dtype == torch.int64
    assert num_boxes > 4
    assert num_points > 4000


def test_points_and_boxes_are_cropped(data):
    for frame in data.dataset("train"):
        points, projection = frame.points.double().numpy(), frame.lidar_to_image.double().numpy()
        assert in_grid(points, data.grid).all()
        assert in_grid(frame.boxes.numpy(), data.grid).all()
        # float32 may move a point on the border across it.
        assert in_view(points, projection, data.image_size).mean() > 0.999


def test_map_classes(data):
    assert data.map_classes == ("drivable", "sidewalk", "lane", "vehicle", "vulnerable")
    assert DrivingData(root="somewhere").map_classes == ("vehicle", "vulnerable")


def test_maps_are_in_the_order_of_their_classes(data):
    maps = torch.stack([frame.segmentation for frame in data.dataset("train")]).float()
    area = dict(zip(data.map_classes, maps.mean(dim=(0, 2, 3)).tolist(), strict=True))
    assert area["drivable"] > area["sidewalk"] > area["vehicle"] > area["vulnerable"] > 0
    assert area["drivable"] > area["lane"] > 0


# Splits.


def test_splits_share_no_frame(data):
    frames = [set(data.dataset(split).frames) for split in ("calibration", "train", "val")]
    assert [len(members) for members in frames] == [6, 10, 4]
    assert len(set.union(*frames)) == 20


def test_calibration_frames_are_the_first_of_the_training_list(data):
    assert data.dataset("calibration").frames == tuple(f"{i:06d}" for i in range(6))


def test_loaders_hold_their_split(data):
    sizes = [
        [len(batch.image) for batch in loader]
        for loader in (
            data.train_dataloader(),
            data.val_dataloader(),
            data.calibration_dataloader(),
        )
    ]
    assert sizes == [[4, 4], [4], [4, 2]]


def test_evaluation_is_in_file_order_and_never_flipped(data):
    batch = next(iter(data.calibration_dataloader()))
    assert equal(batch, collate([data.dataset("calibration")[index] for index in range(4)]))


# Order of epochs.


def test_order_depends_on_seed_and_epoch_alone():
    def visits(seed, epoch):
        sampler = EpochSampler(50, seed, flip=True)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert visits(1, 3) == visits(1, 3)
    assert visits(1, 3) != visits(1, 4)
    assert visits(1, 3) != visits(2, 3)
    assert sorted(index for index, _ in visits(1, 3)) == list(range(50))
    assert 10 < sum(flipped for _, flipped in visits(1, 3)) < 40
    assert len(EpochSampler(50, 0, flip=True)) == 50


def test_no_flip_when_switched_off():
    assert not any(flipped for _, flipped in EpochSampler(50, 1, flip=False))


class Recorder(LightningModule):
    """Notes the sum of the points of each batch it trains on."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append((self.current_epoch, batch.points.double().sum().item()))
        return self.weight**2

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def train(data, max_epochs, folder, checkpoint=None):
    built = trainer(max_epochs=max_epochs, num_sanity_val_steps=2, default_root_dir=folder)
    model = Recorder()
    built.fit(model, datamodule=data, ckpt_path=checkpoint)
    return built, model.seen


def test_resumed_run_sees_the_order_of_an_uninterrupted_one(data, cache_dir, tmp_path):
    _, whole = train(data, 2, tmp_path)
    built, first = train(data, 1, tmp_path)
    built.save_checkpoint(tmp_path / "first.ckpt")
    fresh = DrivingData(cache_dir=cache_dir, **SMALL)
    _, second = train(fresh, 2, tmp_path, str(tmp_path / "first.ckpt"))
    assert first + second == whole
    assert len(whole) == 4
    assert whole[0][1] != whole[2][1]


def test_workers_load_the_same_batches(data, cache_dir):
    other = DrivingData(cache_dir=cache_dir, num_workers=1, **SMALL)
    other.setup()
    pairs = list(zip(data.train_dataloader(), other.train_dataloader(), strict=True))
    assert len(pairs) == 2
    assert all(equal(first, second) for first, second in pairs)


# Configuration and errors.


def test_arguments_from_yaml(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["fit"])  # Lightning warns about pytest's own arguments
    # Lightning's own calls are deprecated in new versions of jsonargparse.
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    path = tmp_path / "config.yaml"
    path.write_text("data: {image_size: [64, 208], grid: {cell: 0.4}, flip: false, root: null}")
    cli = LightningCLI(
        Recorder, DrivingData, seed_everything_default=False, run=False, args=["-c", str(path)]
    )
    module = cli.datamodule
    assert module.image_size == (64, 208)
    assert module.grid == BEVGrid(cell=0.4)
    assert not module.flip


def test_validation_may_have_larger_batches(data, cache_dir):
    module = DrivingData(cache_dir=cache_dir, eval_batch_size=3, **SMALL)
    module.setup()
    sizes = {
        "train": [len(batch.image) for batch in module.train_dataloader()],
        "val": [len(batch.image) for batch in module.val_dataloader()],
        "calibration": [len(batch.image) for batch in module.calibration_dataloader()],
    }
    assert sizes == {"train": [4, 4], "val": [3, 1], "calibration": [4, 2]}


@pytest.mark.parametrize("name", ["num_train", "num_val", "num_calibration", "batch_size", "eval_batch_size"])
def test_counts_are_positive(name):
    with pytest.raises(ValueError, match=f"{name} must be 1 or more, got 0"):
        DrivingData(**{name: 0})


def test_too_few_training_frames_for_a_batch():
    with pytest.raises(ValueError, match="num_train must be at least batch_size = 8, got 3"):
        DrivingData(num_train=3, batch_size=8)


def test_flip_needs_a_symmetric_grid():
    grid = BEVGrid(y_min=-10.4)
    with pytest.raises(ValueError, match=r"symmetric in y, got y from -10\.4 to 19\.2"):
        DrivingData(grid=grid)
    assert DrivingData(grid=grid, flip=False).grid == grid


def test_loaders_need_setup():
    with pytest.raises(RuntimeError, match=r"not set up; call prepare_data\(\) and setup\(\)"):
        DrivingData().train_dataloader()


def test_unknown_split(data):
    with pytest.raises(ValueError, match="unknown split 'test'; known are calibration, train, val"):
        data.dataset("test")


def test_missing_root_is_found_in_setup(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        DrivingData(root=str(tmp_path / "nowhere")).setup()


def test_too_many_calibration_frames(data):
    root = str(data.dataset("train").root)
    with pytest.raises(ValueError, match="has 16 frames, but 14 are held out for calibration"):
        DrivingData(root=root, num_calibration=14, batch_size=4).setup()


def test_bad_label_is_found_in_setup(tmp_path, cache_dir):
    module = DrivingData(cache_dir=str(tmp_path), **SMALL)
    module.prepare_data()
    path = next(tmp_path.glob("*/training/label_2/000003.txt"))
    path.write_text("Car 1 2\n")
    with pytest.raises(ValueError, match=r"000003\.txt:1: a label has 15 columns"):
        module.setup()


# Real frames.


@needs_kitti
def test_real_frames_make_batches():
    module = DrivingData(root=str(REAL), num_calibration=8, num_train=8, num_val=5, batch_size=4)
    module.setup()
    assert not set(module.dataset("calibration").frames) & set(module.dataset("train").frames)
    batches = [*module.train_dataloader(), *module.calibration_dataloader()]
    assert len(batches) == 4
    for batch in batches:
        assert batch.image.shape == (4, 3, 96, 320)
        assert batch.segmentation.shape == (4, 2, 48, 48)
        assert len(batch.points) > 10_000
    counts = []
    for frame in module.dataset("val"):
        inside = points_in_boxes(frame.points.numpy(), frame.boxes.numpy())
        counts += inside.sum(axis=1).tolist()
        assert in_view(frame.points.numpy(), frame.lidar_to_image.numpy(), (96, 320)).mean() > 0.999
    assert np.mean(np.array(counts) > 0) > 0.8
