"""Costs of several models side by side, and how wide a slim one is: tables, json, csv and figure."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from altermoma_pl.model.modality import SHARED
from altermoma_pl.report import figures
from altermoma_pl.report.tables import Table, to_csv, to_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DASH = "-"


@dataclass(frozen=True)
class Latency:
    """Seconds of a forward pass."""

    batch: int
    median: float  # over the repeats
    low: float  # lower quartile
    high: float  # upper quartile
    repeats: int  # how many runs were timed
    warm_up: int  # how many went before
    threads: int  # of torch on the CPU
    device: str

    def __str__(self) -> str:
        low, median, high = (f"{1e3 * seconds:.3f}" for seconds in (self.low, self.median, self.high))
        return f"{median} ms [{low}, {high}]"


@dataclass(frozen=True)
class Costs:
    """What one model costs, and what it is worth."""

    num_parameters: int
    num_nonzero: int  # of the parameters
    flops: int | None  # of one forward pass, two for each multiply-add; None if they cannot be counted
    uncounted: tuple[str, ...]  # what did work that is not in `flops`
    peak_memory: int | None  # as `costs.peak_memory`, in bytes; None if it cannot be measured
    latency: tuple[Latency, ...]  # one entry for each batch size
    file_bytes: int  # of the `state_dict` as torch.save writes it
    compressed_bytes: int  # of that file after gzip, level 6
    metrics: Mapping[str, float]  # given by the caller

    def values(self) -> dict[str, float | None]:
        """Every number by its name, as "flops", "latency.1.median", "metrics.mIoU"; None if not finite."""
        counts = ("num_parameters", "num_nonzero", "flops", "peak_memory", "file_bytes", "compressed_bytes")
        quartiles = ("median", "low", "high")
        return {
            **{name: getattr(self, name) for name in counts},
            **{f"latency.{own.batch}.{q}": getattr(own, q) for own in self.latency for q in quartiles},
            **{f"metrics.{n}": value if math.isfinite(value) else None for n, value in self.metrics.items()},
        }

    def lines(self) -> dict[str, tuple[float | None, str]]:
        """Label in the table, with "metrics." before those of metrics, -> number and text."""
        return {
            "parameters": (self.num_parameters, f"{self.num_parameters:,}"),
            "not zero": (self.num_nonzero, f"{self.num_nonzero:,}"),
            "FLOPs": (self.flops, _scaled(self.flops)),
            "peak memory": (self.peak_memory, _scaled(self.peak_memory, "B")),
            **{f"latency, batch {own.batch}": (own.median, str(own)) for own in self.latency},
            "file": (self.file_bytes, _scaled(self.file_bytes, "B")),
            "file, compressed": (self.compressed_bytes, _scaled(self.compressed_bytes, "B")),
            **{
                f"metrics.{name}": (value, f"{value:.4g}" if math.isfinite(value) else _DASH)
                for name, value in self.metrics.items()
            },
        }


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

    def table(self, title: str = "Costs") -> Table:
        """A row for each quantity, a column for each model and its ratio to the first, and the notes."""
        first, *others = self.costs
        lines = {name: costs.lines() for name, costs in self.costs.items()}
        rows = []
        for key in dict.fromkeys(key for own in lines.values() for key in own):
            reference, *rest = (lines[name].get(key, (None, _DASH)) for name in (first, *others))
            ratios = (cell for value, text in rest for cell in (text, _ratio(value, reference[0])))
            rows.append((key.removeprefix("metrics."), reference[1], *ratios))
        header = ("", first, *(column for name in others for column in (name, f"/ {first}")))
        return Table(title, header, tuple(rows), caption="\n".join(self.notes))

    def to_text(self, title: str = "Costs", width: int | None = None) -> str:
        """The table as plain text, as wide as the terminal unless said otherwise."""
        return self.table(title).to_text(width)

    def to_json(self) -> str:
        """`batch` and, by model, all fields of its costs; a number that is not finite becomes null."""
        return to_json(asdict(self))

    def to_csv(self) -> str:
        """One line for each model: its name, and every number; empty where it could not be measured."""
        return to_csv([{"model": name, **costs.values()} for name, costs in self.costs.items()])

    @classmethod
    def from_json(cls, text: str) -> CostReport:
        """The report that `to_json` wrote.

        Raises:
            ValueError: If it is anything else.
        """
        try:
            content = json.loads(text)
            batch, costs = content["batch"], content["costs"]
            for own in costs.values():
                own["latency"] = tuple(Latency(**each) for each in own["latency"])
                own["uncounted"] = tuple(own["uncounted"])
                own["metrics"] = {n: math.nan if v is None else v for n, v in own["metrics"].items()}
            return cls(batch, {name: Costs(**own) for name, own in costs.items()})
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"this is no cost report, as CostReport.to_json writes it: {type(error).__name__}: {error}"
            ) from error


@dataclass(frozen=True)
class Width:
    """A group of coupled channels, called as the first layer that puts them out."""

    name: str
    modality: str
    num_channels: int
    num_kept: int


@dataclass(frozen=True)
class SlimReport:
    """How wide a slim model is, and what it costs.

    Args:
        widths: One entry for each group of channels.
        costs: As they were measured when it was written; None if they were not.
    """

    widths: tuple[Width, ...]
    costs: CostReport | None = None

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> SlimReport:
        """From what `slim_entry` made.

        Raises:
            ValueError: If it is anything else.
        """
        try:
            modalities = entry["modalities"]
            widths = tuple(
                Width(name, modalities.get(name, SHARED), int(total), int(kept))
                for name, (kept, total) in entry["widths"].items()
            )
            costs = CostReport.from_json(entry["costs"]) if "costs" in entry else None
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"what the checkpoint says of its slim model is damaged: {error!r}; write it again with "
                "`altermoma export`"
            ) from error
        return cls(widths, costs)

    def table(self) -> Table:
        """How many channels each group keeps, a modality after the other in the order of the model."""
        kept = sum(width.num_kept for width in self.widths)
        total = sum(width.num_channels for width in self.widths)
        modalities = list(dict.fromkeys(width.modality for width in self.widths))
        rows = tuple(
            (w.modality, w.name, f"{w.num_channels}", f"{w.num_kept}", f"{w.num_kept / w.num_channels:.4f}")
            for w in sorted(self.widths, key=lambda width: modalities.index(width.modality))
        )
        header = ("modality", "channels of", "before", "kept", "share")
        return Table(f"Slim model: {kept:,} of {total:,} channels kept", header, rows, num_labels=2)

    def to_text(self) -> str:
        """The widths of every group, and the costs."""
        costs = [self.costs.to_text("Costs when it was written")] if self.costs else []
        return "\n\n".join([self.table().to_text(), *costs])

    def to_json(self) -> str:
        """`widths`, and `costs` as `CostReport.to_json`, null if not measured."""
        return to_json(asdict(self))

    def to_csv(self) -> str:
        """One line for each group: name, modality, num_channels, num_kept."""
        return to_csv([asdict(width) for width in self.widths])

    def draw(self) -> dict[str, Figure]:
        """Name -> figure."""
        kept_of = {width.name: (width.num_kept, width.num_channels) for width in self.widths}
        return {"widths": figures.widths(kept_of, {width.name: width.modality for width in self.widths})}


def _scaled(value: float | None, unit: str = "") -> str:
    """Four digits with a prefix, such as 7.172 M."""
    if value is None:
        return _DASH
    for prefix in ("", "k", "M", "G", "T"):
        if value < 999.5 or prefix == "T":
            break
        value /= 1000
    return f"{value:.4g} {prefix}{unit}".rstrip()


def _ratio(value: float | None, reference: float | None) -> str:
    share = math.nan if value is None or not reference else value / reference
    return f"{share:.3f}" if math.isfinite(share) else _DASH
