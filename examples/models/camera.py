"""Camera branch: image -> features -> bird's-eye view (lift, splat)."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from examples.grid import BEVGrid
from examples.models.cells import flat_index, to_cells
from examples.models.layers import conv_norm_relu, residual_stage
from examples.models.sizes import ModelSize

NECK_STRIDE = 8
# Heights (m, LiDAR frame) that are pooled: from below the road to above a truck.
Z_RANGE = (-4.0, 3.0)
MIN_DEPTH = 1.0


class CameraBackbone(nn.Module):
    """Residual network: a stem at stride 2, then stages at strides 4, 8 and 16."""

    def __init__(self, size: ModelSize) -> None:
        super().__init__()
        self.stem = conv_norm_relu(3, size.camera_stem, kernel=5, stride=2)
        widths = (size.camera_stem, *size.camera_widths)
        self.stages = nn.ModuleList(
            residual_stage(inputs, outputs, blocks, stride=2)
            for inputs, outputs, blocks in zip(widths[:-1], widths[1:], size.camera_blocks, strict=True)
        )

    def forward(self, image: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> features at strides 8 and 16."""
        x = self.stem(image)
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return features[1:]


class CameraNeck(nn.Module):
    """Bring stride 16 up to stride 8 and mix the two."""

    def __init__(self, size: ModelSize) -> None:
        super().__init__()
        self.reduce = conv_norm_relu(sum(size.camera_widths[1:]), size.neck, kernel=1)
        self.mix = conv_norm_relu(size.neck, size.neck)

    def forward(self, features: list[Tensor]) -> Tensor:
        """[(B, c8, h, w), (B, c16, h / 2, w / 2)] -> (B, neck, h, w)."""
        fine, coarse = features
        coarse = functional.interpolate(coarse, size=fine.shape[-2:], mode="nearest")
        return self.mix(self.reduce(torch.cat([fine, coarse], dim=1)))


class LiftSplat(nn.Module):
    """Lift every pixel to a distribution over depth and splat it on the ground plane.

    Args:
        size: Widths and the step between depths.
        image_size: (H, W) of the input image, multiples of 8.
        grid: Cells of the output.
    """

    frustum: Tensor

    def __init__(self, size: ModelSize, image_size: tuple[int, int], grid: BEVGrid) -> None:
        super().__init__()
        self.grid = grid
        # A camera that looks along x needs no depth beyond the grid.
        self.bins = math.ceil((grid.x_max - MIN_DEPTH) / size.depth_step)
        self.channels = size.camera_bev
        self.depthnet = nn.Conv2d(size.neck, self.bins + self.channels, 1)
        self.smooth = conv_norm_relu(self.channels, self.channels)
        # A buffer, not a parameter: it must be neither pruned nor saved.
        frustum = image_frustum(image_size, self.bins, size.depth_step)
        self.register_buffer("frustum", frustum, persistent=False)

    def forward(self, features: Tensor, lidar_to_image: Tensor) -> Tensor:
        """(B, neck, h, w), (B, 3, 4) -> (B, C, nx, ny)."""
        return self.smooth(self.splat(*self.lift(features), lidar_to_image))

    def lift(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(B, neck, h, w) -> depth probabilities (B, D, h, w), context (B, C, h, w)."""
        depth, context = self.depthnet(features).split([self.bins, self.channels], dim=1)
        return depth.softmax(dim=1), context

    def splat(self, depth: Tensor, context: Tensor, lidar_to_image: Tensor) -> Tensor:
        """Sum depth * context over the pixels and depths that fall in a cell: (B, C, nx, ny)."""
        batch, (nx, ny) = len(depth), self.grid.shape
        cells = self.cells(lidar_to_image)
        with torch.autocast(depth.device.type, enabled=False):  # half precision sums lose mass
            context = context.float().flatten(2).transpose(1, 2)  # (B, h*w, C)
            lifted = depth.float().flatten(2)[..., None] * context[:, None]  # (B, D, h*w, C)
            # One more cell than the maps have: the dump for everything outside.
            pooled = lifted.new_zeros(batch * nx * ny + 1, self.channels)
            pooled = pooled.index_add(0, cells, lifted.flatten(0, 2))[:-1]
        # (B*nx*ny, C) -> (B, C, nx, ny), channels last in memory as it comes
        return pooled.view(batch, nx, ny, self.channels).permute(0, 3, 1, 2)

    def cells(self, lidar_to_image: Tensor) -> Tensor:
        """Flat cell index over (B, nx, ny) of every frustum point, (B*D*h*w,)."""
        batch, (nx, ny) = len(lidar_to_image), self.grid.shape
        a, b = lidar_to_image[:, :, :3], lidar_to_image[:, :, 3:]
        # d * [u, v, 1] = a x + b  =>  x = a^-1 (d * [u, v, 1] - b)
        points = torch.linalg.inv(a) @ (self.frustum - b)  # (B, 3, D*h*w)
        frame = torch.arange(batch, device=points.device)[:, None]
        ground = to_cells(points[:, :2].transpose(1, 2), self.grid)  # (B, D*h*w, 2)
        index, inside = flat_index(ground, frame, self.grid.shape)
        z = points[:, 2]
        inside &= (z >= Z_RANGE[0]) & (z < Z_RANGE[1])
        return index.where(inside, batch * nx * ny).flatten()


def image_frustum(image_size: tuple[int, int], bins: int, step: float) -> Tensor:
    """Points d * [u, v, 1] of the depth bins and the feature pixels, (3, D*h*w), D outermost."""
    height, width = image_size
    if height % (2 * NECK_STRIDE) or width % (2 * NECK_STRIDE):
        raise ValueError(
            f"image_size must be multiples of {2 * NECK_STRIDE} (height, width), got {image_size}."
        )
    v = (torch.arange(height // NECK_STRIDE) + 0.5) * NECK_STRIDE
    u = (torch.arange(width // NECK_STRIDE) + 0.5) * NECK_STRIDE
    depth = MIN_DEPTH + (torch.arange(bins) + 0.5) * step
    d, v, u = torch.meshgrid(depth, v, u, indexing="ij")
    return torch.stack([d * u, d * v, d]).flatten(1)


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

    def forward(self, image: Tensor, lidar_to_image: Tensor) -> Tensor:
        """(B, 3, H, W) uint8, (B, 3, 4) -> (B, out_channels, nx, ny)."""
        if tuple(image.shape[-2:]) != self.image_size:
            raise ValueError(
                f"The model was built for images of {self.image_size} (height, width), got "
                f"{tuple(image.shape[-2:])}. Pass `image_size` or resize in the loader."
            )
        # Channels last makes a training step on a CPU faster by a quarter.
        image = image.contiguous(memory_format=torch.channels_last)
        x = (image.float() / 255 - 0.5) / 0.25
        return self.vtransform(self.neck(self.backbone(x)), lidar_to_image)
