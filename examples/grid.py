"""The bird's-eye-view grid that data and model share."""

from dataclasses import dataclass


@dataclass(frozen=True)
class BEVGrid:
    """Square cells on the ground, in the LiDAR frame (x forward, y left, z up), in metres.

    Maps are indexed [ix, iy]: cell (0, 0) lies at (x_min, y_min).
    """

    x_min: float = 0.0
    x_max: float = 38.4
    y_min: float = -19.2
    y_max: float = 19.2
    cell: float = 0.8

    @property
    def shape(self) -> tuple[int, int]:
        """Number of cells along x and y."""
        return round((self.x_max - self.x_min) / self.cell), round((self.y_max - self.y_min) / self.cell)
