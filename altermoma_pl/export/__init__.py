"""A model of several inputs as a file of torch.export or ONNX, slim where channels were pruned.

The model is traced in eval mode and left as it was, bit for bit, also after an exception.
"""

from altermoma_pl.export.command import Exported, export
from altermoma_pl.export.costs.report import SlimReport
from altermoma_pl.export.files import check_onnx, to_onnx, to_torch_export
from altermoma_pl.export.program import example_tensors

__all__ = ["Exported", "SlimReport", "check_onnx", "example_tensors", "export", "to_onnx", "to_torch_export"]
