"""What is pruned where: per layer and per modality, as table, json and csv."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from altermoma_pl.mask.masks import Masks
from altermoma_pl.report.tables import Table, to_csv, to_json


@dataclass(frozen=True)
class LayerReport:
    """One prunable tensor: its name, group, number of weights, and how many of them stay."""

    name: str
    group: str
    num_weights: int
    num_kept: int

    @property
    def kept(self) -> float:
        """Share of the weights that stays, in [0, 1]."""
        return self.num_kept / self.num_weights


@dataclass(frozen=True)
class SparsityReport:
    """How masks divide the kept weights between layers and modalities.

    Args:
        layers: One entry for each prunable tensor, in the model's order.
        losses: Mean loss over the probe batches in the latest scoring event, as
            `Components.losses`; empty for criteria that measure none.
        shown: Names of the layers in tables and figures; the others count in totals alone. None for all.
        removed: What is gone -> its share, where whole channels are pruned.
    """

    layers: tuple[LayerReport, ...]
    losses: Mapping[str, float]
    shown: tuple[str, ...] | None = None
    removed: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(
        cls, masks: Masks, group_of: Mapping[str, str], losses: Mapping[str, float] | None = None
    ) -> SparsityReport:
        """Report on masks, with the group of each masked parameter."""
        layers = (
            LayerReport(name, group_of[name], mask.numel(), masks.counts[name])
            for name, mask in masks.items()
        )
        return cls(tuple(layers), dict(losses or {}))

    @property
    def rows(self) -> tuple[LayerReport, ...]:
        """The layers in tables and figures."""
        return tuple(layer for layer in self.layers if self.shown is None or layer.name in self.shown)

    @property
    def groups(self) -> dict[str, LayerReport]:
        """Group -> its weights taken together, in the order of the layers."""
        names = dict.fromkeys(layer.group for layer in self.layers)
        return {name: _total(name, [x for x in self.layers if x.group == name]) for name in names}

    @property
    def total(self) -> LayerReport:
        """All prunable weights taken together."""
        return _total("", self.layers)

    @property
    def sparsity(self) -> float:
        """Share of zeros among all prunable weights, in [0, 1]."""
        return 1 - self.total.kept

    @property
    def records(self) -> list[dict[str, Any]]:
        """Of each layer: name, group, num_weights, num_kept, kept."""
        return [asdict(layer) | {"kept": layer.kept} for layer in self.layers]

    def table(self, title: str = "Kept weights") -> Table:
        """Kept share per modality and per layer, and the losses."""
        removed = "".join(f", {share:.4f} of the {what} removed" for what, share in self.removed.items())
        losses = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in self.losses.items())
        rows: list[tuple[str, ...]] = []
        sections = []
        for group, total in self.groups.items():
            sections.append(len(rows))
            rows.append((group, "all", *_numbers(total)))
            rows += [("", layer.name, *_numbers(layer)) for layer in self.rows if layer.group == group]
        return Table(
            title=f"{title}: sparsity {self.sparsity:.4f}{removed}",
            header=("modality", "layer", "weights", "kept", "share"),
            rows=tuple(rows),
            num_labels=2,
            caption=f"loss: {losses}" if losses else "",
            sections=tuple(sections),
        )

    def to_text(self, title: str = "Kept weights", width: int | None = None) -> str:
        """The table as plain text, as wide as the terminal unless said otherwise."""
        return self.table(title).to_text(width)

    def to_json(self) -> str:
        """`sparsity`, `groups`, `layers`, `losses` and, where channels are pruned, `removed` as json."""
        removed = {"removed": self.removed} if self.removed else {}
        groups = {
            name: {"num_weights": total.num_weights, "num_kept": total.num_kept, "kept": total.kept}
            for name, total in self.groups.items()
        }
        content = {"sparsity": self.sparsity, **removed, "groups": groups, "layers": self.records}
        return to_json(content | {"losses": self.losses})

    def to_csv(self) -> str:
        """One line for each of the records."""
        return to_csv(self.records)


def _total(group: str, layers: Sequence[LayerReport]) -> LayerReport:
    num_weights = sum(layer.num_weights for layer in layers)
    return LayerReport("", group, num_weights, sum(layer.num_kept for layer in layers))


def _numbers(layer: LayerReport) -> tuple[str, str, str]:
    return f"{layer.num_weights:,}", f"{layer.num_kept:,}", f"{layer.kept:.4f}"
