"""Synthetic driving data, written as standard KITTI files plus a map of the ground.

A frame is one random scene seen by both sensors. Some of its information is in both (cars, large
boxes, the extent of the road), some in the image alone (pedestrian or cyclist, paint), some in the
points alone (range, size and yaw, the sidewalk's step, frames at night, overexposed or in fog), and
each sensor fails by itself in one frame of ten, by default (see `SceneOptions`).

`training/map/<id>.npz` is NOT part of the KITTI format: it holds one array `static` of shape
(3, nx, ny), 0 or 1, with the maps `STATIC_MAPS` on the grid of the configuration. Vehicles and
vulnerable road users are not in it: they are drawn from the labels. Everything else can be read by
any KITTI reader.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from examples.data.geometry import Floats, Ints, box_corners, cell_centres, project
from examples.data.kitti import (
    LABEL_TYPES,
    Calibration,
    Label,
    box_to_label,
    write_calib,
    write_labels,
    write_points,
)
from examples.data.scene import Road, Scene, SceneOptions, random_scene
from examples.data.sensors import Hits, render, scan
from examples.grid import BEVGrid

STATIC_MAPS = ("drivable", "sidewalk", "lane")

_FOLDERS = ("image_2", "velodyne", "calib", "label_2", "map")
# Part of the cache's key: raise it when the generated files change.
_VERSION = 1


@dataclass(frozen=True)
class SyntheticConfig:
    """What a synthetic data set is made from: equal configurations give equal files.

    Attributes:
        num_train: Frames in `ImageSets/train.txt`.
        num_val: Frames in `ImageSets/val.txt`.
        image_size: Height and width of the images in pixels.
        grid: The grid of the maps; objects stand on it.
        seed: Of everything random.
        options: What the scenes and the sensors are like.
    """

    num_train: int
    num_val: int
    image_size: tuple[int, int] = (96, 320)
    grid: BEVGrid = field(default_factory=BEVGrid)
    seed: int = 0
    options: SceneOptions = field(default_factory=SceneOptions)

    def __post_init__(self) -> None:
        for name in ("num_train", "num_val", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        if min(self.image_size) < 16:
            raise ValueError(f"image_size must be at least (16, 16), got {self.image_size}")

    @property
    def name(self) -> str:
        """Folder name of the data set."""
        text = json.dumps([_VERSION, asdict(self)], sort_keys=True)
        return f"synthetic-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def generate(config: SyntheticConfig, cache_dir: Path, num_workers: int | None = None) -> Path:
    """Write the data set below `cache_dir`, unless it is there.

    Args:
        config: What to write.
        cache_dir: Folder of all data sets; made if missing.
        num_workers: Threads; the files do not depend on it. Default: one per CPU.

    Returns:
        The KITTI root.
    """
    root = cache_dir / config.name
    if root.is_dir():
        return root
    cache_dir.mkdir(parents=True, exist_ok=True)
    # A folder of its own first: an interrupted run leaves no half data set under the final name.
    temporary = Path(tempfile.mkdtemp(prefix=f".{config.name}-", dir=cache_dir))
    try:
        _write_dataset(temporary, config, num_workers)
        try:
            temporary.rename(root)
        except OSError:
            if not root.is_dir():  # else another process was first, with the same files
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return root


def _write_dataset(root: Path, config: SyntheticConfig, num_workers: int | None) -> None:
    for folder in _FOLDERS:
        (root / "training" / folder).mkdir(parents=True)
    (root / "ImageSets").mkdir()
    total = config.num_train + config.num_val
    frames = [f"{index:06d}" for index in range(total)]
    splits = {"train": frames[: config.num_train], "val": frames[config.num_train :]}
    for split, members in splits.items():
        (root / "ImageSets" / f"{split}.txt").write_text("\n".join(members))
    write = partial(write_frame, root, config)
    # Threads, not processes: numpy and PNG release the interpreter most of the time, and a spawned
    # process would run an unguarded main script again.
    with ThreadPoolExecutor(num_workers or os.cpu_count()) as pool:
        list(pool.map(write, range(total)))


def write_frame(root: Path, config: SyntheticConfig, index: int) -> None:
    """Write the files of one frame, which depend on nothing but `config` and `index`."""
    rng = np.random.default_rng([config.seed, index])
    scene = random_scene(rng, config.grid, config.options.vivid)
    calibration = synthetic_calibration(config.image_size)
    projection = calibration.lidar_to_image()
    image, hits = render(scene, projection, config.image_size, rng, config.options.fault_share)
    points, owner = scan(scene, rng, config.options)
    labels = list(_labels(scene, calibration, config.image_size, hits, owner))
    folder, frame = root / "training", f"{index:06d}"
    Image.fromarray(image).save(folder / "image_2" / f"{frame}.png", compress_level=1)
    write_points(folder / "velodyne" / f"{frame}.bin", points)
    write_calib(folder / "calib" / f"{frame}.txt", calibration)
    write_labels(folder / "label_2" / f"{frame}.txt", labels)
    np.savez_compressed(folder / "map" / f"{frame}.npz", static=static_maps(scene.road, config.grid))


def synthetic_calibration(image_size: tuple[int, int]) -> Calibration:
    """KITTI's camera, scaled to the width of the image, and level with the LiDAR."""
    height, width = image_size
    scale = width / 1242
    focal = 721.5 * scale
    return Calibration(
        p2=np.array(
            [
                [focal, 0, 0.49 * width, 44.9 * scale],
                [0, focal, 0.46 * height, 0.22 * scale],
                [0, 0, 1, 0.0027],
            ]
        ),
        r0_rect=np.eye(3),
        velo_to_cam=np.array([[0, -1, 0, -0.004], [0, 0, -1, -0.076], [1, 0, 0, -0.272]]),
    )


