"""Metrics of bird's-eye-view perception, as `torchmetrics` modules."""

from altermoma_pl.metrics.bev_iou import BEVIoU
from altermoma_pl.metrics.centre_distance import CentreDistanceAP

__all__ = ["BEVIoU", "CentreDistanceAP"]
