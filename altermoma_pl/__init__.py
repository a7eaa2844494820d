"""Fusion redundancy pruning for multi-sensor models trained with PyTorch Lightning."""

from altermoma_pl.callback import AlterMOMACallback
from altermoma_pl.contexts import deactivated, restored
from altermoma_pl.criteria import (
    SNIP,
    AlterEva,
    Calibration,
    Components,
    Criterion,
    GraSP,
    Magnitude,
    ProsPr,
    Random,
    SynFlow,
    Taylor,
    Wanda,
    choose_beta,
)
from altermoma_pl.masks import Masks
from altermoma_pl.modality import Modalities
from altermoma_pl.report import SparsityReport
from altermoma_pl.schedules import Cubic, Exponential, Linear, OneShot, Rewinding, Schedule
from altermoma_pl.sparsity import top_k

__all__ = [
    "SNIP",
    "AlterEva",
    "AlterMOMACallback",
    "Calibration",
    "Components",
    "Criterion",
    "Cubic",
    "Exponential",
    "GraSP",
    "Linear",
    "Magnitude",
    "Masks",
    "Modalities",
    "OneShot",
    "ProsPr",
    "Random",
    "Rewinding",
    "Schedule",
    "SparsityReport",
    "SynFlow",
    "Taylor",
    "Wanda",
    "choose_beta",
    "deactivated",
    "restored",
    "top_k",
]
