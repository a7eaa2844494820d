"""What the checkpoint of a slim model holds, as table, json, csv and figure."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich.table import Table

from altermoma_pl.export.costs import CostReport
from altermoma_pl.model.modality import SHARED
from altermoma_pl.report import figures
from altermoma_pl.report.sparsity import as_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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

    def to_text(self) -> str:
        """The widths of every group, and the costs."""
        kept = sum(width.num_kept for width in self.widths)
        total = sum(width.num_channels for width in self.widths)
        table = Table(title=f"Slim model: {kept:,} of {total:,} channels kept", title_justify="left")
        table.add_column("modality")
        table.add_column("channels of", overflow="fold")
        for header in ("before", "kept", "share"):
            table.add_column(header, justify="right")
        for width in sorted(self.widths, key=lambda each: self._modalities.index(each.modality)):
            share = f"{width.num_kept / width.num_channels:.4f}"
            table.add_row(width.modality, width.name, str(width.num_channels), str(width.num_kept), share)
        texts = [as_text(table)] + ([self.costs.to_text("Costs when it was written")] if self.costs else [])
        return "\n\n".join(texts)

    def to_json(self) -> str:
        """`widths`, and `costs` as `CostReport.to_json`, null if not measured."""
        costs = json.loads(self.costs.to_json()) if self.costs else None
        return json.dumps({"widths": [asdict(width) for width in self.widths], "costs": costs}, indent=2)

    def to_csv(self) -> str:
        """One line for each group: name, modality, num_channels, num_kept."""
        text = io.StringIO()
        writer = csv.DictWriter(text, list(Width.__dataclass_fields__), lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(width) for width in self.widths)
        return text.getvalue()

    def draw(self) -> dict[str, Figure]:
        """Name -> figure."""
        before = {width.name: width.num_channels for width in self.widths}
        after = {width.name: width.num_kept for width in self.widths}
        return {"widths": figures.widths(before, after, {w.name: w.modality for w in self.widths})}

    @property
    def _modalities(self) -> list[str]:
        """In the order of the model."""
        return list(dict.fromkeys(width.modality for width in self.widths))
