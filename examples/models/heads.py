"""Task heads: objects (one peak per box centre) and maps (one segmentation per class)."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from examples.grid import BEVGrid
from examples.models.cells import to_metres
from examples.models.layers import conv_norm_relu

NUM_REGRESSIONS = 8  # offset to the cell's centre (2), z, log dimensions (3), sin and cos of yaw
HEATMAP_PRIOR = 0.1  # initial probability of a peak: keeps the first losses small


class ObjectMaps(NamedTuple):
    """What the object head predicts at every cell."""

    heatmap: Tensor  # (B, K, nx, ny) logits
    regression: Tensor  # (B, 8, nx, ny)


class Detections(NamedTuple):
    """Boxes of B frames, concatenated."""

    boxes: Tensor  # (P, 7): x, y, z of the centre, length, width, height, yaw
    scores: Tensor  # (P,) in [0, 1]
    classes: Tensor  # (P,) int64
    frames: Tensor  # (P,) int64 in [0, B)


class ObjectHead(nn.Module):
    """Heatmap and regressions from one shared convolution.

    Args:
        inputs: Input channels.
        width: Channels of the shared convolution.
        num_classes: Number of object classes K.
    """

    def __init__(self, inputs: int, width: int, num_classes: int) -> None:
        super().__init__()
        self.shared = conv_norm_relu(inputs, width)
        self.heatmap = nn.Conv2d(width, num_classes, 1)
        self.regression = nn.Conv2d(width, NUM_REGRESSIONS, 1)
        nn.init.constant_(self.heatmap.bias, math.log(HEATMAP_PRIOR / (1 - HEATMAP_PRIOR)))

    def forward(self, x: Tensor) -> ObjectMaps:
        """(B, inputs, nx, ny) -> maps of the same size."""
        x = self.shared(x)
        return ObjectMaps(self.heatmap(x), self.regression(x))


class MapHead(nn.Sequential):
    """Segmentation logits, (B, inputs, nx, ny) -> (B, S, nx, ny); classes may overlap.

    Args:
        inputs: Input channels.
        width: Channels of the hidden convolution.
        num_classes: Number of map classes S.
    """

    def __init__(self, inputs: int, width: int, num_classes: int) -> None:
        super().__init__(conv_norm_relu(inputs, width), nn.Conv2d(width, num_classes, 1))


def encode_boxes(boxes: Tensor, cells: Tensor) -> Tensor:
    """Regression targets (M, 8) of boxes (M, 7) whose centres lie at `cells` (M, 2)."""
    offset = cells - cells.floor() - 0.5
    z, dims, yaw = boxes[:, 2:3], boxes[:, 3:6], boxes[:, 6:]
    return torch.cat([offset, z, dims.log(), yaw.sin(), yaw.cos()], dim=1)


def decode_boxes(regression: Tensor, cells: Tensor, grid: BEVGrid) -> Tensor:
    """Boxes (P, 7) from regressions (P, 8) at integer cells (P, 2); undoes `encode_boxes`."""
    xy = to_metres(cells + 0.5 + regression[:, :2], grid)
    z, dims = regression[:, 2:3], regression[:, 3:6].exp()
    yaw = torch.atan2(regression[:, 6:7], regression[:, 7:8])
    return torch.cat([xy, z, dims, yaw], dim=1)


def decode(maps: ObjectMaps, grid: BEVGrid, top_k: int = 50, min_score: float = 0.05) -> Detections:
    """Boxes at the peaks of the heatmap.

    Args:
        maps: Output of `ObjectHead`.
        grid: Cells of the maps.
        top_k: At most so many boxes per frame.
        min_score: Peaks below it are dropped.

    Returns:
        Detections, by descending score within each frame.
    """
    batch, _, nx, ny = maps.heatmap.shape
    heat = maps.heatmap.float().sigmoid()
    # A cell is a peak if it is the maximum of its 3x3 neighbourhood: this stands in for NMS.
    heat = heat * (heat == functional.max_pool2d(heat, 3, stride=1, padding=1))
    scores, index = heat.flatten(1).topk(min(top_k, heat[0].numel()))  # over (K, nx, ny)
    frames = torch.arange(batch, device=heat.device)[:, None].expand_as(index)
    keep = scores >= min_score
    scores, index, frames = scores[keep], index[keep], frames[keep]
    classes, cell = index // (nx * ny), index % (nx * ny)
    ix, iy = cell // ny, cell % ny
    regression = maps.regression.float()[frames, :, ix, iy]  # (P, 8)
    boxes = decode_boxes(regression, torch.stack([ix, iy], dim=1).float(), grid)
    return Detections(boxes, scores, classes, frames)
