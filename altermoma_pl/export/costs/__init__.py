"""What a model costs to run: size, FLOPs, memory and time, of several models side by side."""

from altermoma_pl.export.costs.measuring import measure, peak_memory, time_onnx
from altermoma_pl.export.costs.report import CostReport, Costs, Latency

__all__ = ["CostReport", "Costs", "Latency", "measure", "peak_memory", "time_onnx"]
