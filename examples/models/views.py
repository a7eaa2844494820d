"""What a sensor that fails leaves of a batch: the views under which a model is evaluated."""

from collections.abc import Callable

import torch
from torch import Tensor

from examples.data.batch import Batch
from examples.models.fusion import SENSORS

DARKNESS, NOISE = 0.3, 40.0  # share of the light that is left, standard deviation in grey levels
RING_STEP = 4  # of so many rings of the LiDAR one is left
NUM_RINGS = 32  # in ELEVATION; a ring of the synthetic LiDAR is about as wide
ELEVATION = (-0.42, 0.04)  # radians, of the synthetic LiDAR; KITTI's is nearly the same


def drop_sensor(batch: Batch, sensor: str) -> Batch:
    """The batch as if a sensor had failed: a black image, or not a single point.

    Raises:
        ValueError: `sensor` is neither "camera" nor "lidar".
    """
    if sensor == "camera":
        return batch._replace(image=torch.zeros_like(batch.image))
    if sensor == "lidar":
        return batch._replace(points=batch.points[:0], point_frame=batch.point_frame[:0])
    raise ValueError(f"The sensor to drop must be one of {SENSORS}, got {sensor!r}.")


def degrade_camera(batch: Batch, seed: int = 0) -> Batch:
    """The batch as if taken at dusk: images darker and noisy, the same each time.

    The noise of a frame depends on its content, not on its place in a batch, so that the size of
    batches does not matter.

    Args:
        batch: On any device.
        seed: Of the noise.
    """
    noise = torch.stack([_noise(image, seed) for image in batch.image])
    image = DARKNESS * batch.image.float() + NOISE * noise.to(batch.image.device)
    return batch._replace(image=image.round().clamp(0, 255).to(torch.uint8))


def _noise(image: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed + int(image.sum(dtype=torch.int64)))
    return torch.randn(image.shape, generator=generator)


def drop_beams(batch: Batch) -> Batch:
    """The batch as if the LiDAR had lost three of four beams: the points of every fourth ring.

    Rings are bands of elevation as seen from the LiDAR, so that any LiDAR will do.
    """
    x, y, z = batch.points[:, :3].unbind(1)
    low, high = ELEVATION
    elevation = torch.atan2(z, torch.hypot(x, y))
    ring = ((elevation - low) * (NUM_RINGS / (high - low))).floor()
    kept = ring % RING_STEP == 0
    return batch._replace(points=batch.points[kept], point_frame=batch.point_frame[kept])


VIEWS: dict[str, Callable[[Batch], Batch]] = {
    "both": lambda batch: batch,
    "camera dropped": lambda batch: drop_sensor(batch, "camera"),
    "LiDAR dropped": lambda batch: drop_sensor(batch, "lidar"),
    "camera degraded": degrade_camera,
    "beams dropped": drop_beams,
}
