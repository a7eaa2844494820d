"""Criteria: which weights matter."""

from altermoma_pl.criteria.altereva import AlterEva
from altermoma_pl.criteria.base import Calibration, Criterion, LossFunction, Scores
from altermoma_pl.criteria.beta import MakeMasks, choose_beta
from altermoma_pl.criteria.components import Components
from altermoma_pl.criteria.gradient import SNIP, Taylor
from altermoma_pl.criteria.grasp import GraSP
from altermoma_pl.criteria.prospr import ProsPr
from altermoma_pl.criteria.simple import Magnitude, Random
from altermoma_pl.criteria.synflow import SynFlow
from altermoma_pl.criteria.wanda import Wanda

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
