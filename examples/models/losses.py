"""Training targets and losses of the heads."""

import torch
from torch import Tensor
from torch.nn import functional

from examples.grid import BEVGrid
from examples.models.cells import flat_index, to_cells
from examples.models.heads import ObjectMaps, encode_boxes

MIN_RADIUS = 2.0  # cells
REGRESSION_WEIGHT = 0.25
MAP_POSITIVE_WEIGHT = 3.0
MAP_WEIGHT = 4.0  # so that neither task drowns the other in training, nor in the scores of weights


def heatmap_target(cells: Tensor, radius: Tensor, index: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Gaussian peaks, 1 at the cells of the centres.

    Args:
        cells: (M, 2) continuous cell coordinates.
        radius: (M,) in cells; three standard deviations reach half a cell beyond it.
        index: (M,), which of the N maps.
        shape: (N, nx, ny).

    Returns:
        (N, nx, ny) in [0, 1]; where Gaussians overlap, their maximum.
    """
    _, nx, ny = shape
    sigma = (2 * radius + 1) / 6
    centre = cells.floor()
    x = torch.arange(nx, device=cells.device) - centre[:, :1]  # (M, nx)
    y = torch.arange(ny, device=cells.device) - centre[:, 1:]  # (M, ny)
    square = x[:, :, None] ** 2 + y[:, None, :] ** 2  # (M, nx, ny)
    peaks = torch.exp(-square / (2 * sigma[:, None, None] ** 2))
    target = cells.new_zeros(shape)
    return target.scatter_reduce(0, index[:, None, None].expand_as(peaks), peaks, "amax")


def gaussian_focal_loss(logits: Tensor, target: Tensor, num_positives: int) -> Tensor:
    """Focal loss with a penalty that is reduced near peaks, per positive.

    Args:
        logits: Any shape.
        target: As `logits`, in [0, 1], exactly 1 at the positives.
        num_positives: Divisor; 0 counts as 1.
    """
    p = logits.sigmoid()
    positive = target == 1
    # log p and log (1 - p) by logsigmoid: finite for every logit.
    at_peaks = (1 - p) ** 2 * functional.logsigmoid(logits) * positive
    elsewhere = (1 - target) ** 4 * p**2 * functional.logsigmoid(-logits)
    return -(at_peaks + elsewhere).sum() / max(num_positives, 1)


def object_loss(
    maps: ObjectMaps, boxes: Tensor, box_class: Tensor, box_frame: Tensor, grid: BEVGrid
) -> dict[str, Tensor]:
    """Losses of the object head; boxes whose centre lies outside the grid are left out.

    Args:
        maps: Output of `ObjectHead`.
        boxes: (M, 7).
        box_class: (M,) in [0, K).
        box_frame: (M,) in [0, B).
        grid: Cells of the maps.

    Returns:
        Scalars `heatmap` and `regression`, weighted.
    """
    heatmap, regression = maps.heatmap.float(), maps.regression.float()
    batch, num_classes, nx, ny = heatmap.shape
    cells = to_cells(boxes[:, :2], grid)
    _, inside = flat_index(cells, box_frame, (nx, ny))
    boxes, cells, frame, kind = boxes[inside], cells[inside], box_frame[inside], box_class[inside]

    radius = (boxes[:, 3:5].mean(dim=1) / (2 * grid.cell)).clamp(min=MIN_RADIUS)
    shape = (batch * num_classes, nx, ny)
    target = heatmap_target(cells, radius, frame * num_classes + kind, shape)
    focal = gaussian_focal_loss(heatmap.flatten(0, 1), target, len(boxes))

    ix, iy = cells.long().unbind(1)
    predicted = regression[frame, :, ix, iy]  # (M, 8)
    distance = functional.l1_loss(predicted, encode_boxes(boxes, cells), reduction="sum")
    distance = distance * (REGRESSION_WEIGHT / max(len(boxes), 1))
    return {"heatmap": focal, "regression": distance}


def map_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Binary cross-entropy of the maps, mean over cells and classes: (B, S, nx, ny) twice.

    Positive cells weigh more: most classes cover little, and cells found too many cost less IoU than
    cells never found.
    """
    weight = logits.new_full((), MAP_POSITIVE_WEIGHT, dtype=torch.float32)
    return functional.binary_cross_entropy_with_logits(logits.float(), target.float(), pos_weight=weight)
