"""What every loader of the examples yields and every model of the examples takes."""

from typing import NamedTuple

from torch import Tensor

CLASSES = ("Car", "Pedestrian", "Cyclist")


class Batch(NamedTuple):
    """B frames. Everything metric is in the LiDAR frame: x forward, y left, z up, in metres.

    Points and boxes of all frames are concatenated; `point_frame` and `box_frame` say whose they
    are. A frame may have no point and no box.
    """

    image: Tensor  # (B, 3, H, W) uint8, RGB
    lidar_to_image: Tensor  # (B, 3, 4) float32: [x y z 1] -> [u*d, v*d, d], pixels of `image`, d = depth
    points: Tensor  # (N, 4) float32: x, y, z, reflectance in [0, 1]
    point_frame: Tensor  # (N,) int64 in [0, B)
    boxes: Tensor  # (M, 7) float32: x, y, z of the CENTRE, length, width, height, yaw (0 = +x, ccw)
    box_class: Tensor  # (M,) int64, index into CLASSES
    box_frame: Tensor  # (M,) int64 in [0, B)
    segmentation: Tensor  # (B, S, nx, ny) uint8 in {0, 1}: one map per class, classes may overlap
