"""Reader and writer of the KITTI object format.

A root holds `training/{image_2,velodyne,calib,label_2}` and `ImageSets/{train,val}.txt`. Labels are
in the rectified camera's frame (x right, y down, z forward); everything that leaves this module as
a box is in the LiDAR frame.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from examples.data.batch import CLASSES
from examples.data.geometry import Floats, Ints, wrap_angle

LABEL_TYPES = (
    *CLASSES,
    "Van",
    "Truck",
    "Person_sitting",
    "Tram",
    "Misc",
    "DontCare",
)
IMAGE_SUFFIXES = (".png", ".jpg")

_LABEL_COLUMNS = 15
_CALIB_SIZES = {"P2": 12, "R0_rect": 9, "Tr_velo_to_cam": 12}
_POINT_BYTES = 16


@dataclass(frozen=True)
class Calibration:
    """The three matrices that lead from the LiDAR to the left colour image.

    Attributes:
        p2: (3, 4) projection of the rectified camera, in pixels.
        r0_rect: (3, 3) rectifying rotation.
        velo_to_cam: (3, 4) rigid transform from the LiDAR to the unrectified camera, in metres.
    """

    p2: Floats
    r0_rect: Floats
    velo_to_cam: Floats

    @property
    def lidar_to_camera(self) -> Floats:
        """(4, 4) rigid transform from the LiDAR to the rectified camera."""
        rectify, rigid = np.eye(4), np.eye(4)
        rectify[:3, :3] = self.r0_rect
        rigid[:3] = self.velo_to_cam
        return rectify @ rigid

    def lidar_to_image(self, scale: tuple[float, float] = (1.0, 1.0)) -> Floats:
        """(3, 4) projection from the LiDAR to an image resized by `scale` = (x, y)."""
        # Pixel (0, 0) covers [0, 1) x [0, 1), so a resize is a scaling about the corner: no shift.
        return np.diag([*scale, 1.0]) @ self.p2 @ self.lidar_to_camera


@dataclass(frozen=True)
class Label:
    """One line of a label file.

    Attributes:
        kind: One of LABEL_TYPES.
        truncation: Share of the object outside the image, in [0, 1]; an integer level 0, 1 or 2
            in labels converted from KITTI tracking; -1 for DontCare.
        occlusion: 0 visible, 1 partly, 2 largely occluded, 3 unknown; -1 for DontCare.
        alpha: Observation angle in radians.
        box2d: Left, top, right, bottom in pixels of the unresized image.
        dimensions: Height, width, length in metres.
        location: Centre of the BOTTOM face in the rectified camera's frame, in metres.
        rotation_y: Heading about the camera's y axis in radians, 0 = +x.
        score: Confidence of a detection, None for ground truth.
    """

    kind: str
    truncation: float
    occlusion: int
    alpha: float
    box2d: tuple[float, float, float, float]
    dimensions: tuple[float, float, float]
    location: tuple[float, float, float]
    rotation_y: float
    score: float | None = None


class FrameFiles(NamedTuple):
    """The four files of a frame."""

    image: Path
    velodyne: Path
    calib: Path
    label: Path


def read_split(root: Path, split: str) -> list[str]:
    """Frame ids of `ImageSets/<split>.txt`, in file order."""
    if not root.is_dir():
        raise FileNotFoundError(
            f"KITTI root {root} is not a folder; give the folder that holds training/ and ImageSets/"
        )
    path = root / "ImageSets" / f"{split}.txt"
    if not path.is_file():
        raise FileNotFoundError(f"split file {path} is missing; write one frame id per line, e.g. 000123")
    frames = path.read_text().split()
    if not frames:
        raise ValueError(f"split file {path} is empty; write one frame id per line, e.g. 000123")
    return frames


def frame_files(root: Path, frame: str) -> FrameFiles:
    """The files of a frame, all of which exist."""
    folder = root / "training"
    images = [folder / "image_2" / f"{frame}{suffix}" for suffix in IMAGE_SUFFIXES]
    files = FrameFiles(
        image=next((path for path in images if path.is_file()), images[0]),
        velodyne=folder / "velodyne" / f"{frame}.bin",
        calib=folder / "calib" / f"{frame}.txt",
        label=folder / "label_2" / f"{frame}.txt",
    )
    for name, path in files._asdict().items():
        if not path.is_file():
            alternative = f" (or {images[1].name})" if name == "image" else ""
            raise FileNotFoundError(
                f"frame {frame} has no {name} file: expected {path}{alternative}; "
                "add the file or take the frame out of ImageSets"
            )
    return files


def read_calib(path: Path) -> Calibration:
    """Calibration of a frame; the entries are found by name, in any order."""
    entries: dict[str, Floats] = {}
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if not line.strip():
            continue
        name, colon, text = line.partition(":")
        if not colon:
            raise ValueError(f"{path}:{number}: expected 'NAME: v v ...', found {line!r}")
        if name not in _CALIB_SIZES:
            continue
        fields = text.split()
        if len(fields) != _CALIB_SIZES[name]:
            raise ValueError(
                f"{path}:{number}: {name} takes {_CALIB_SIZES[name]} numbers, found {len(fields)}"
            )
        entries[name] = np.array(_numbers(fields, f"{path}:{number}: {name}"))
    missing = [name for name in _CALIB_SIZES if name not in entries]
    if missing:
        raise ValueError(f"{path}: no entry {', '.join(missing)}; needed are {', '.join(_CALIB_SIZES)}")
    return Calibration(
        p2=entries["P2"].reshape(3, 4),
        r0_rect=entries["R0_rect"].reshape(3, 3),
        velo_to_cam=entries["Tr_velo_to_cam"].reshape(3, 4),
    )


def write_calib(path: Path, calibration: Calibration) -> None:
    """Write all seven entries in the official order, which some readers rely on.

    The other three cameras get P2, and the IMU is put where the LiDAR is: neither is known here.
    """
    entries = {
        "P0": calibration.p2,
        "P1": calibration.p2,
        "P2": calibration.p2,
        "P3": calibration.p2,
        "R0_rect": calibration.r0_rect,
        "Tr_velo_to_cam": calibration.velo_to_cam,
        "Tr_imu_to_velo": np.eye(3, 4),
    }
    lines = [
        f"{name}: " + " ".join(f"{value:.12e}" for value in matrix.ravel())
        for name, matrix in entries.items()
    ]
    path.write_text("\n".join(lines) + "\n\n")


def read_labels(path: Path) -> list[Label]:
    """All lines of a label file: ground truth (15 columns) or detections (16, with a score)."""
    lines = path.read_text().splitlines()
    return [
        _parse_label(line, f"{path}:{number}") for number, line in enumerate(lines, start=1) if line.strip()
    ]


def _parse_label(line: str, where: str) -> Label:
    kind, *fields = line.split()
    if len(fields) + 1 not in (_LABEL_COLUMNS, _LABEL_COLUMNS + 1):
        raise ValueError(
            f"{where}: a label has {_LABEL_COLUMNS} columns ({_LABEL_COLUMNS + 1} with a score), "
            f"found {len(fields) + 1}"
        )
    if kind not in LABEL_TYPES:
        raise ValueError(f"{where}: unknown type {kind!r}; known are {', '.join(LABEL_TYPES)}")
    v = _numbers(fields, where)
    if kind in CLASSES and min(v[7:10]) <= 0:
        raise ValueError(f"{where}: height, width and length must be above 0, found {v[7:10]}")
    return Label(
        kind=kind,
        truncation=v[0],
        occlusion=int(v[1]),
        alpha=v[2],
        box2d=(v[3], v[4], v[5], v[6]),
        dimensions=(v[7], v[8], v[9]),
        location=(v[10], v[11], v[12]),
        rotation_y=v[13],
        score=v[14] if len(v) > _LABEL_COLUMNS - 1 else None,
    )


def _numbers(fields: Sequence[str], where: str) -> list[float]:
    values = []
    for field in fields:
        try:
            value = float(field)
        except ValueError:
            value = np.nan
        if not np.isfinite(value):
            raise ValueError(f"{where}: expected a finite number, found {field!r}")
        values.append(value)
    return values


def write_labels(path: Path, labels: Iterable[Label], decimals: int = 2) -> None:
    """Write labels as KITTI does: two decimals, unless more are asked for."""
    path.write_text("".join(_format_label(label, decimals) + "\n" for label in labels))


def _format_label(label: Label, decimals: int) -> str:
    geometry = [label.alpha, *label.box2d, *label.dimensions, *label.location, label.rotation_y]
    if label.score is not None:
        geometry.append(label.score)
    numbers = " ".join(f"{value:.{decimals}f}" for value in geometry)
    return f"{label.kind} {label.truncation:.{decimals}f} {label.occlusion} {numbers}"


def read_points(path: Path) -> NDArray[np.float32]:
    """(N, 4) x, y, z in metres and reflectance in [0, 1]."""
    size = path.stat().st_size
    if size % _POINT_BYTES:
        raise ValueError(
            f"{path}: {size} bytes are no whole number of points; a point is 4 float32 = {_POINT_BYTES} bytes"
        )
    return np.fromfile(path, dtype=np.float32).reshape(-1, 4)


def write_points(path: Path, points: Floats) -> None:
    """Write (N, 4) points as float32."""
    points.astype(np.float32).tofile(path)


def read_image(path: Path, image_size: tuple[int, int]) -> tuple[NDArray[np.uint8], tuple[float, float]]:
    """RGB image (height, width, 3) resized to `image_size`, and the scale (x, y) of the resize."""
    height, width = image_size
    with Image.open(path) as file:
        scale = width / file.width, height / file.height
        image = file.convert("RGB")
    if scale != (1.0, 1.0):
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.array(image), scale


def labels_to_boxes(labels: Iterable[Label], calibration: Calibration) -> tuple[Floats, Ints]:
    """Boxes (M, 7) in the LiDAR frame and their classes (M,); types outside CLASSES are dropped."""
    kept = [label for label in labels if label.kind in CLASSES]
    # Half the height up from the bottom (y points down) BEFORE the transform: the camera is tilted
    # against the LiDAR, so that the box's vertical is not the LiDAR's.
    centres = np.array(
        [[x, y - label.dimensions[0] / 2, z] for label in kept for x, y, z in [label.location]]
    ).reshape(-1, 3)
    camera_to_lidar = np.linalg.inv(calibration.lidar_to_camera)
    centres = centres @ camera_to_lidar[:3, :3].T + camera_to_lidar[:3, 3]
    sizes = np.array([label.dimensions[::-1] for label in kept]).reshape(-1, 3)
    yaws = wrap_angle(-np.array([label.rotation_y for label in kept]) - np.pi / 2)
    classes = np.array([CLASSES.index(label.kind) for label in kept], dtype=np.int64)
    return np.concatenate([centres, sizes, yaws[:, None]], axis=1), classes


def box_to_label(
    kind: str,
    box: Floats,
    calibration: Calibration,
    *,
    box2d: tuple[float, float, float, float],
    truncation: float = 0.0,
    occlusion: int = 0,
    score: float | None = None,
) -> Label:
    """The label of a (7,) box in the LiDAR frame: the inverse of `labels_to_boxes`."""
    transform = calibration.lidar_to_camera
    x, y, z = (transform[:3, :3] @ box[:3] + transform[:3, 3]).tolist()
    length, width, height, yaw = box[3:].tolist()
    rotation_y = float(wrap_angle(np.array(-yaw - np.pi / 2)))
    return Label(
        kind=kind,
        truncation=truncation,
        occlusion=occlusion,
        alpha=float(wrap_angle(np.array(rotation_y - np.arctan2(x, z)))),
        box2d=box2d,
        dimensions=(height, width, length),
        location=(x, y + height / 2, z),
        rotation_y=rotation_y,
        score=score,
    )
