"""Metrics of bird's-eye-view perception, as `torchmetrics` modules."""

from altermoma_pl.metrics.bev_iou import BEVIoU
from altermoma_pl.metrics.centre_distance import (
    NUSCENES_CLASSES,
    CentreDistanceAP,
    DetectionClass,
    NuScenesDetection,
)
from altermoma_pl.metrics.kitti import KittiAP
from altermoma_pl.metrics.kitti_rules import KittiDetections, KittiTargets, kitti_types
from altermoma_pl.metrics.rotated_iou import rotated_iou_3d, rotated_iou_bev

__all__ = [
    "NUSCENES_CLASSES",
    "BEVIoU",
    "CentreDistanceAP",
    "DetectionClass",
    "KittiAP",
    "KittiDetections",
    "KittiTargets",
    "NuScenesDetection",
    "kitti_types",
    "rotated_iou_3d",
    "rotated_iou_bev",
]
