"""The fusion model as a program of torch.export and as ONNX, on other batches than it was traced with."""

import os
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from altermoma_pl.export import check_onnx, to_onnx, to_torch_export
from examples.data.batch import Batch
from examples.data.datamodule import DrivingData
from examples.models.fusion import FusionModel

REAL = Path(os.environ.get("KITTI_ROOT", Path(__file__).parents[2] / "../shared/data/kitti"))
IMAGE = (48, 160)
SIZES = [(1, 300), (3, 50), (2, 1), (1, 0)]  # frames, points of each
INPUTS = ("image", "lidar_to_image", "points", "point_frame")


def batch_of(frames, points, seed=0):
    """Some points lie outside the grid; the first frame has none."""
    generator = torch.Generator().manual_seed(seed)
    low, high = torch.tensor([-5.0, -30, -3, 0]), torch.tensor([60.0, 30, 2, 1])
    # A camera that looks along x.
    projection = torch.tensor([[80.0, -90, 0, 1], [24, 0, -90, 2], [1, 0, 0, 0]])
    count = frames * points
    return Batch(
        image=torch.randint(256, (frames, 3, *IMAGE), generator=generator, dtype=torch.uint8),
        lidar_to_image=projection.expand(frames, 3, 4),
        points=low + (high - low) * torch.rand(count, 4, generator=generator),
        point_frame=torch.randint(min(1, frames - 1), frames, (count,), generator=generator),
        boxes=torch.zeros(0, 7),
        box_class=torch.zeros(0, dtype=torch.int64),
        box_frame=torch.zeros(0, dtype=torch.int64),
        segmentation=torch.zeros(frames, 1, 48, 48, dtype=torch.uint8),
    )


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return FusionModel(size="small", image_size=IMAGE).eval()


@pytest.fixture(scope="module")
def onnx_file(model, tmp_path_factory):
    return to_onnx(model, batch_of(2, 100), tmp_path_factory.mktemp("onnx") / "model.onnx")


def test_onnx_gives_the_same_on_other_batches(model, onnx_file):
    differences = [check_onnx(onnx_file, model, batch_of(*size, seed=1)) for size in SIZES]
    assert max(differences) < 1e-4


@pytest.mark.skipif(not (REAL / "training").is_dir(), reason="set KITTI_ROOT to a KITTI object root")
def test_onnx_gives_the_same_on_real_frames(model, onnx_file, tmp_path):
    data = DrivingData(root=str(REAL), image_size=IMAGE, batch_size=3, cache_dir=str(tmp_path))
    data.prepare_data()
    data.setup("fit")
    batch = next(iter(data.val_dataloader()))
    assert batch.points.shape[0] > 1000
    assert check_onnx(onnx_file, model, batch) < 1e-5


def test_sums_by_index_are_right_on_several_threads_of_onnxruntime(onnx_file):
    import onnx

    # On several threads onnxruntime's ScatterND is wrong now and then: no run can show that it never is.
    operators = {node.op_type for node in onnx.load(onnx_file).graph.node}
    assert "ScatterElements" in operators
    assert "ScatterND" not in operators


def test_torch_export_gives_the_same_on_other_batches(tmp_path):
    torch.manual_seed(0)
    model = FusionModel(size="tiny", image_size=IMAGE).eval()  # ONNX goes through the same trace in all sizes
    path = to_torch_export(model, batch_of(2, 100), tmp_path / "model.pt2")
    program = torch.export.load(path).module()
    for size in SIZES:
        batch = batch_of(*size, seed=1)
        with torch.no_grad():
            found = program(**{name: getattr(batch, name) for name in INPUTS})
            expected = model(batch)
        assert_close(found["objects.heatmap"], expected.objects.heatmap)
        assert_close(found["map_logits"], expected.map_logits)
        assert_close(found["depth"], expected.depth)
