"""Camera branch: image -> features -> bird's-eye view (lift, splat)."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from examples.data.batch import Batch
from examples.grid import BEVGrid
from examples.models.cells import flat_index, to_cells
from examples.models.layers import conv_norm_relu, residual_stage
from examples.models.sizes import ModelSize

STEM_STRIDE = 2
# Heights (m, LiDAR frame) that are pooled: from below the road to above a truck.
Z_RANGE = (-4.0, 3.0)
MIN_DEPTH = 1.0


class CameraBackbone(nn.Module):
    """Residual network: a stem at stride 2, then three stages with the strides of the size."""

    def __init__(self, size: ModelSize) -> None:
        super().__init__()
        self.stem = conv_norm_relu(3, size.camera_stem, kernel=5, stride=STEM_STRIDE)
        widths = (size.camera_stem, *size.camera_widths)
        self.stages = nn.ModuleList(
            residual_stage(inputs, outputs, blocks, stride)
            for inputs, outputs, blocks, stride in zip(
                widths[:-1], widths[1:], size.camera_blocks, size.camera_strides, strict=True
            )
        )

    def forward(self, image: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> features of the last two stages."""
        x = self.stem(image)
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return features[1:]


class CameraNeck(nn.Module):
    """Bring the last stage up to the one before and mix the two."""

    def __init__(self, size: ModelSize) -> None:
        super().__init__()
        self.reduce = conv_norm_relu(sum(size.camera_widths[1:]), size.neck, kernel=1)
        self.mix = conv_norm_relu(size.neck, size.neck)

    def forward(self, features: list[Tensor]) -> Tensor:
        """[(B, c, h, w), (B, c', h / 2, w / 2)] -> (B, neck, h, w)."""
        fine, coarse = features
        coarse = functional.interpolate(coarse, size=fine.shape[-2:], mode="nearest")
        return self.mix(self.reduce(torch.cat([fine, coarse], dim=1)))


