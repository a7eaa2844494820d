"""Criteria: which weights matter."""

from altermoma_pl.score.altereva import AlterEva
from altermoma_pl.score.beta import MakeMasks, choose_beta
from altermoma_pl.score.calibration import Calibration, LossFunction
from altermoma_pl.score.components import Components
from altermoma_pl.score.criterion import Criterion, Scores
from altermoma_pl.score.gradient import SNIP, Taylor
from altermoma_pl.score.grasp import GraSP
from altermoma_pl.score.prospr import ProsPr
from altermoma_pl.score.simple import Magnitude, Random
from altermoma_pl.score.synflow import SynFlow
from altermoma_pl.score.wanda import Wanda

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
