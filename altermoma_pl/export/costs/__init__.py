"""What a model costs to run: size, FLOPs, memory and time, of several models side by side."""

from altermoma_pl.export.costs.measuring import measure
from altermoma_pl.export.costs.memory import peak_memory
from altermoma_pl.export.costs.report import CostReport, Costs, Latency
from altermoma_pl.export.costs.timing import time_onnx

__all__ = ["CostReport", "Costs", "Latency", "measure", "peak_memory", "time_onnx"]
