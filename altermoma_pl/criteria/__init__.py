"""Criteria: which weights matter."""

from altermoma_pl.criteria.altereva import AlterEva
from altermoma_pl.criteria.base import Calibration, Criterion, LossFunction, Scores
from altermoma_pl.criteria.beta import MakeMasks, choose_beta
from altermoma_pl.criteria.components import Components
from altermoma_pl.criteria.simple import Magnitude, Random

__all__ = [
    "AlterEva",
    "Calibration",
    "Components",
    "Criterion",
    "LossFunction",
    "Magnitude",
    "MakeMasks",
    "Random",
    "Scores",
    "choose_beta",
]
