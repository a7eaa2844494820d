"""Comparisons of criteria: many runs, one table."""

from altermoma_pl.compare.benchmark import Benchmark, Direction, Method, Values
from altermoma_pl.compare.runner import compare
from altermoma_pl.compare.summary import Estimate, Summary, paired_difference

__all__ = [
    "Benchmark",
    "Direction",
    "Estimate",
    "Method",
    "Summary",
    "Values",
    "compare",
    "paired_difference",
]
