"""KITTI's AP of labels and of detections in the LiDAR frame, on made and on real frames."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from altermoma_pl.metrics import KittiAP
from examples.data.batch import CLASSES
from examples.data.kitti import Calibration, Label, labels_to_boxes, read_labels, read_split, write_labels
from examples.data.kitti_eval import (
    Reference,
    detections_to_labels,
    image_box,
    kitti_detections,
    kitti_targets,
    read_reference,
)
from examples.data.synthetic import SyntheticConfig, generate

LEVEL = Calibration(
    p2=np.array([[100.0, 0, 50, 0], [0, 100, 20, 0], [0, 0, 1, 0]]),
    r0_rect=np.eye(3),
    velo_to_cam=np.array([[0.0, -1, 0, 0], [0, 0, -1, 0], [1, 0, 0, 0]]),
)
SIZE = (40, 100)
CAR = Label("Car", 0.1, 1, -1.5, (40, 20, 60, 40), (1.5, 1.6, 4.0), (0.0, 1.73, 10.0), -1.5)

REAL = Path(os.environ.get("KITTI_ROOT", Path(__file__).parents[2] / "../shared/data/kitti"))
needs_kitti = pytest.mark.skipif(
    not (REAL / "training").is_dir(), reason="set KITTI_ROOT to a KITTI object root"
)


def scored(labels):
    """The ground truth as detections, without DontCare."""
    return [
        replace(label, score=0.9 - index / 1000)
        for index, label in enumerate(labels)
        if label.kind != "DontCare"
    ]


def lidar_detections(references):
    """The ground truth of CLASSES as a model would give it."""
    found = [labels_to_boxes(reference.labels, reference.calibration) for reference in references]
    boxes = torch.from_numpy(np.concatenate([boxes for boxes, _ in found])).float()
    classes = torch.from_numpy(np.concatenate([classes for _, classes in found]))
    frames = torch.tensor([index for index, (boxes, _) in enumerate(found) for _ in boxes])
    return boxes, torch.linspace(0.9, 0.1, len(boxes)), classes, frames


def evaluate(found, references, **options):
    metric = KittiAP(**options)
    metric.update(kitti_detections(found), kitti_targets([reference.labels for reference in references]))
    return metric.num_valid(), {key: 100 * value.item() for key, value in metric.compute().items()}


# By hand.


def test_labels_as_tensors():
    truths = kitti_targets([[], [CAR, replace(CAR, kind="Van")]])
    np.testing.assert_array_equal(truths.boxes[0], [1.5, 1.6, 4.0, 0.0, 1.73, 10.0, -1.5])
    np.testing.assert_array_equal(truths.boxes2d[1], [40, 20, 60, 40])
    assert truths.types.tolist() == [0, 3]
    assert truths.frames.tolist() == [1, 1]
    assert truths.occlusion.tolist() == [1, 1]
    assert truths.truncation.tolist() == pytest.approx([0.1, 0.1])
    assert kitti_detections([[replace(CAR, score=0.5)]]).scores.tolist() == [0.5]
    assert kitti_detections([[], []]).boxes.shape == (0, 7)


def test_detection_without_a_score():
    with pytest.raises(ValueError, match=r"needs a score, but this label has none: Label\(kind='Car'"):
        kitti_detections([[CAR]])


def test_image_box_by_hand():
    # From 9 to 11 m ahead, 1 m to either side, from .5 m below to .5 m above the camera.
    box = np.array([10.0, 0, 0, 2, 2, 1, 0])
    at_9 = 100 / 9
    expected = 50 - at_9, 20 - at_9 / 2, 50 + at_9, 20 + at_9 / 2
    assert image_box(box, LEVEL.lidar_to_image(), SIZE) == pytest.approx(expected)
    shifted = box - [0, 5, 0, 0, 0, 0, 0]  # to the right, beyond the edge
    assert image_box(shifted, LEVEL.lidar_to_image(), SIZE)[2] == 100


def test_image_box_of_what_passes_the_camera():
    beside = np.array([0.0, 2, 0, 8, 2, 1, 0])  # 4 m back to 4 m ahead, 1 to 3 m to the left
    left, top, right, bottom = image_box(beside, LEVEL.lidar_to_image(), SIZE)
    assert (left, top, bottom) == (0, 0, 40)
    assert right == pytest.approx(50 - 100 * 1 / 4)
    assert image_box(beside - [9, 0, 0, 0, 0, 0, 0], LEVEL.lidar_to_image(), SIZE) == (0, 0, 0, 0)


def test_detections_come_back_to_their_labels():
    reference = Reference([CAR], LEVEL, SIZE)
    first, second = detections_to_labels(*lidar_detections([reference]), [reference, reference])
    assert second == []
    (label,) = first
    assert (label.kind, label.score) == ("Car", pytest.approx(0.9))
    assert label.location == pytest.approx(CAR.location, abs=1e-5)
    assert label.dimensions == pytest.approx(CAR.dimensions)
    assert label.rotation_y == pytest.approx(CAR.rotation_y)


# Synthetic and real frames: the ground truth as detections.


def test_synthetic_ground_truth(tmp_path):
    config = SyntheticConfig(num_train=0, num_val=30)
    root = generate(config, tmp_path)
    references = [read_reference(root, frame) for frame in read_split(root, "val")]
    found = detections_to_labels(*lidar_detections(references), references)
    valid, values = evaluate(found, references, height_scale=config.image_size[1] / 1242)
    assert valid["car_hard"] >= 41
    for difficulty in ("moderate", "hard"):
        assert valid[f"car_{difficulty}"] > 20
        for measure in ("bev", "3d"):
            full = min(100, 2.5 * valid[f"car_{difficulty}"])
            assert values[f"car_{measure}_r40_{difficulty}"] == pytest.approx(full, abs=2.6)
    unscaled, _ = evaluate(found, references)
    assert unscaled["car_hard"] < valid["car_hard"] / 2


# Of n objects, a perfect detector's AP at 11 and at 40 points.
PERFECT = {
    3: (9.09, 5.0),
    10: (27.27, 22.5),
    11: (27.27, 25.0),
    12: (27.27, 27.5),
    20: (45.45, 47.5),
    25: (63.64, 60.0),
    57: (100, 100),
    72: (100, 100),
}
VALID = {"car": (25, 57, 72), "pedestrian": (12, 20, 25), "cyclist": (3, 10, 11)}


@needs_kitti
def test_real_ground_truth_from_result_files(tmp_path):
    frames = read_split(REAL, "val")
    references = [read_reference(REAL, frame) for frame in frames]
    for frame, reference in zip(frames, references, strict=True):
        write_labels(tmp_path / frame, scored(reference.labels), decimals=4)
    valid, values = evaluate([read_labels(tmp_path / frame) for frame in frames], references)
    for kind, numbers in VALID.items():
        for difficulty, number in zip(("easy", "moderate", "hard"), numbers, strict=True):
            assert valid[f"{kind}_{difficulty}"] == number
            for measure in ("2d", "bev", "3d", "bev_loose", "3d_loose"):
                found = [values[f"{kind}_{measure}_{points}_{difficulty}"] for points in ("r11", "r40")]
                assert found == pytest.approx(PERFECT[number], abs=0.01)


@needs_kitti
def test_real_ground_truth_by_way_of_the_lidar_frame():
    references = [read_reference(REAL, frame) for frame in read_split(REAL, "val")]
    found = detections_to_labels(*lidar_detections(references), references)
    valid, values = evaluate(found, references)
    assert valid["car_hard"] == 72
    # The projected corners are not quite the labelled boxes: a few are ignored as too small.
    assert values["car_3d_r11_hard"] == pytest.approx(100)
    assert values["car_3d_r40_hard"] > 99
    assert values["car_2d_r40_moderate"] > 90
    worse = [[replace(label, location=(0, 0, 5)) for label in frame] for frame in found]
    assert evaluate(worse, references)[1]["car_3d_r40_hard"] < 10
    assert {label.kind for frame in found for label in frame} == set(CLASSES)
