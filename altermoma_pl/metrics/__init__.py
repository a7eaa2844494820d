"""Metrics of bird's-eye-view perception, as `torchmetrics` modules."""

from altermoma_pl.metrics.bev_iou import BEVIoU
from altermoma_pl.metrics.centre_distance import CentreDistanceAP
from altermoma_pl.metrics.nuscenes import NUSCENES_CLASSES, DetectionClass, NuScenesDetection

__all__ = ["NUSCENES_CLASSES", "BEVIoU", "CentreDistanceAP", "DetectionClass", "NuScenesDetection"]
