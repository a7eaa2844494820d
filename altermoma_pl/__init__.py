"""Fusion redundancy pruning for multi-sensor models trained with PyTorch Lightning."""

from altermoma_pl.callback import AlterMOMACallback
from altermoma_pl.contexts import deactivated, restored
from altermoma_pl.criteria import (
    AlterEva,
    Calibration,
    Components,
    Criterion,
    Magnitude,
    Random,
    choose_beta,
)
from altermoma_pl.masks import Masks
from altermoma_pl.modality import Modalities
from altermoma_pl.report import SparsityReport
from altermoma_pl.schedules import Cubic, Exponential, Linear, OneShot, Rewinding, Schedule
from altermoma_pl.sparsity import top_k

__all__ = [
    "AlterEva",
    "AlterMOMACallback",
    "Calibration",
    "Components",
    "Criterion",
    "Cubic",
    "Exponential",
    "Linear",
    "Magnitude",
    "Masks",
    "Modalities",
    "OneShot",
    "Random",
    "Rewinding",
    "Schedule",
    "SparsityReport",
    "choose_beta",
    "deactivated",
    "restored",
    "top_k",
]
