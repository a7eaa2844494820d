"""Boxes, projection and rasterisation in the LiDAR frame (x forward, y left, z up), in metres."""

import numpy as np
from numpy.typing import NDArray

from examples.grid import BEVGrid

Floats = NDArray[np.floating]
Ints = NDArray[np.integer]
Bools = NDArray[np.bool_]

# Segmentation classes drawn from boxes: one list of indices into CLASSES per map.
OBJECT_MAPS = {"vehicle": (0,), "vulnerable": (1, 2)}

_CORNER_SIGNS = np.array([[x, y, z] for x in (1, -1) for y in (1, -1) for z in (1, -1)]) / 2


def wrap_angle(angle: Floats) -> Floats:
    """Angles in radians wrapped to [-pi, pi)."""
    return (angle + np.pi) % (2 * np.pi) - np.pi


def to_box_frame(points: Floats, boxes: Floats) -> Floats:
    """Points as each box sees them: origin in its centre, x along its length.

    Args:
        points: (N, 3 or more), of which x, y, z are used.
        boxes: (M, 7) centre, length, width, height, yaw.

    Returns:
        (M, N, 3) coordinates in metres.
    """
    offset = points[None, :, :3] - boxes[:, None, :3]
    cos, sin = np.cos(boxes[:, 6, None]), np.sin(boxes[:, 6, None])
    along = cos * offset[..., 0] + sin * offset[..., 1]
    across = cos * offset[..., 1] - sin * offset[..., 0]
    return np.stack([along, across, offset[..., 2]], axis=-1)


def points_in_boxes(points: Floats, boxes: Floats, margin: float = 0.0) -> Bools:
    """(M, N): whether each of N points lies in each of M boxes grown by `margin` metres a side."""
    reach = boxes[:, None, 3:6] / 2 + margin
    inside: Bools = np.all(np.abs(to_box_frame(points, boxes)) <= reach, axis=-1)
    return inside


def box_corners(boxes: Floats) -> Floats:
    """(M, 8, 3): the corners of (M, 7) boxes."""
    local = _CORNER_SIGNS * boxes[:, None, 3:6]
    cos, sin = np.cos(boxes[:, 6, None]), np.sin(boxes[:, 6, None])
    x = cos * local[..., 0] - sin * local[..., 1]
    y = sin * local[..., 0] + cos * local[..., 1]
    return np.stack([x, y, local[..., 2]], axis=-1) + boxes[:, None, :3]


def project(points: Floats, lidar_to_image: Floats) -> tuple[Floats, Floats]:
    """Pixels (..., 2) and depths (...) in metres of points (..., 3 or more).

    Pixel (0, 0) covers [0, 1) x [0, 1). Pixels of points with a depth of 0 or less mean nothing.
    """
    projected = points[..., :3] @ lidar_to_image[:, :3].T + lidar_to_image[:, 3]
    depth = projected[..., 2]
    return projected[..., :2] / np.where(depth > 0, depth, 1.0)[..., None], depth


def in_view(points: Floats, lidar_to_image: Floats, image_size: tuple[int, int]) -> Bools:
    """Whether each point lies in front of the camera and inside its image of (height, width)."""
    pixels, depth = project(points, lidar_to_image)
    height, width = image_size
    inside: Bools = np.all((pixels >= 0) & (pixels < np.array([width, height])), axis=-1)
    inside &= depth > 0
    return inside


def in_grid(points: Floats, grid: BEVGrid) -> Bools:
    """Whether each point (or box, by its centre) lies over the grid."""
    x, y = points[:, 0], points[:, 1]
    return (x >= grid.x_min) & (x < grid.x_max) & (y >= grid.y_min) & (y < grid.y_max)


def cell_centres(grid: BEVGrid) -> Floats:
    """(nx * ny, 2): x and y of the cells' centres, y varying fastest."""
    nx, ny = grid.shape
    x = grid.x_min + (np.arange(nx) + 0.5) * grid.cell
    y = grid.y_min + (np.arange(ny) + 0.5) * grid.cell
    return np.stack(np.meshgrid(x, y, indexing="ij"), axis=-1).reshape(-1, 2)


def rasterise(boxes: Floats, classes: Ints, grid: BEVGrid) -> NDArray[np.uint8]:
    """Footprints of boxes, one map per entry of `OBJECT_MAPS`.

    A cell is marked if its centre lies in a footprint or if it holds the centre of a box, so that
    every box over the grid marks at least one cell.

    Args:
        boxes: (M, 7).
        classes: (M,) indices into CLASSES.
        grid: Where to draw.

    Returns:
        (2, nx, ny), 0 or 1.
    """
    centres = cell_centres(grid)
    cells = np.concatenate([centres, np.zeros((len(centres), 1))], axis=1)
    offset = to_box_frame(cells, boxes)[..., :2]
    inside = np.all(np.abs(offset) <= boxes[:, None, 3:5] / 2, axis=-1)
    from_centre = boxes[:, None, :2] - centres
    holds = np.all((from_centre >= -grid.cell / 2) & (from_centre < grid.cell / 2), axis=-1)
    marked = inside | holds
    maps = [marked[np.isin(classes, members)].any(axis=0) for members in OBJECT_MAPS.values()]
    return np.stack(maps).reshape(-1, *grid.shape).astype(np.uint8)
