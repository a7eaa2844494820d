"""The KITTI reader and writer: one box by hand, round trips, every error, real frames."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from examples.data.geometry import box_corners, in_view, points_in_boxes, project, rasterise
from examples.data.kitti import (
    Calibration,
    Label,
    box_to_label,
    frame_files,
    labels_to_boxes,
    read_calib,
    read_image,
    read_labels,
    read_points,
    read_split,
    write_calib,
    write_labels,
    write_points,
)
from examples.grid import BEVGrid

AXES = np.array([[0.0, -1, 0, 0], [0, 0, -1, 0], [1, 0, 0, 0]])
LEVEL = Calibration(
    p2=np.array([[100.0, 0, 50, 0], [0, 100, 20, 0], [0, 0, 1, 0]]),
    r0_rect=np.eye(3),
    velo_to_cam=AXES,
)
CAR = Label(
    kind="Car",
    truncation=0.0,
    occlusion=0,
    alpha=-np.pi / 2,
    box2d=(40, 20, 60, 40),
    dimensions=(1.5, 1.6, 4.0),
    location=(0.0, 1.73, 10.0),
    rotation_y=-np.pi / 2,
)

REAL = Path(os.environ.get("KITTI_ROOT", Path(__file__).parents[2] / "../shared/data/kitti"))
needs_kitti = pytest.mark.skipif(
    not (REAL / "training").is_dir(), reason="set KITTI_ROOT to a KITTI object root"
)


def rotation(axis, angle):
    cos, sin = np.cos(angle), np.sin(angle)
    matrix = np.eye(3)
    first, second = [i for i in range(3) if i != axis]
    matrix[[first, first, second, second], [first, second, first, second]] = cos, -sin, sin, cos
    return matrix


def tilted_calibration():
    """Like the real one: the camera is turned and shifted against the LiDAR, P2 has a baseline."""
    turn = rotation(0, 0.02) @ rotation(1, -0.01) @ rotation(2, 0.015)
    p2 = np.array([[721.5, 0, 609.6, 44.9], [0, 721.5, 172.9, 0.22], [0, 0, 1, 0.0027]])
    return Calibration(
        p2=p2,
        r0_rect=rotation(0, -0.004) @ rotation(1, 0.01),
        velo_to_cam=np.concatenate([turn @ AXES[:, :3], [[-0.004], [-0.076], [-0.27]]], axis=1),
    )


def random_boxes(num, seed=0):
    rng = np.random.default_rng(seed)
    low, high = [5, -15, -2, 0.5, 0.5, 1, -3.1], [40, 15, 1, 5, 2, 3, 3.1]
    return rng.uniform(low, high, (num, 7))


# One car, 10 m ahead, standing on the ground 1.73 m below the LiDAR, facing away.


def test_car_ahead_in_the_lidar_frame():
    boxes, classes = labels_to_boxes([CAR], LEVEL)
    np.testing.assert_allclose(boxes, [[10, 0, -0.98, 4, 1.6, 1.5, 0]], atol=1e-12)
    assert classes.tolist() == [0]


def test_car_ahead_in_the_image():
    pixels, depth = project(np.array([[10, 0, -0.98]]), LEVEL.lidar_to_image())
    np.testing.assert_allclose(pixels, [[50, 29.8]])  # 20 + 100 * 0.98 / 10
    np.testing.assert_allclose(depth, [10])


def test_car_ahead_in_the_map():
    # x 8..12 and y -0.8..0.8 hold the centres of cells 10..14 (8.4 .. 11.6) and 23, 24 (-+0.4).
    maps = rasterise(*labels_to_boxes([CAR], LEVEL), BEVGrid())
    expected = np.zeros((2, 48, 48), dtype=np.uint8)
    expected[0, 10:15, 23:25] = 1
    np.testing.assert_array_equal(maps, expected)


def test_car_ahead_back_to_label_coordinates():
    box = np.array([10, 0, -0.98, 4, 1.6, 1.5, 0])
    label = box_to_label("Car", box, LEVEL, box2d=CAR.box2d)
    assert label.location == pytest.approx(CAR.location)
    assert label.dimensions == CAR.dimensions
    assert label.rotation_y == pytest.approx(CAR.rotation_y)
    assert label.alpha == pytest.approx(CAR.alpha)


@pytest.mark.parametrize(
    ("rotation_y", "yaw"),
    [(0.0, -np.pi / 2), (np.pi / 2, -np.pi), (-np.pi / 2, 0.0), (-np.pi, np.pi / 2)],
)
def test_yaw_of_the_four_directions(rotation_y, yaw):
    label = Label("Car", 0, 0, 0, (0, 0, 1, 1), (1, 1, 2), (0, 1, 9), rotation_y)
    boxes, _ = labels_to_boxes([label], LEVEL)
    assert boxes[0, 6] == pytest.approx(yaw)


def test_alpha_of_an_object_to_the_right():
    label = box_to_label("Car", np.array([10, -10, 0, 4, 2, 2, 0.0]), LEVEL, box2d=(0, 0, 1, 1))
    assert label.alpha == pytest.approx(-np.pi / 2 - np.pi / 4)


def test_resize_scales_pixels_and_keeps_depth():
    point = np.array([[10, 1, 0.5]])
    before, depth = project(point, LEVEL.lidar_to_image())
    after, same = project(point, LEVEL.lidar_to_image((0.5, 0.25)))
    np.testing.assert_allclose(after, before * [0.5, 0.25])
    np.testing.assert_allclose(same, depth)


def test_small_box_marks_the_cell_of_its_centre_and_both_maps_stay_apart():
    box = np.array([[1.0, -19.0, 0, 0.1, 0.1, 1.7, 0.3]])
    maps = rasterise(box, np.array([2]), BEVGrid())
    assert maps[1, 1, 0] == 1
    assert maps.sum() == 1


def test_no_box_gives_empty_maps_and_no_label_no_box():
    boxes, classes = labels_to_boxes([], LEVEL)
    assert boxes.shape == (0, 7)
    assert rasterise(boxes, classes, BEVGrid()).sum() == 0


def test_in_view_needs_the_front():
    points = np.array([[10.0, 0, 0], [-10.0, 0, 0], [10.0, 20, 0], [-0.1, -0.1, -0.1]])
    inside = in_view(points, LEVEL.lidar_to_image(), (40, 100))
    assert inside.tolist() == [True, False, False, False]


def test_rectification_comes_after_the_lidar_to_camera_transform():
    # 90 degrees about the camera's y axis: what is ahead at z = 10 comes to x = 10.
    turned = Calibration(LEVEL.p2, np.array([[0.0, 0, 1], [0, 1, 0], [-1, 0, 0]]), AXES)
    in_camera = turned.lidar_to_camera @ [10, 0, 0, 1]
    np.testing.assert_allclose(in_camera, [10, 0, 0, 1], atol=1e-12)


# Round trips and invariants.


def test_label_round_trip(tmp_path):
    calibration, boxes = tilted_calibration(), random_boxes(50)
    labels = [
        box_to_label("Cyclist", box, calibration, box2d=(1, 2, 3, 4), truncation=0.25, occlusion=2)
        for box in boxes
    ]
    write_labels(tmp_path / "label.txt", labels, decimals=9)
    write_calib(tmp_path / "calib.txt", calibration)
    read = read_labels(tmp_path / "label.txt")
    back, classes = labels_to_boxes(read, read_calib(tmp_path / "calib.txt"))
    np.testing.assert_allclose(back, boxes, atol=1e-6)
    assert set(classes.tolist()) == {2}
    assert {(label.truncation, label.occlusion, label.score) for label in read} == {(0.25, 2, None)}


def test_calib_round_trip_and_official_order(tmp_path):
    path, calibration = tmp_path / "calib.txt", tilted_calibration()
    write_calib(path, calibration)
    names = [line.split(":")[0] for line in path.read_text().splitlines() if line]
    assert names == ["P0", "P1", "P2", "P3", "R0_rect", "Tr_velo_to_cam", "Tr_imu_to_velo"]
    back = read_calib(path)
    np.testing.assert_allclose(back.lidar_to_image(), calibration.lidar_to_image(), rtol=1e-10)


def test_calib_is_read_by_name(tmp_path):
    path = tmp_path / "calib.txt"
    write_calib(path, tilted_calibration())
    expected = read_calib(path).lidar_to_image()
    path.write_text("\n".join(reversed(path.read_text().splitlines())))
    np.testing.assert_array_equal(read_calib(path).lidar_to_image(), expected)


def test_label_is_written_as_officially(tmp_path):
    write_labels(tmp_path / "label.txt", [CAR])
    assert (tmp_path / "label.txt").read_text() == (
        "Car 0.00 0 -1.57 40.00 20.00 60.00 40.00 1.50 1.60 4.00 0.00 1.73 10.00 -1.57\n"
    )


def test_label_with_score_and_dont_care(tmp_path):
    path = tmp_path / "label.txt"
    path.write_text(
        "DontCare -1 -1 -10 1 2 3 4 -1 -1 -1 -1000 -1000 -1000 -10\n\n"
        "Van 2 3 0 1 2 3 4 2 2 5 0 1.7 20 0\n"
        "Pedestrian 0 1 0.1 1 2 3 4 1.7 0.6 0.8 1 1.7 9 0.1 0.75\n"
    )
    labels = read_labels(path)
    assert [label.score for label in labels] == [None, None, 0.75]
    assert labels[1].truncation == 2
    _, classes = labels_to_boxes(labels, LEVEL)
    assert classes.tolist() == [1]
    write_labels(path, labels[2:])
    assert read_labels(path) == labels[2:]


def test_points_round_trip(tmp_path):
    points = np.random.default_rng(0).random((7, 4)).astype(np.float32)
    write_points(tmp_path / "points.bin", points)
    np.testing.assert_array_equal(read_points(tmp_path / "points.bin"), points)


def test_corners_lie_on_their_box():
    boxes = random_boxes(20)
    for box, corners in zip(boxes, box_corners(boxes), strict=True):
        assert points_in_boxes(corners, box[None], margin=1e-9).all()
        assert not points_in_boxes(corners, box[None], margin=-1e-6).any()
        np.testing.assert_allclose(corners.mean(axis=0), box[:3])


def test_image_is_read_as_png_or_jpg_and_resized(tmp_path):
    pixels = np.full((8, 20, 3), (200, 100, 50), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(pixels).save(tmp_path / "a.jpg", quality=95)
    exact, scale = read_image(tmp_path / "a.png", (8, 20))
    assert scale == (1.0, 1.0)
    np.testing.assert_array_equal(exact, pixels)
    small, scale = read_image(tmp_path / "a.jpg", (4, 5))
    assert scale == (0.25, 0.5)
    np.testing.assert_allclose(small, np.broadcast_to(pixels[0, 0], (4, 5, 3)), atol=3)


# Errors.


@pytest.fixture
def root(tmp_path):
    """A root with one complete frame."""
    for folder, suffix in [("image_2", "jpg"), ("velodyne", "bin"), ("calib", "txt")]:
        path = tmp_path / "training" / folder / f"000007.{suffix}"
        path.parent.mkdir(parents=True)
        path.touch()
    (tmp_path / "training/label_2").mkdir()
    (tmp_path / "training/label_2/000007.txt").touch()
    (tmp_path / "ImageSets").mkdir()
    (tmp_path / "ImageSets/train.txt").write_text("000007")  # official files end like this
    return tmp_path


def test_split_and_files_of_a_complete_frame(root):
    assert read_split(root, "train") == ["000007"]
    assert frame_files(root, "000007").image.name == "000007.jpg"


def test_missing_root(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere is not a folder; give the folder"):
        read_split(tmp_path / "nowhere", "train")


def test_missing_split(root):
    with pytest.raises(FileNotFoundError, match=r"split file .*val\.txt is missing"):
        read_split(root, "val")


def test_empty_split(root):
    (root / "ImageSets/val.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"split file .*val\.txt is empty"):
        read_split(root, "val")


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("image", "image_2/000007.jpg"),
        ("velodyne", "velodyne/000007.bin"),
        ("calib", "calib/000007.txt"),
        ("label", "label_2/000007.txt"),
    ],
)
def test_missing_file_of_a_frame(root, name, file):
    (root / "training" / file).unlink()
    with pytest.raises(FileNotFoundError, match=f"frame 000007 has no {name} file: expected"):
        frame_files(root, "000007")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("P0: 1\nP2 1 2", r"calib\.txt:2: expected 'NAME: v v \.\.\.', found 'P2 1 2'"),
        ("P2: 1 2", r"calib\.txt:1: P2 takes 12 numbers, found 2"),
        ("R0_rect: 1 2 x 4 5 6 7 8 9", r"calib\.txt:1: R0_rect: expected .* number, found 'x'"),
        ("R0_rect: 1 2 3 4 5 6 7 8 9", r"no entry P2, Tr_velo_to_cam; needed are P2, R0_rect"),
    ],
)
def test_bad_calib(tmp_path, text, message):
    (tmp_path / "calib.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_calib(tmp_path / "calib.txt")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("Car 0 0 0", r"label\.txt:2: a label has 15 columns \(16 with a score\), found 4"),
        ("car 0 0 0 1 2 3 4 1 1 1 0 0 9 0", r"label\.txt:2: unknown type 'car'; known are Car,"),
        ("Car 0 0 0 1 2 3 4 1 1 1 0 0 9 ?", r"label\.txt:2: expected a finite .*, found '\?'"),
        ("Car 0 0 0 1 2 3 4 1 1 nan 0 0 9 0", r"label\.txt:2: expected a finite .* 'nan'"),
        ("Car 0 0 0 1 2 3 4 1 0 1 0 0 9 0", r"label\.txt:2: height, width and length must"),
    ],
)
def test_bad_label(tmp_path, line, message):
    write_labels(tmp_path / "label.txt", [CAR])
    with (tmp_path / "label.txt").open("a") as file:
        file.write(line)
    with pytest.raises(ValueError, match=message):
        read_labels(tmp_path / "label.txt")


def test_bad_points(tmp_path):
    (tmp_path / "points.bin").write_bytes(b"12345")
    with pytest.raises(ValueError, match="5 bytes are no whole number of points"):
        read_points(tmp_path / "points.bin")


# Real frames.


def real_frames():
    for frame in read_split(REAL, "val"):
        files = frame_files(REAL, frame)
        calibration = read_calib(files.calib)
        yield files, calibration, *labels_to_boxes(read_labels(files.label), calibration)


@needs_kitti
def test_real_near_cars_hold_points():
    held = []
    for files, _, boxes, classes in real_frames():
        near = boxes[(classes == 0) & (boxes[:, 0] < 30)]
        held += (points_in_boxes(read_points(files.velodyne), near).sum(axis=1) > 10).tolist()
    assert len(held) > 20
    assert np.mean(held) > 0.9


@needs_kitti
def test_real_boxes_project_to_their_2d_box():
    overlaps = []
    for files, calibration, boxes, _ in real_frames():
        with Image.open(files.image) as image:
            size = image.size
        labels = [label for label in read_labels(files.label) if label.kind in KINDS]
        for label, corners in zip(labels, box_corners(boxes), strict=True):
            pixels, depth = project(corners, calibration.lidar_to_image())
            if depth.min() < 1 or label.truncation > 0.1:
                continue
            overlaps.append(overlap(np.clip(pixels, 0, size), np.reshape(label.box2d, (2, 2))))
    assert len(overlaps) > 50
    assert np.mean(overlaps) > 0.85


KINDS = ("Car", "Pedestrian", "Cyclist")


def overlap(pixels, box2d):
    low, high = pixels.min(axis=0), pixels.max(axis=0)
    sides = np.minimum(high, box2d[1]) - np.maximum(low, box2d[0])
    common = np.prod(sides.clip(min=0))
    return common / (np.prod(high - low) + np.prod(box2d[1] - box2d[0]) - common)


@needs_kitti
def test_real_centres_lie_in_the_resized_image():
    inside = []
    for files, calibration, boxes, _ in real_frames():
        _, scale = read_image(files.image, (96, 320))
        inside += in_view(boxes, calibration.lidar_to_image(scale), (96, 320)).tolist()
    assert np.mean(inside) > 0.9


@needs_kitti
def test_real_boxes_survive_a_round_trip():
    for _, calibration, boxes, classes in real_frames():
        labels = [
            box_to_label(KINDS[kind], box, calibration, box2d=(0, 0, 1, 1))
            for kind, box in zip(classes, boxes, strict=True)
        ]
        np.testing.assert_allclose(labels_to_boxes(labels, calibration)[0], boxes, atol=1e-6)
