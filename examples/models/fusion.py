"""Camera-LiDAR fusion in the bird's-eye view, for objects and maps."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from examples.data.batch import CLASSES, Batch
from examples.grid import BEVGrid
from examples.models.camera import CameraEncoder
from examples.models.heads import Detections, MapHead, ObjectHead, ObjectMaps, decode
from examples.models.layers import conv_norm_relu, plain_stage
from examples.models.lidar import LidarEncoder
from examples.models.losses import MAP_WEIGHT, map_loss, object_loss
from examples.models.sizes import SIZES

SENSORS = ("camera", "lidar")
DEFAULT_GRID = BEVGrid()


class FusionOutput(NamedTuple):
    """Raw outputs of the heads."""

    objects: ObjectMaps
    map_logits: Tensor  # (B, S, nx, ny)
    depth: Tensor | None = None  # (B, D, h, w) probabilities at the camera's pixels


class Decoder(nn.Module):
    """Two scales of convolutions over the fused map.

    Args:
        inputs: Channels of the fused map.
        width: Channels at half resolution and of the output.
    """

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.coarse = plain_stage(inputs, width, blocks=2, stride=2)
        self.mix = conv_norm_relu(inputs + width, width, kernel=1)

    def forward(self, fused: Tensor) -> Tensor:
        """(B, inputs, nx, ny) -> (B, width, nx, ny)."""
        coarse = functional.interpolate(self.coarse(fused), size=fused.shape[-2:], mode="nearest")
        return self.mix(torch.cat([fused, coarse], dim=1))


class FusionModel(nn.Module):
    """Encoders per sensor, a fuser, a decoder and two heads.

    With one sensor the same model serves for pre-training: only the fuser's input differs.

    Args:
        sensors: Which of "camera" and "lidar" the model sees.
        size: "tiny" for benchmarks, "small" and "medium" for a CPU, "large" for a GPU.
        num_object_classes: Number of object classes K.
        num_map_classes: Number of map classes S.
        image_size: (H, W), multiples of 16.
        grid: Cells of the bird's-eye view.

    Raises:
        ValueError: An argument is not one of the above.
    """

    def __init__(
        self,
        sensors: Sequence[str] = SENSORS,
        size: Literal["tiny", "small", "medium", "large"] = "small",
        num_object_classes: int = len(CLASSES),
        num_map_classes: int = 1,
        image_size: tuple[int, int] = (96, 320),
        grid: BEVGrid = DEFAULT_GRID,
    ) -> None:
        super().__init__()
        if not sensors or len(set(sensors)) < len(sensors) or not set(sensors) <= set(SENSORS):
            raise ValueError(f"sensors must be one or both of {SENSORS}, got {tuple(sensors)}.")
        if size not in SIZES:
            raise ValueError(f"size must be one of {tuple(SIZES)}, got {size!r}.")
        if min(num_object_classes, num_map_classes) < 1:
            raise ValueError(
                "num_object_classes and num_map_classes must be at least 1, "
                f"got {num_object_classes} and {num_map_classes}."
            )
        self.grid = grid
        self.num_object_classes, self.num_map_classes = num_object_classes, num_map_classes
        widths = SIZES[size]
        self.encoders = nn.ModuleDict()
        if "camera" in sensors:
            self.encoders["camera"] = CameraEncoder(widths, image_size, self.grid)
        if "lidar" in sensors:
            self.encoders["lidar"] = LidarEncoder(widths, self.grid)
        features = sum(encoder.out_channels for encoder in self.encoders.values())
        self.fuser = conv_norm_relu(features, widths.fuser)
        self.decoder = Decoder(widths.fuser, widths.decoder)
        self.heads = nn.ModuleDict(
            {
                "object": ObjectHead(widths.decoder, widths.head, num_object_classes),
                "map": MapHead(widths.decoder, widths.head, num_map_classes),
            }
        )

    @property
    def sensors(self) -> tuple[str, ...]:
        """The sensors the model sees."""
        return tuple(self.encoders)

    def forward(self, batch: Batch) -> FusionOutput:
        """Predict every map of the batch."""
        features, depth = [], None
        if "camera" in self.encoders:
            lifted, depth = self.encoders["camera"](batch.image, batch.lidar_to_image)
            features.append(lifted)
        if "lidar" in self.encoders:
            encoder = self.encoders["lidar"]
            features.append(encoder(batch.points, batch.point_frame, batch.image.shape[0]))
        x = self.decoder(self.fuser(torch.cat(features, dim=1)))  # (B, decoder, nx, ny)
        return FusionOutput(self.heads["object"](x), self.heads["map"](x), depth)

    def loss(self, output: FusionOutput, batch: Batch) -> dict[str, Tensor]:
        """Scalars `heatmap`, `regression`, `map` and their sum `loss`."""
        boxes = batch.boxes, batch.box_class, batch.box_frame
        parts = object_loss(output.objects, *boxes, self.grid)
        parts["map"] = MAP_WEIGHT * map_loss(output.map_logits, batch.segmentation)
        return {"loss": torch.stack(list(parts.values())).sum(), **parts}

    def depth_loss(self, output: FusionOutput, batch: Batch) -> Tensor:
        """How badly the camera's depths explain the LiDAR points (see `LiftSplat.depth_loss`).

        Raises:
            ValueError: The model has no camera.
        """
        if output.depth is None:
            raise ValueError(f"depth_weight needs the sensor 'camera', but the model has {self.sensors}.")
        loss: Tensor = self.encoders["camera"].vtransform.depth_loss(output.depth, batch)
        return loss

    def detections(self, output: FusionOutput) -> Detections:
        """Decoded boxes of the batch."""
        return decode(output.objects, self.grid)
