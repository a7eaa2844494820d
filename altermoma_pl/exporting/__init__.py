"""`altermoma export`, and what `altermoma report` shows of a slim checkpoint."""

from altermoma_pl.exporting.exporting import SUFFIXES, Exported, export
from altermoma_pl.exporting.report import SlimReport
from altermoma_pl.exporting.run import Run

__all__ = ["SUFFIXES", "Exported", "Run", "SlimReport", "export"]
