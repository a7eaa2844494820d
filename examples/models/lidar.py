"""LiDAR branch: points -> pillars -> bird's-eye view."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from examples.grid import BEVGrid
from examples.models.cells import flat_index, to_cells
from examples.models.layers import NORM_EPS, NORM_MOMENTUM, conv_norm_relu, plain_stage
from examples.models.sizes import ModelSize


class PointNorm(nn.BatchNorm1d):
    """BatchNorm1d that falls back on its running statistics for fewer than two points."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C) -> (N, C)."""
        if self.training and x.shape[0] < 2:  # no variance to speak of: BatchNorm1d would raise
            mean, variance = self.running_mean, self.running_var
            return functional.batch_norm(x, mean, variance, self.weight, self.bias, eps=self.eps)
        return super().forward(x)


class Pillars(nn.Module):
    """Describe every point, then take the maximum over the points of each pillar.

    Args:
        size: Widths and pillars per cell.
        grid: Cells of the bird's-eye view.
    """

    num_features = 9  # x, y, z, reflectance, offset to the pillar's mean (3) and centre (2)

    def __init__(self, size: ModelSize, grid: BEVGrid) -> None:
        super().__init__()
        self.grid = grid
        self.per_cell = size.pillars_per_cell
        self.linear = nn.Linear(self.num_features, size.pillar, bias=False)
        self.norm = PointNorm(size.pillar, eps=NORM_EPS, momentum=NORM_MOMENTUM)

    @property
    def shape(self) -> tuple[int, int]:
        """Number of pillars along x and y."""
        nx, ny = self.grid.shape
        return nx * self.per_cell, ny * self.per_cell

    def forward(self, points: Tensor, point_frame: Tensor, batch: int) -> Tensor:
        """(N, 4), (N,) -> (B, C, nx, ny) in pillars; pillars without a point are 0."""
        nx, ny = self.shape
        cells = to_cells(points[:, :2], self.grid, self.per_cell)
        index, inside = flat_index(cells, point_frame, self.shape)
        if self.training:  # the norm's statistics are over the points inside
            points, cells, index = points[inside], cells[inside], index[inside]
        else:  # nothing of a size that depends on data: such a model can be exported
            points, cells = points.where(inside[:, None], 0), cells.where(inside[:, None], 0)
            index = index.where(inside, batch * nx * ny)
        features = functional.relu(self.norm(self.linear(self.describe(points, cells, index, batch))))
        # One more pillar than the maps have: the dump for everything outside.
        pillars = features.new_zeros(batch * nx * ny + 1, features.shape[1])
        # 0 is the minimum of a ReLU, so starting from zeros does not change the maximum.
        pillars = pillars.scatter_reduce(0, index[:, None].expand_as(features), features, "amax")[:-1]
        # (B*nx*ny, C) -> (B, C, nx, ny), channels last in memory as it comes
        return pillars.view(batch, nx, ny, features.shape[1]).permute(0, 3, 1, 2)

    def describe(self, points: Tensor, cells: Tensor, index: Tensor, batch: int) -> Tensor:
        """Features of the points, (N, 9), inside the grid each about [-1, 1]."""
        nx, ny = self.shape
        ones = torch.ones_like(points[:, :1])
        summands = torch.cat([points[:, :3], ones], dim=1)
        # Not index_add: onnxruntime sums its ONNX wrongly on several threads.
        sums = points.new_zeros(batch * nx * ny + 1, 4)
        sums = sums.scatter_add(0, index[:, None].expand_as(summands), summands)[index]
        to_mean = points[:, :3] - sums[:, :3] / sums[:, 3:]
        to_centre = cells - cells.floor() - 0.5
        extent = self.grid.x_max - self.grid.x_min
        position = points[:, :3] / points.new_tensor([extent, extent, 2.0])
        return torch.cat([position, points[:, 3:], to_mean, to_centre], dim=1)


class LidarBackbone(nn.Module):
    """Plain convolutions at the BEV cell and at twice the BEV cell, both brought to the BEV cell.

    Args:
        size: Widths and depths.
    """

    def __init__(self, size: ModelSize) -> None:
        super().__init__()
        fine, coarse = size.lidar_widths
        self.fine = plain_stage(size.pillar, fine, size.lidar_blocks[0], size.pillars_per_cell)
        self.coarse = plain_stage(fine, coarse, size.lidar_blocks[1], stride=2)
        # Mixed before it is enlarged: a 1x1 convolution commutes with nearest-neighbour copies.
        self.from_fine = conv_norm_relu(fine, size.lidar_bev, kernel=1)
        self.from_coarse = conv_norm_relu(coarse, size.lidar_bev, kernel=1)
        self.out_channels = 2 * size.lidar_bev

    def forward(self, pillars: Tensor) -> Tensor:
        """(B, pillar, nx * p, ny * p) -> (B, out_channels, nx, ny)."""
        fine = self.fine(pillars)
        coarse = self.from_coarse(self.coarse(fine))
        coarse = functional.interpolate(coarse, size=fine.shape[-2:], mode="nearest")
        return torch.cat([self.from_fine(fine), coarse], dim=1)


class LidarEncoder(nn.Module):
    """Points to bird's-eye view features.

    Args:
        size: Widths and depths.
        grid: Cells of the output.
    """

    def __init__(self, size: ModelSize, grid: BEVGrid) -> None:
        super().__init__()
        self.pillars = Pillars(size, grid)
        self.backbone = LidarBackbone(size)
        self.out_channels = self.backbone.out_channels

    def forward(self, points: Tensor, point_frame: Tensor, batch: int) -> Tensor:
        """(N, 4), (N,) -> (B, out_channels, nx, ny)."""
        return self.backbone(self.pillars(points, point_frame, batch))
