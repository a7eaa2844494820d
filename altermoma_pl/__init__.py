"""Fusion redundancy pruning for multi-sensor models trained with PyTorch Lightning."""

from importlib.metadata import PackageNotFoundError, version

from altermoma_pl.callback import AlterMOMACallback, Slimmed
from altermoma_pl.granularity import Channel, Granularity, NofM, Weight
from altermoma_pl.granularity.channels.calibration import ChannelCalibration
from altermoma_pl.granularity.channels.finding import find_channels
from altermoma_pl.granularity.channels.slimming import slim
from altermoma_pl.mask.masks import Masks
from altermoma_pl.mask.schedules import Cubic, Exponential, Linear, OneShot, Rewinding, Schedule
from altermoma_pl.mask.top_k import top_k
from altermoma_pl.model.contexts import deactivated, restored
from altermoma_pl.model.modality import Modalities
from altermoma_pl.plain_torch import hold, prune
from altermoma_pl.report.sparsity import SparsityReport
from altermoma_pl.score import (
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

try:
    __version__ = version("altermoma-pl")  # pyproject.toml is the only source
except PackageNotFoundError:  # imported from a folder that was never installed
    __version__ = "0+unknown"

__all__ = [
    "SNIP",
    "AlterEva",
    "AlterMOMACallback",
    "Calibration",
    "Channel",
    "ChannelCalibration",
    "Components",
    "Criterion",
    "Cubic",
    "Exponential",
    "GraSP",
    "Granularity",
    "Linear",
    "Magnitude",
    "Masks",
    "Modalities",
    "NofM",
    "OneShot",
    "ProsPr",
    "Random",
    "Rewinding",
    "Schedule",
    "Slimmed",
    "SparsityReport",
    "SynFlow",
    "Taylor",
    "Wanda",
    "Weight",
    "choose_beta",
    "deactivated",
    "find_channels",
    "hold",
    "prune",
    "restored",
    "slim",
    "top_k",
]
