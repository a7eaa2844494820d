"""Criteria: which weights matter."""

from altermoma_pl.score.altereva import AlterEva
from altermoma_pl.score.calibration import Calibration, LossFunction
from altermoma_pl.score.combination import Components
from altermoma_pl.score.criterion import Criterion, Scores
from altermoma_pl.score.decision import MakeMasks, choose_beta
from altermoma_pl.score.second_order import GraSP, ProsPr
from altermoma_pl.score.simple import SNIP, Magnitude, Random, Taylor, Wanda
from altermoma_pl.score.synflow import SynFlow

__all__ = [
    "SNIP",
    "AlterEva",
    "Calibration",
    "Components",
    "Criterion",
    "GraSP",
    "LossFunction",
    "Magnitude",
    "MakeMasks",
    "ProsPr",
    "Random",
    "Scores",
    "SynFlow",
    "Taylor",
    "Wanda",
    "choose_beta",
]
