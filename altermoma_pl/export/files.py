"""A model as a file of torch.export or ONNX, and the proof that ONNX gives the same.

onnx, onnxscript and onnxruntime are imported where they are used (extra `export`).
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from altermoma_pl.export.program import (
    example_tensors,
    exporters_silenced,
    first_line,
    output_tensors,
    program_of,
    shapes_of,
)  # fmt: skip
from altermoma_pl.model.contexts import restored
from altermoma_pl.model.inputs import as_arguments

MAX_DIFFERENCE = 1e-4
"""Largest difference of an output of ONNX from that of torch, relative to its largest absolute value."""


@contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """Where to write a file that then takes its place whole or, after an error or a kill, not at all.

    It is written under its own name in a folder beside it, for ONNX may write a second file that the first
    names. The folder of the file is made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        yield Path(folder, path.name)
        written = sorted(Path(folder).iterdir(), key=lambda each: each.name == path.name)  # it comes last
        for each in written:
            each.replace(path.with_name(each.name))


def to_torch_export(model: nn.Module, example_inputs: Any, path: str | Path, dynamic: bool = True) -> Path:
    """Write the model as a program of `torch.export`.

    `torch.export.load(path).module()(image=..., points=...)` takes the tensors by the names of
    `example_tensors` and gives a dictionary of the outputs.

    Args:
        model: The model.
        example_inputs: As `example_tensors` takes them. What no output depends on is left out.
        path: The file, usually `.pt2`; its folder is made.
        dynamic: Whether the first dimension of each input may vary. Then the example needs at least two
            of everything.

    Raises:
        ValueError: The model does not accept the example, or cannot be traced; the message says where.
    """
    with whole(path) as temporary, restored(model), exporters_silenced():
        program, _, _ = program_of(model, example_inputs, dynamic)
        torch.export.save(program, temporary)
    return Path(path)


def to_onnx(
    model: nn.Module, example_inputs: Any, path: str | Path, opset: int | None = None, dynamic: bool = True
) -> Path:
    """Write the model as ONNX.

    Inputs have the names of `example_tensors`; outputs those of fields, keys and positions, joined by
    ".", or "output".

    Args:
        model: The model.
        example_inputs: As `example_tensors` takes them. What no output depends on is left out.
        path: The file, usually `.onnx`; its folder is made.
        opset: Version of ONNX's operators; None for torch's default. From 18 on, the exporter has its own
            operators; older versions are converted to, which works for simple models only.
        dynamic: Whether the first dimension of each input may vary. Then the example needs at least two
            of everything.

    Raises:
        ModuleNotFoundError: The extra `export` is not installed.
        ValueError: The model does not accept the example, cannot be traced, has no counterpart in ONNX or
            not in this opset, or an output has the name of an input; the message says where.
    """
    _require("onnx", "onnxscript")
    with whole(path) as temporary, restored(model), exporters_silenced():
        program, inputs, outputs = program_of(model, example_inputs, dynamic)
        both = [name for name in outputs if name in inputs]
        if both:
            raise ValueError(
                f"the outputs {both} of {type(model).__name__} have the names of inputs, which ONNX does not "
                "allow: rename these entries, or the arguments or entries of the inputs"
            )
        names: dict[str, Any] = {"input_names": inputs, "output_names": outputs}
        try:
            converted = torch.onnx.export(program, **names, opset_version=opset, dynamo=True, verbose=False)
        except torch.onnx.OnnxExporterError as error:
            found = re.search(r"No ONNX function found for <OpOverload\(op='([^']+)'", str(error))
            reason = f"there is no operator for {found[1]}" if found else first_line(error)
            raise ValueError(f"{type(model).__name__} has no ONNX: {reason}") from error
        assert converted is not None  # noqa: S101  (it is with dynamo=True; for mypy)
        reached = converted.model.opset_imports[""]
        if opset not in (None, reached):
            raise ValueError(
                f"opset {opset} cannot be had for {type(model).__name__}, only {reached}: give 18 or more, "
                "as far as onnx knows it, or None"
            )
        converted.save(temporary)  # beyond 1.5 GB with a second file for the weights, `.data`
    return Path(path)


def check_onnx(path: str | Path, model: nn.Module, inputs: Any) -> float:
    """Compare the outputs of an ONNX file, by onnxruntime on the CPU, with those of the model in eval mode.

    It runs on one thread: on several, onnxruntime gives another result each time for sums by repeated indices
    that were exported as ScatterND, `index_add` of torch among them. Deploy such a model with one thread, too
    (`SessionOptions.intra_op_num_threads`), or write it with `scatter_add`.

    Args:
        path: The file, of `to_onnx`.
        model: The model, on the CPU.
        inputs: As `example_tensors` takes them, of any size that the file allows.

    Returns:
        The largest difference of all outputs, relative to the largest absolute value of an output.

    Raises:
        ModuleNotFoundError: The extra `export` is not installed.
        TypeError: The inputs are of another type.
        ValueError: The file is not of this model, does not accept the inputs, or an output differs by more
            than 1e-4.
    """
    _require("onnxruntime")
    import onnxruntime

    tensors = example_tensors(model, inputs)
    with restored(model), torch.no_grad():
        expected = output_tensors(model.eval()(*as_arguments(inputs)))
    options = onnxruntime.SessionOptions()
    # With several threads its ScatterND is not repeatable where indices repeat (microsoft/onnxruntime#23396).
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    wanted = [each.name for each in session.get_inputs()]
    names = [each.name for each in session.get_outputs()]
    if not set(wanted) <= set(tensors) or set(names) != set(expected):
        raise ValueError(
            f"{path} takes {wanted} and gives {names}, but {type(model).__name__} takes {list(tensors)} and "
            f"gives {list(expected)}: give the model that was exported"
        )
    try:
        found = session.run(names, {name: tensors[name].detach().numpy() for name in wanted})
    except Exception as error:  # onnxruntime has a class of its own for each kind
        raise ValueError(f"{path} does not accept the inputs {shapes_of(tensors)}: {error}") from error
    largest = 0.0
    for name, value in zip(names, found, strict=True):
        difference = _relative_difference(torch.from_numpy(value), expected[name])
        largest = max(largest, difference)
        if not difference <= MAX_DIFFERENCE:  # NaN, too
            raise ValueError(
                f"output {name!r} of {path} differs by {difference:.2g} of its scale from that of "
                f"{type(model).__name__}; {MAX_DIFFERENCE:g} is allowed"
            )
    return largest


def _relative_difference(found: Tensor, expected: Tensor) -> float:
    """Largest absolute difference over the scale of `expected`; infinite if shapes differ."""
    if found.shape != expected.shape:
        return float("inf")
    if not expected.numel():
        return 0.0
    found, expected = found.double(), expected.double()
    apart = (found - expected).abs().masked_fill(found == expected, 0)  # infinity minus itself is NaN
    scale = expected.abs()[expected.isfinite()].max().item() if expected.isfinite().any() else 0.0
    return float(apart.max().item() / (scale or 1.0))


def _require(*modules: str) -> None:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"{' and '.join(missing)} not found: pip install altermoma-pl[export]", name=missing[0]
        )
