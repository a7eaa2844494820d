"""What is pruned where: per layer and per modality, as table, json and csv."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from altermoma_pl.mask.masks import Masks


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
        totals: dict[str, LayerReport] = {}
        for layer in self.layers:
            so_far = totals.get(layer.group, LayerReport("", layer.group, 0, 0))
            totals[layer.group] = LayerReport(
                "",
                layer.group,
                so_far.num_weights + layer.num_weights,
                so_far.num_kept + layer.num_kept,
            )
        return totals

    @property
    def total(self) -> LayerReport:
        """All prunable weights taken together."""
        groups = self.groups.values()
        return LayerReport("", "", sum(g.num_weights for g in groups), sum(g.num_kept for g in groups))

    @property
    def sparsity(self) -> float:
        """Share of zeros among all prunable weights, in [0, 1]."""
        return 1 - self.total.kept

    def table(self, title: str = "Kept weights") -> Table:
        """Kept share per modality and per layer, and the losses."""
        removed = "".join(f", {share:.4f} of the {what} removed" for what, share in self.removed.items())
        table = Table(title=f"{title}: sparsity {self.sparsity:.4f}{removed}", title_justify="left")
        table.add_column("modality")
        table.add_column("layer", overflow="fold")
        for header in ("weights", "kept", "share"):
            table.add_column(header, justify="right")
        for group, total in self.groups.items():
            table.add_section()
            table.add_row(f"[bold]{group}", "[bold]all", *_numbers(total))
            for layer in self.rows:
                if layer.group == group:
                    table.add_row("", layer.name, *_numbers(layer))
        if self.losses:
            table.caption = "loss: " + ", ".join(
                f"{name.replace('_', ' ')} {value:.4g}" for name, value in self.losses.items()
            )
            table.caption_justify = "left"
        return table

    def to_text(self, title: str = "Kept weights", width: int | None = None) -> str:
        """The table as plain text, as wide as the terminal unless said otherwise."""
        return as_text(self.table(title), width)

    def to_json(self) -> str:
        """`sparsity`, `groups`, `layers`, `losses` and, where channels are pruned, `removed` as json."""
        return json.dumps(
            {
                "sparsity": self.sparsity,
                **({"removed": dict(self.removed)} if self.removed else {}),
                "groups": {
                    name: {"num_weights": g.num_weights, "num_kept": g.num_kept, "kept": g.kept}
                    for name, g in self.groups.items()
                },
                "layers": [_row(layer) for layer in self.layers],
                "losses": dict(self.losses),
            },
            indent=2,
        )

    def to_csv(self) -> str:
        """One line for each layer: name, group, num_weights, num_kept, kept."""
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(_row(self.layers[0])), lineterminator="\n")
        writer.writeheader()
        writer.writerows(_row(layer) for layer in self.layers)
        return text.getvalue()


def as_text(table: Table, width: int | None = None) -> str:
    """A table as plain text, as wide as the terminal unless said otherwise."""
    columns = width or shutil.get_terminal_size(fallback=(110, 24)).columns
    console = Console(file=io.StringIO(), width=columns, color_system=None)
    with console.capture() as capture:
        console.print(table)
    return capture.get().rstrip()


def _row(layer: LayerReport) -> dict[str, Any]:
    return {**asdict(layer), "kept": layer.kept}


def _numbers(layer: LayerReport) -> tuple[str, str, str]:
    return f"{layer.num_weights:,}", f"{layer.num_kept:,}", f"{layer.kept:.4f}"
