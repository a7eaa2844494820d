"""Overlap of rotated rectangles and of upright boxes, for whole batches of pairs at once."""

import torch
from torch import Tensor

# Pairs that are clipped together: about 100 MB of intermediate float64.
_MAX_PAIRS = 1 << 16


def rotated_iou_bev(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of rotated rectangles.

    Shapes broadcast: `rotated_iou_bev(a, b)` compares N rectangles with N others one by one,
    `rotated_iou_bev(a[:, None], b)` gives the (N, M) matrix.

    Args:
        a: (..., 5) x and y of the centre, length, width, yaw in radians counter-clockwise from +x.
            Sides below 0 count as 0.
        b: (..., 5), as `a`.

    Returns:
        (...) float64 in [0, 1]. Without any area in the union it is 0.

    Raises:
        ValueError: The last dimension is not 5.
    """
    common = rotated_intersection(a, b)
    return over_union(common, _product(a[..., 2:4]), _product(b[..., 2:4]))


def rotated_iou_3d(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of boxes that stand upright. Shapes broadcast as in `rotated_iou_bev`.

    Args:
        a: (..., 7) x, y, z of the centre, length, width, height, yaw in radians about z. Sides below
            0 count as 0.
        b: (..., 7), as `a`.

    Returns:
        (...) float64 in [0, 1]. Without any volume in the union it is 0.

    Raises:
        ValueError: The last dimension is not 7.
    """
    _check_boxes(a, b, 7)
    a, b = a.double(), b.double()
    half_a, half_b = a[..., 5].clamp(min=0) / 2, b[..., 5].clamp(min=0) / 2
    top = torch.minimum(a[..., 2] + half_a, b[..., 2] + half_b)
    bottom = torch.maximum(a[..., 2] - half_a, b[..., 2] - half_b)
    ground = [0, 1, 3, 4, 6]
    common = rotated_intersection(a[..., ground], b[..., ground]) * (top - bottom).clamp(min=0)
    return over_union(common, _product(a[..., 3:6]), _product(b[..., 3:6]))


def rotated_intersection(a: Tensor, b: Tensor) -> Tensor:
    """Common area of rotated rectangles, (...) float64; arguments are those of `rotated_iou_bev`."""
    _check_boxes(a, b, 5)
    shape = (a[..., 0] + b[..., 0]).shape
    a, b = (boxes.double().expand(*shape, 5).reshape(-1, 5) for boxes in (a, b))
    area = a.new_zeros(len(a))
    # Few pairs of a matrix are near enough to touch; only those are clipped.
    reach = (a[:, 2:4].norm(dim=1) + b[:, 2:4].norm(dim=1)) / 2
    near = ((a[:, :2] - b[:, :2]).norm(dim=1) <= reach).nonzero().squeeze(1)
    for some in near.split(_MAX_PAIRS):
        area[some] = _clipped_area(a[some], b[some])
    return area.reshape(shape)


def _clipped_area(a: Tensor, b: Tensor) -> Tensor:
    """(N,): area of a's part within b, by Green's theorem in b's frame, where b is axis-aligned.

    Moving every point of a's outline to the nearest point of b leaves the part inside b as it is and
    flattens the rest onto b's sides, where it encloses nothing. Between the places where an edge
    crosses the lines of b's sides the moved outline is straight, so the trapezoids are exact. Unlike
    with vertex lists, no case is special: touching, identical and empty rectangles need no care.
    """
    half = b[:, None, None, 2:4].clamp(min=0) / 2  # (N, 1, 1, 2)
    signs = a.new_tensor([[1, 1], [-1, 1], [-1, -1], [1, -1]])  # of the corners, in order around
    corners = _turn(signs * a[:, None, 2:4].clamp(min=0) / 2, (a[:, 4] - b[:, 4])[:, None])
    start = (corners + _turn(a[:, :2] - b[:, :2], -b[:, 4])[:, None])[:, :, None]  # (N, 4, 1, 2)
    along = start.roll(-1, dims=1) - start
    # A parallel edge never crosses; wherever it is broken then, the sum is the same.
    speed = along.where(along != 0, 1.0)
    breaks = torch.cat([(half - start) / speed, (-half - start) / speed], dim=-1)
    ends = breaks.new_tensor([0.0, 1.0]).expand(len(a), 4, 2)
    breaks = torch.cat([breaks.squeeze(2).clamp(0, 1), ends], dim=-1).sort(dim=-1).values  # (N, 4, 6)
    points = start + breaks[..., None] * along  # (N, 4, 6, 2)
    x, y = points.clamp(-half, half).unbind(-1)
    signed = (x.diff(dim=-1) * (y[..., 1:] + y[..., :-1])).sum(dim=(1, 2)) / 2
    return signed.abs()


def _turn(points: Tensor, angle: Tensor) -> Tensor:
    """Points (..., 2) turned counter-clockwise by angles (...)."""
    cos, sin = angle.cos(), angle.sin()
    x, y = points.unbind(-1)
    return torch.stack([cos * x - sin * y, sin * x + cos * y], dim=-1)


def _product(sides: Tensor) -> Tensor:
    return sides.double().clamp(min=0).prod(dim=-1)


def over_union(common: Tensor, size_a: Tensor, size_b: Tensor) -> Tensor:
    """Intersection over union, 0 where the union is empty."""
    union = size_a + size_b - common
    return (common / union.where(union > 0, 1.0)).clamp(0, 1)


def _check_boxes(a: Tensor, b: Tensor, columns: int) -> None:
    for boxes in (a, b):
        if boxes.ndim == 0 or boxes.shape[-1] != columns:
            raise ValueError(f"Boxes must be (..., {columns}), got {tuple(a.shape)} and {tuple(b.shape)}.")
