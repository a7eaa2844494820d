"""What the checkpoint of a slim model holds, as table, json, csv and figure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from altermoma_pl.export.costs import CostReport
from altermoma_pl.model.modality import SHARED
from altermoma_pl.report import figures
from altermoma_pl.report.tables import Table, to_csv, to_json

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
