"""Costs of several models side by side: table, notes, json and csv."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from altermoma_pl.export.costs.quantities import Costs, Latency, check_counts
from altermoma_pl.report.tables import Table, to_csv, to_json

_DASH = "-"


@dataclass(frozen=True)
class CostReport:
    """What models cost, side by side.

    Args:
        batch: Batch size of FLOPs and peak memory.
        costs: Model name -> its costs. The first is the reference.
    """

    batch: int
    costs: Mapping[str, Costs]

    def __post_init__(self) -> None:
        if not self.costs:
            raise ValueError("a cost report needs at least one model")
        check_counts(self, batch=1)

    @property
    def notes(self) -> tuple[str, ...]:
        """How to read the numbers."""
        missing = dict.fromkeys(what for costs in self.costs.values() for what in costs.uncounted)
        timings = [own for costs in self.costs.values() for own in costs.latency]
        ways = dict.fromkeys(
            f"median of {own.repeats} runs after {own.warm_up} to warm up, quartiles in brackets, "
            f"{own.threads} thread{'s' * (own.threads != 1)} of torch, on {own.device}"
            for own in timings
        )
        on_gpu = any(own.device.startswith("cuda") for own in timings)
        scratch = "with what kernels need inside" if on_gpu else "without scratch memory inside an operator"
        return (
            "Zeros in dense tensors save no time, no FLOPs and no memory: dense kernels multiply them too. "
            "They only make the compressed file smaller. Time is saved where channels are removed.",
            f"FLOPs: two for each multiply-add, batch {self.batch}; element-wise operators are not counted"
            + (f", nor is the work of {', '.join(missing)}." if missing else "."),
            f"Peak memory: bytes alive at once beyond weights and inputs, batch {self.batch}, {scratch}.",
            *(f"Latency: {way}; models took turns, in an order reversed every round." for way in ways),
            "Compressed: gzip, level 6, of the state_dict as torch.save writes it.",
        )

    @property
    def records(self) -> list[dict[str, Any]]:
        """Of each model: its name, and every number; None where it could not be measured."""
        return [{"model": name, **costs.values()} for name, costs in self.costs.items()]

    def table(self, title: str = "Costs") -> Table:
        """A row for each quantity, a column for each model and its ratio to the first, and the notes."""
        first, *others = self.costs
        values = {name: costs.values() for name, costs in self.costs.items()}
        rows = []
        for key, label in self._rows().items():
            row = [label, _shown(key, values[first])]
            for name in others:
                row += [_shown(key, values[name]), _ratio(values[name].get(key), values[first].get(key))]
            rows.append(tuple(row))
        header = ("", first, *(column for name in others for column in (name, f"/ {first}")))
        return Table(title, header, tuple(rows), caption="\n".join(self.notes))

    def to_text(self, title: str = "Costs", width: int | None = None) -> str:
        """The table as plain text, as wide as the terminal unless said otherwise."""
        return self.table(title).to_text(width)

    def to_json(self) -> str:
        """`batch` and, by model, all fields of its costs; a number that is not finite becomes null."""
        return to_json(asdict(self))

    def to_csv(self) -> str:
        """One line for each of the records."""
        return to_csv(self.records)

    @classmethod
    def from_json(cls, text: str) -> CostReport:
        """The report that `to_json` wrote.

        Raises:
            ValueError: If it is anything else.
        """
        try:
            content = json.loads(text)
            report = cls(content["batch"], {name: _costs(own) for name, own in content["costs"].items()})
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"this is no cost report, as CostReport.to_json writes it: {type(error).__name__}: {error}"
            ) from error
        return report

    def _rows(self) -> dict[str, str]:
        """Key in `Costs.values` -> label, of every line of the table."""
        rows = {
            "num_parameters": "parameters",
            "num_nonzero": "not zero",
            "flops": "FLOPs",
            "peak_memory": "peak memory",
        }
        for costs in self.costs.values():
            rows |= {f"latency.{own.batch}.median": f"latency, batch {own.batch}" for own in costs.latency}
        rows |= {"file_bytes": "file", "compressed_bytes": "file, compressed"}
        for costs in self.costs.values():
            rows |= {f"metrics.{name}": name for name in costs.metrics}
        return rows


def _shown(key: str, values: Mapping[str, float | None]) -> str:
    value = values.get(key)
    if value is None:
        return _DASH
    if key.startswith("latency."):
        stem = key.removesuffix("median")
        low, high = (1e3 * (values[stem + end] or 0.0) for end in ("low", "high"))
        return f"{1e3 * value:.3f} ms [{low:.3f}, {high:.3f}]"
    return _FORMATS.get(key, "{:.4g}".format)(value)


def _scaled(value: float, unit: str = "") -> str:
    for prefix in ("", "k", "M", "G", "T"):
        if value < 999.5 or prefix == "T":
            break
        value /= 1000
    return f"{value:.4g} {prefix}{unit}".rstrip()


def _bytes(value: float) -> str:
    return _scaled(value, "B")


_FORMATS: Mapping[str, Callable[[float], str]] = {
    "num_parameters": "{:,}".format,
    "num_nonzero": "{:,}".format,
    "flops": _scaled,
    "peak_memory": _bytes,
    "file_bytes": _bytes,
    "compressed_bytes": _bytes,
}


def _ratio(value: float | None, reference: float | None) -> str:
    if value is None or not reference or not math.isfinite(value / reference):
        return _DASH
    return f"{value / reference:.3f}"


def _costs(content: Mapping[str, Any]) -> Costs:
    latency = tuple(Latency(**own) for own in content["latency"])
    metrics = {name: math.nan if value is None else value for name, value in content["metrics"].items()}
    if not isinstance(content["uncounted"], list):
        raise TypeError(f"uncounted must be a list, got {content['uncounted']!r}")
    given = {"latency": latency, "metrics": metrics, "uncounted": tuple(content["uncounted"])}
    return Costs(**{**content, **given})
