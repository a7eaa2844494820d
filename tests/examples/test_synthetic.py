"""The synthetic data: sensors by hand, what each sensor may know, labels, files, caching."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from examples.data.geometry import box_corners, cell_centres, points_in_boxes, project, rasterise
from examples.data.kitti import (
    frame_files,
    labels_to_boxes,
    read_calib,
    read_labels,
    read_points,
    read_split,
)
from examples.data.scene import CURB, GROUND_Z, Road, Scene, SceneOptions, Thing, random_scene
from examples.data.sensors import GROUND, SKY, camera_rays, cast, render, scan
from examples.data.synthetic import (
    SyntheticConfig,
    generate,
    read_static_maps,
    static_maps,
    synthetic_calibration,
)
from examples.grid import BEVGrid

IMAGE_SIZE = (96, 320)
CONFIG = SyntheticConfig(num_train=24, num_val=8, image_size=IMAGE_SIZE, seed=5)
PROJECTION = synthetic_calibration(IMAGE_SIZE).lidar_to_image()

ROAD = Road(
    offset=0.0,
    slope=0.0,
    bend=0.0,
    half_width=4.0,
    lines=(-3.6, 0.1, 3.6),
    dashed=(False, True, False),
    walks=(2.0, 0.0),
)
GREY = np.full(3, 100.0)


def thing(kind, box):
    box = np.array(box, dtype=float)
    return Thing(
        kind=kind,
        box=box,
        parts=np.array([[0, 0, 0, *(box[3:6] / 2)]]),
        colours=np.array([[200.0, 60, 60], [60, 60, 200]]),
        phase=0.0,
        reflectance=0.5,
        returned=1.0,
    )


def scene(*things, road=ROAD):
    return Scene(road=road, things=things, asphalt=GREY, verge=GREY, sky=GREY)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return generate(CONFIG, tmp_path_factory.mktemp("cache"), num_workers=1)


@pytest.fixture(scope="module")
def frames(root):
    """(labels, boxes of the known classes, classes, points, image projection) of each frame."""
    result = []
    for frame in read_split(root, "train") + read_split(root, "val"):
        files = frame_files(root, frame)
        calibration = read_calib(files.calib)
        labels = [x for x in read_labels(files.label) if x.kind != "Misc"]
        boxes, classes = labels_to_boxes(labels, calibration)
        points = read_points(files.velodyne)
        result.append((labels, boxes, classes, points, calibration.lidar_to_image()))
    return result


# The ray caster by hand.


def test_rays_meet_a_box_the_road_and_the_sky():
    world = scene(thing("Misc", [10, 0, 0, 4, 2, 1, 0]))
    rays = np.array([[1, 0, 0], [0.6, 0, -0.8], [0, 0, 1]], dtype=np.float32)
    hits = cast(np.zeros(3), rays, world)
    np.testing.assert_allclose(hits.distance, [8, -GROUND_Z / 0.8, np.inf], rtol=1e-6)
    assert hits.owner.tolist() == [0, GROUND, SKY]
    assert hits.axis[0] == 0
    assert hits.alone.tolist() == [1]


def test_the_nearer_box_hides_the_farther_one():
    world = scene(thing("Misc", [20, 0, 0, 2, 2, 1, 0]), thing("Misc", [10, 0, 0, 2, 2, 1, np.pi / 4]))
    hits = cast(np.zeros(3), np.array([[1, 0, 0]], dtype=np.float32), world)
    np.testing.assert_allclose(hits.distance, 10 - np.sqrt(2), rtol=1e-6)
    assert hits.owner.tolist() == [1]
    assert hits.alone.tolist() == [1, 1]


def test_ground_is_a_road_a_curb_a_sidewalk_and_a_level_verge():
    # Down to the height of the road at these lateral positions: the curb of the left sidewalk is
    # met by the ray that would go just below it.
    lateral = np.array([0.0, 4.1, 5.5, -5.5])
    targets = np.stack([np.full(4, 1.0), lateral, np.full(4, GROUND_Z)], axis=1)
    rays = targets / np.linalg.norm(targets, axis=1, keepdims=True)
    hits = cast(np.zeros(3), rays.astype(np.float32), scene())
    points = hits.distance[:, None] * rays
    assert hits.curb.tolist() == [False, True, False, False]
    np.testing.assert_allclose(points[[0, 2, 3], 2], [GROUND_Z, GROUND_Z + CURB, GROUND_Z], 1e-5)
    np.testing.assert_allclose(points[1, 1], 4.0, rtol=1e-5)
    assert GROUND_Z < points[1, 2] < GROUND_Z + CURB


def test_camera_rays_go_through_their_pixels():
    origin, rays = camera_rays(PROJECTION, IMAGE_SIZE)
    pixels, depth = project(origin + 7.0 * rays, PROJECTION)
    u, v = np.meshgrid(np.arange(320) + 0.5, np.arange(96) + 0.5)
    np.testing.assert_allclose(pixels.reshape(96, 320, 2)[..., 0], u, atol=1e-2)
    np.testing.assert_allclose(pixels.reshape(96, 320, 2)[..., 1], v, atol=1e-2)
    assert (depth > 0).all()


# Road maps by hand: cells of 0.8 m have their centres at .., -3.6, .., -0.4, 0.4, .., 3.6, ..


def test_static_maps_of_a_straight_road():
    drivable, sidewalk, lane = static_maps(ROAD, BEVGrid())
    y = cell_centres(BEVGrid()).reshape(48, 48, 2)[0, :, 1]
    assert (drivable == (np.abs(y) <= 4)).all()
    assert (sidewalk == ((y > 4) & (y < 6))).all()
    assert set(y[lane[0] == 1].round(1)) == {-3.6, 0.4, 3.6}


def test_points_of_a_bending_road_keep_their_lateral():
    road = replace(ROAD, slope=0.1, bend=0.004)
    point = np.array(road.point(20.0, 2.5))
    assert road.lateral(point) == pytest.approx(2.5)


# What each sensor may know.


def same_scan(first, second):
    scans = [scan(world, np.random.default_rng(1))[0] for world in (first, second)]
    return np.array_equal(*scans)


def same_image(first, second):
    images = [render(world, PROJECTION, IMAGE_SIZE, np.random.default_rng(1))[0] for world in (first, second)]
    return np.array_equal(*images)


def test_only_the_camera_tells_a_pedestrian_from_a_cyclist():
    box = [10, 0, -0.9, 0.8, 0.6, 1.7, 0.4]
    walks, rides = scene(thing("Pedestrian", box)), scene(thing("Cyclist", box))
    assert same_scan(walks, rides)
    assert not same_image(walks, rides)


def test_only_the_camera_sees_paint():
    plain = scene(road=replace(ROAD, lines=(), dashed=()))
    assert same_scan(scene(), plain)
    assert not same_image(scene(), plain)


def test_the_lidar_sees_the_step_of_the_sidewalk():
    points, owner = scan(scene(), np.random.default_rng(1))
    assert (owner == GROUND).all()
    for side, height in [((4.5, 5.5), GROUND_Z + CURB), ((0.0, 3.5), GROUND_Z)]:
        there = (points[:, 1] > side[0]) & (points[:, 1] < side[1]) & (points[:, 0] < 15)
        assert np.median(points[there, 2]) == pytest.approx(height, abs=0.02)


def test_dark_paint_loses_most_points():
    car = thing("Car", [10, 0, -1, 4, 1.8, 1.5, 0])
    counts = [
        (scan(scene(replace(car, returned=share)), np.random.default_rng(2))[1] == 0).sum()
        for share in (1.0, 0.2)
    ]
    assert counts[1] < 0.3 * counts[0]


def test_pedestrians_and_cyclists_are_drawn_alike():
    rng = np.random.default_rng(0)
    sizes = {"Pedestrian": [], "Cyclist": []}
    for _ in range(300):
        for item in random_scene(rng, BEVGrid()).things:
            if item.kind in sizes:
                sizes[item.kind].append([*item.box[:2], *item.box[3:6]])
    walks, rides = (np.array(rows) for rows in sizes.values())
    assert min(len(walks), len(rides)) > 300
    error = np.sqrt(walks.var(axis=0) / len(walks) + rides.var(axis=0) / len(rides))
    assert (np.abs(walks.mean(axis=0) - rides.mean(axis=0)) < 4 * error).all()


# Options.


def test_vivid_scenes_differ_in_colour_alone():
    plain, vivid = (random_scene(np.random.default_rng(4), BEVGrid(), colour) for colour in (False, True))
    assert len(plain.things) == len(vivid.things)
    assert same_scan(plain, vivid)
    assert not same_image(plain, vivid)


def test_vivid_colours_tell_the_kinds_apart():
    rng = np.random.default_rng(0)
    things = [item for _ in range(20) for item in random_scene(rng, BEVGrid(), vivid=True).things]
    assert {item.kind for item in things} >= {"Car", "Pedestrian", "Cyclist", "Misc", "Building"}
    for item in things:
        red, _, blue = item.colours.T
        sign = {"Pedestrian": 1, "Cyclist": -1}.get(item.kind, 0)
        assert (np.sign(np.round(red - blue)) == sign).all()


def test_beams_and_columns_of_the_lidar():
    options = SceneOptions(beams=8, columns=16, fault_share=0)
    points, _ = scan(scene(), np.random.default_rng(1), options)
    assert 0.8 * 6 * 16 < len(points) <= 6 * 16  # two beams meet nothing within range
    elevation = np.arctan2(points[:, 2], np.hypot(points[:, 0], points[:, 1]))
    paved = points[:, 3] < 0.3  # where the ground is not rough
    assert len(np.unique(elevation[paved].round(3))) == 6


def test_share_of_scans_with_a_fault():
    def points(share):
        options = SceneOptions(fault_share=share)
        return [len(scan(scene(), np.random.default_rng(seed), options)[0]) for seed in range(8)]

    assert max(points(1.0)) < 0.7 * min(points(0.0))


def test_share_of_images_with_a_fault():
    def images(share):
        seeds = range(8)
        return [render(scene(), PROJECTION, (32, 96), np.random.default_rng(s), share)[0] for s in seeds]

    assert not any(map(np.array_equal, images(0.0), images(1.0)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fault_share": 1.5}, r"fault_share must lie in \[0, 1\], got 1.5"),
        ({"beams": 1}, "beams and columns must be 2 or more, got 1 and 224"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        SceneOptions(**options)


# Labels.


def test_there_is_enough_to_learn_from(frames):
    classes = np.concatenate([frame[2] for frame in frames])
    assert 4 <= len(classes) / len(frames) <= 10
    assert np.bincount(classes, minlength=3).min() >= 20


def test_near_visible_objects_hold_points(frames):
    held = []
    for labels, boxes, _, points, _ in frames:
        visible = np.array([label.occlusion == 0 for label in labels])
        near = boxes[visible & (boxes[:, 0] < 20)]
        held += (points_in_boxes(points, near, margin=0.05).sum(axis=1) >= 3).tolist()
    assert len(held) > 30
    assert np.mean(held) > 0.85  # dark cars and broken LiDARs lose theirs


def test_2d_boxes_are_the_clipped_extent_of_the_corners(frames):
    for labels, boxes, _, _, projection in frames:
        for label, corners in zip(labels, box_corners(boxes), strict=True):
            pixels, depth = project(corners, projection)
            assert (depth > 0.5).all()
            low, high = pixels.min(axis=0), pixels.max(axis=0)
            inside = np.clip([low, high], 0, [320, 96])
            # Labels are rounded to centimetres and hundredths of a radian.
            np.testing.assert_allclose(inside.ravel(), label.box2d, atol=1.5)
            share = np.prod(inside[1] - inside[0]) / np.prod(high - low)
            assert label.truncation == pytest.approx(1 - share, abs=0.05)


def test_hidden_objects_get_a_level_or_no_label(tmp_path, monkeypatch):
    world = scene(
        thing("Car", [10, 0, -1, 4, 1.8, 1.5, 0]),
        thing("Pedestrian", [14, 0, -1.3, 0.6, 0.6, 0.8, 0]),  # wholly behind the first car
        thing("Car", [20, 0, -1, 4, 1.8, 1.5, 0]),  # but for a strip above it
        thing("Cyclist", [10, 4, -1, 0.6, 0.6, 1.7, 0]),
    )
    monkeypatch.setattr("examples.data.synthetic.random_scene", lambda *_: world)
    root = generate(replace(CONFIG, num_train=1, num_val=0), tmp_path, num_workers=1)
    labels = read_labels(frame_files(root, "000000").label)
    levels = [(label.kind, label.occlusion) for label in labels]
    assert levels == [("Car", 0), ("Car", 3), ("Cyclist", 0)]


def test_every_box_marks_a_cell(frames):
    for _, boxes, classes, _, _ in frames:
        for box, kind in zip(boxes, classes, strict=True):
            assert rasterise(box[None], np.array([kind]), CONFIG.grid)[int(kind > 0)].any()


def test_points_are_finite_and_reflectance_is_a_share(frames):
    for _, _, _, points, _ in frames:
        assert np.isfinite(points).all()
        assert points[:, 3].min() >= 0
        assert points[:, 3].max() <= 1


# Files and cache.


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file()
    }


def test_standard_layout(root):
    assert len(read_split(root, "train")) == 24
    assert read_split(root, "val") == [f"{index:06d}" for index in range(24, 32)]
    assert len(contents(root)) == 2 + 5 * 32
    assert read_static_maps(root, "000000", CONFIG.grid).shape == (3, 48, 48)


def test_files_do_not_depend_on_the_number_of_workers(root, tmp_path):
    assert contents(generate(CONFIG, tmp_path, num_workers=2)) == contents(root)


def test_second_call_returns_what_is_there(root, monkeypatch):
    monkeypatch.setattr("examples.data.synthetic._write_dataset", None)
    assert generate(CONFIG, root.parent) == root


def test_configurations_have_their_own_folder():
    others = [
        replace(CONFIG, seed=6),
        replace(CONFIG, num_val=9),
        replace(CONFIG, grid=BEVGrid(cell=0.4)),
        replace(CONFIG, options=SceneOptions(vivid=True)),
    ]
    assert len({config.name for config in [CONFIG, *others]}) == 5


def test_failed_generation_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("disk on fire")

    monkeypatch.setattr("examples.data.synthetic.write_frame", fail)
    with pytest.raises(RuntimeError, match="disk on fire"):
        generate(CONFIG, tmp_path, num_workers=1)
    assert list(tmp_path.iterdir()) == []


def test_failed_rename_is_raised_unless_another_process_was_first(tmp_path, monkeypatch):
    config = replace(CONFIG, num_train=1, num_val=1)

    def fail(self, target):
        raise OSError("no space")

    def lose(self, target):
        target.mkdir()
        raise OSError("exists")

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="no space"):
        generate(config, tmp_path, num_workers=1)
    monkeypatch.setattr(Path, "rename", lose)
    assert generate(config, tmp_path, num_workers=1) == tmp_path / config.name
    assert [path.name for path in tmp_path.iterdir()] == [config.name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_train": -1}, "num_train must be 0 or more, got -1"),
        ({"seed": -2}, "seed must be 0 or more, got -2"),
        ({"image_size": (8, 320)}, r"image_size must be at least \(16, 16\), got \(8, 320\)"),
    ],
)
def test_bad_configuration(change, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **change)


def test_missing_map(root):
    with pytest.raises(FileNotFoundError, match="frame 000099 has no map file: expected"):
        read_static_maps(root, "000099", CONFIG.grid)


def test_map_of_another_grid(root):
    with pytest.raises(ValueError, match=r"has \(48, 48\) cells, the grid \(96, 96\)"):
        read_static_maps(root, "000000", BEVGrid(cell=0.4))