def _labels(
    scene: Scene,
    calibration: Calibration,
    image_size: tuple[int, int],
    hits: Hits,
    owner: Ints,
) -> Iterator[Label]:
    """Labels of the objects that have a visible pixel or a point."""
    num = len(scene.things)
    pixels = np.bincount(hits.owner[hits.owner >= 0], minlength=num)
    points = np.bincount(owner[owner >= 0], minlength=num)
    for index, thing in enumerate(scene.things):
        if thing.kind not in LABEL_TYPES or not (pixels[index] or points[index]):
            continue
        box2d, truncation = _box2d(thing.box, calibration.lidar_to_image(), image_size)
        visible = pixels[index] / max(hits.alone[index], 1)
        yield box_to_label(
            thing.kind,
            thing.box,
            calibration,
            box2d=box2d,
            truncation=truncation,
            occlusion=int(np.searchsorted([-0.8, -0.5, -0.2], -visible)),
        )


def _box2d(
    box: Floats, lidar_to_image: Floats, image_size: tuple[int, int]
) -> tuple[tuple[float, float, float, float], float]:
    """The corners' extent clipped to the image, and the share that the clipping took away."""
    corners, _ = project(box_corners(box[None])[0], lidar_to_image)
    low, high = corners.min(axis=0), corners.max(axis=0)
    height, width = image_size
    inside = np.clip([low, high], 0, [width, height])
    left, top, right, bottom = inside.ravel().tolist()
    share = np.prod(inside[1] - inside[0]) / np.prod(high - low)
    return (left, top, right, bottom), float(1 - share)


def static_maps(road: Road, grid: BEVGrid) -> NDArray[np.uint8]:
    """(3, nx, ny): `STATIC_MAPS` of a road. A cell has a lane if a painted line crosses it."""
    lateral = road.lateral(cell_centres(grid))
    maps = [
        np.abs(lateral) <= road.half_width,
        road.on_sidewalk(lateral),
        road.near_line(lateral, grid.cell / 2),
    ]
    return np.stack(maps).reshape(-1, *grid.shape).astype(np.uint8)


def read_static_maps(root: Path, frame: str, grid: BEVGrid) -> NDArray[np.uint8]:
    """The maps written by `generate`, which must be of this grid."""
    path = root / "training" / "map" / f"{frame}.npz"
    if not path.is_file():
        raise FileNotFoundError(f"frame {frame} has no map file: expected {path}")
    with np.load(path) as file:
        maps: NDArray[np.uint8] = file["static"]
    if maps.shape[1:] != grid.shape:
        raise ValueError(
            f"{path}: the map has {maps.shape[1:]} cells, the grid {grid.shape}; "
            "use the grid that the data were generated with"
        )
    return maps
