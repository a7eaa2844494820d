"""What a model costs to run: size, FLOPs, memory and time, of several models side by side."""

from altermoma_pl.export.costs.measuring import measure
from altermoma_pl.export.costs.onnx import time_onnx
from altermoma_pl.export.costs.operators import Flops, count_flops, peak_memory
from altermoma_pl.export.costs.quantities import Costs, Latency
from altermoma_pl.export.costs.report import CostReport

__all__ = ["CostReport", "Costs", "Flops", "Latency", "count_flops", "measure", "peak_memory", "time_onnx"]