class LiftSplat(nn.Module):
    """Lift every pixel to a distribution over depth and splat it on the ground plane.

    Args:
        size: Widths and the step between depths.
        image_size: (H, W) of the input image, multiples of twice the stride of what is lifted.
        grid: Cells of the output.
    """

    frustum: Tensor

    def __init__(self, size: ModelSize, image_size: tuple[int, int], grid: BEVGrid) -> None:
        super().__init__()
        self.grid = grid
        # A camera that looks along x needs no depth beyond the grid.
        self.bins = math.ceil((grid.x_max - MIN_DEPTH) / size.depth_step)
        self.step, self.stride = size.depth_step, lift_stride(size)
        self.channels, self.by_column = size.camera_bev, size.by_column
        self.depthnet = nn.Conv2d(size.neck, self.bins + self.channels, 1)
        self.smooth = conv_norm_relu(self.channels, self.channels)
        # A buffer, not a parameter: it must be neither pruned nor saved.
        frustum = image_frustum(image_size, self.bins, self.step, self.stride)
        self.register_buffer("frustum", frustum, persistent=False)

    def forward(self, features: Tensor, lidar_to_image: Tensor) -> tuple[Tensor, Tensor]:
        """(B, neck, h, w), (B, 3, 4) -> (B, C, nx, ny), depth probabilities (B, D, h, w)."""
        depth, context = self.lift(features)
        return self.smooth(self.splat(depth, context, lidar_to_image)), depth

    def lift(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(B, neck, h, w) -> depth probabilities (B, D, h, w), context (B, C, h, w)."""
        depth, context = self.depthnet(features).split([self.bins, self.channels], dim=1)
        return depth.softmax(dim=1), context

    def splat(self, depth: Tensor, context: Tensor, lidar_to_image: Tensor) -> Tensor:
        """Sum depth * context over the pixels and depths that fall in a cell: (B, C, nx, ny)."""
        batch, (nx, ny) = depth.shape[0], self.grid.shape
        # Half precision sums lose mass, and half precision geometry misses the cell.
        with torch.autocast(depth.device.type, enabled=False):
            points = self.points(lidar_to_image)  # (B, 3, D, h, w)
            z = points[:, 2]
            depth = depth.float() * ((z >= Z_RANGE[0]) & (z < Z_RANGE[1]))
            context = context.float()
            if self.by_column:  # summed over the rows, which share the middle one's cell
                # (B, w, D, h) @ (B, w, h, C) -> (B, w, D, C)
                lifted = depth.permute(0, 3, 1, 2) @ context.permute(0, 3, 2, 1)
                cells = self.cells(points[:, :2, :, depth.shape[2] // 2].transpose(2, 3))
            else:
                lifted = depth[..., None] * context.permute(0, 2, 3, 1)[:, None]  # (B, D, h, w, C)
                cells = self.cells(points[:, :2])
            lifted = lifted.reshape(-1, self.channels)
            # One more cell than the maps have: the dump for everything outside.
            pooled = lifted.new_zeros(batch * nx * ny + 1, self.channels)
            # Not index_add: onnxruntime sums its ONNX wrongly on several threads.
            pooled = pooled.scatter_add(0, cells[:, None].expand_as(lifted), lifted)[:-1]
        # (B*nx*ny, C) -> (B, C, nx, ny), channels last in memory as it comes
        return pooled.view(batch, nx, ny, self.channels).permute(0, 3, 1, 2)

    def points(self, lidar_to_image: Tensor) -> Tensor:
        """Positions of the frustum's points in the LiDAR frame, metres: (B, 3, 4) -> (B, 3, D, h, w)."""
        a, b = lidar_to_image[:, :, :3], lidar_to_image[:, :, 3:]
        # d * [u, v, 1] = a x + b  =>  x = a^-1 (d * [u, v, 1] - b)
        points = inverse(a) @ (self.frustum.flatten(1) - b)  # (B, 3, D*h*w)
        return points.unflatten(2, self.frustum.shape[1:])

    def cells(self, ground: Tensor) -> Tensor:
        """Flat cell index over (B, nx, ny) of positions (B, 2, ...), flat; outside one beyond the last."""
        batch, (nx, ny) = ground.shape[0], self.grid.shape
        frame = torch.arange(batch, device=ground.device)[:, None]
        cells = to_cells(ground.flatten(2).transpose(1, 2), self.grid)  # (B, ..., 2)
        index, inside = flat_index(cells, frame, self.grid.shape)
        return index.where(inside, batch * nx * ny).flatten()

    def depth_loss(self, depth: Tensor, batch: Batch) -> Tensor:
        """Mean negative log-likelihood of the LiDAR points' depths at the pixels they fall in.

        Args:
            depth: (B, D, h, w) probabilities.
            batch: With points; without any in the image the loss is 0.
        """
        a, b = batch.lidar_to_image[:, :, :3], batch.lidar_to_image[:, :, 3]
        projected = torch.einsum("nij,nj->ni", a[batch.point_frame], batch.points[:, :3])
        u, v, d = (projected + b[batch.point_frame]).unbind(1)
        pixel = torch.stack([v, u], dim=1) / (d[:, None].clamp(min=MIN_DEPTH) * self.stride)
        index, inside = flat_index(pixel, batch.point_frame, (depth.shape[2], depth.shape[3]))
        number = ((d - MIN_DEPTH) / self.step).floor().long()
        inside &= (number >= 0) & (number < self.bins)
        likelihood = depth.float().permute(0, 2, 3, 1).reshape(-1, self.bins)[index[inside], number[inside]]
        return -likelihood.clamp(min=1e-6).log().sum() / max(len(likelihood), 1)


def lift_stride(size: ModelSize) -> int:
    """Image pixels per pixel of the features that are lifted."""
    return STEM_STRIDE * math.prod(size.camera_strides[:2])


def inverse(a: Tensor) -> Tensor:
    """Inverses of regular matrices, (B, 3, 3), by cross products: `torch.linalg.inv` has no ONNX operator."""
    first, second, third = a.unbind(dim=1)  # rows, (B, 3) each
    columns = [
        torch.linalg.cross(second, third),
        torch.linalg.cross(third, first),
        torch.linalg.cross(first, second),
    ]
    determinant = (first * columns[0]).sum(dim=1)  # (B,)
    return torch.stack(columns, dim=2) / determinant[:, None, None]


def image_frustum(image_size: tuple[int, int], bins: int, step: float, stride: int = 8) -> Tensor:
    """Points d * [u, v, 1] of the depth bins and the feature pixels, (3, D, h, w)."""
    height, width = image_size
    if height % (2 * stride) or width % (2 * stride):
        raise ValueError(f"image_size must be multiples of {2 * stride} (height, width), got {image_size}.")
    v = (torch.arange(height // stride) + 0.5) * stride
    u = (torch.arange(width // stride) + 0.5) * stride
    depth = MIN_DEPTH + (torch.arange(bins) + 0.5) * step
    d, v, u = torch.meshgrid(depth, v, u, indexing="ij")
    return torch.stack([d * u, d * v, d])


class CameraEncoder(nn.Module):
    """Image to bird's-eye view features.

    Args:
        size: Widths and depths.
        image_size: (H, W).
        grid: Cells of the output.
    """

    def __init__(self, size: ModelSize, image_size: tuple[int, int], grid: BEVGrid) -> None:
        super().__init__()
        self.image_size = tuple(image_size)
        self.backbone = CameraBackbone(size)
        self.neck = CameraNeck(size)
        self.vtransform = LiftSplat(size, self.image_size, grid)
        self.out_channels = size.camera_bev

    def forward(self, image: Tensor, lidar_to_image: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) uint8, (B, 3, 4) -> (B, out_channels, nx, ny), depth probabilities (B, D, h, w)."""
        if tuple(image.shape[-2:]) != self.image_size:
            raise ValueError(
                f"The model was built for images of {self.image_size} (height, width), got "
                f"{tuple(image.shape[-2:])}. Pass `image_size` or resize in the loader."
            )
        # Channels last makes a training step on a CPU faster by a quarter.
        image = image.contiguous(memory_format=torch.channels_last)
        x = (image.float() / 255 - 0.5) / 0.25
        return self.vtransform(self.neck(self.backbone(x)), lidar_to_image)
