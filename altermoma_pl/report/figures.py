"""Figures: which layers are kept and how wide, importance against redundancy, sparsity over epochs.

matplotlib is imported where it is used (extra `plot`). Colours are those of Okabe and Ito, which
colour-blind readers can tell apart; markers differ as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from altermoma_pl.mask.masks import Masks
from altermoma_pl.model.modality import SHARED
from altermoma_pl.report.sparsity import SparsityReport
from altermoma_pl.score import Components

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
SHARED_COLOUR = "#7F7F7F"
MARKERS = "os^Dv<>"
_MAX_POINTS = 4000


def available() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def draw_pruning(
    report: SparsityReport,
    events: Sequence[Mapping[str, Any]],
    components: Components | None,
    masks: Masks | None,
) -> dict[str, Figure]:
    """Name -> figure, of all that the given data allow."""
    drawn = {"kept_per_layer": kept_per_layer(report)}
    if events:
        drawn["sparsity_over_epochs"] = sparsity_over_epochs(events)
    if events and "widths" in events[-1]:
        # Groups of channels are called as the first layer that puts them out.
        modalities = {layer.name.removesuffix(".weight"): layer.group for layer in report.layers}
        drawn["widths"] = widths(events[-1]["widths"], modalities)
    # Components of channels have no weights to be drawn with.
    if components is not None and masks is not None and components.deci.keys() == masks.keys():
        drawn["importance_against_redundancy"] = importance_against_redundancy(components, masks)
    return drawn


def save(drawn: Mapping[str, Figure], folder: Path) -> None:
    """Write each figure to `folder` as png, under its name."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in drawn.items():
        figure.savefig(folder / f"{name}.png")


def kept_per_layer(report: SparsityReport) -> Figure:
    """Horizontal bars: the share of each layer that stays, coloured by modality."""
    colours = _colours(report.groups)
    legend = {f"{group}: {total.kept:.3f}": colours[group] for group, total in report.groups.items()}
    figure, axes = _bar_axes(len(report.rows), legend)
    names = [layer.name.removesuffix(".weight") for layer in report.rows]
    own = [colours[layer.group] for layer in report.rows]
    axes.barh(names, [layer.kept for layer in report.rows], color=own)
    axes.axvline(1 - report.sparsity, color="black", linewidth=0.8, linestyle="--")
    axes.set_xlim(0, 1)
    axes.set_xlabel(f"share of weights kept (dashed: whole model, {1 - report.sparsity:.3f})")
    return figure


def widths(kept_of: Mapping[str, Sequence[int]], modality_of: Mapping[str, str]) -> Figure:
    """Horizontal bars: output channels of each layer before (light) and after (solid) slimming.

    Args:
        kept_of: Layer -> how many channels it keeps of how many, in the order of the figure.
        modality_of: Layer -> modality, which gives the colour; the others are shared.
    """
    modalities = {name: modality_of.get(name, SHARED) for name in kept_of}
    colours = _colours(modalities.values())
    legend = {}
    for modality, colour in colours.items():
        of_modality = [counts for name, counts in kept_of.items() if modalities[name] == modality]
        left, total = map(sum, zip(*of_modality, strict=True))
        legend[f"{modality}: {left:,} of {total:,}"] = colour
    figure, axes = _bar_axes(len(kept_of), legend)
    after, before = zip(*kept_of.values(), strict=True)
    own = [colours[modality] for modality in modalities.values()]
    light = axes.barh(list(kept_of), before, color=own, alpha=0.3)
    axes.barh(list(kept_of), after, color=own)
    axes.bar_label(light, [f"{kept} of {total}" for kept, total in kept_of.values()], padding=3, fontsize=6)
    axes.set_xlim(0, 1.1 * max(before))  # room for the numbers
    axes.set_xlabel("output channels (light: before, solid: after)")
    return figure


def importance_against_redundancy(components: Components, masks: Masks) -> Figure:
    """Scatter of a sample of weights: DeCI against the sum of ReRI, pruned ones hollow."""
    groups = list(dict.fromkeys(components.group_of.values()))
    colours = _colours(groups)
    figure, axes = new_axes(width=6.5, height=5)
    generator = torch.Generator().manual_seed(0)
    for group, marker in zip(groups, MARKERS * len(groups), strict=False):
        names = [name for name, own in components.group_of.items() if own == group]
        deci = torch.cat([components.deci[n].flatten().cpu() for n in names])
        shapes = {n: components.deci[n].shape for n in names}  # also where one value stands for all
        parts = {n: [r[n].cpu().expand(shapes[n]) for r in components.reri.values() if n in r] for n in names}
        reri = torch.cat([torch.stack(parts[n]).sum(0).flatten() for n in names])
        kept = torch.cat([masks[n].flatten().cpu() for n in names])
        visible = ((deci > 0) & (reri > 0)).nonzero().squeeze(1)
        sample = visible[torch.randperm(len(visible), generator=generator)[: _MAX_POINTS // len(groups)]]
        style = {"s": 8, "marker": marker, "edgecolors": colours[group], "linewidths": 0.5, "alpha": 0.6}
        for flag, face, what in ((False, "none", "pruned"), (True, colours[group], "kept")):
            part = sample[kept[sample] == flag]
            points = deci[part].numpy(), reri[part].numpy()
            axes.scatter(*points, facecolors=face, label=f"{group}, {what}", **style)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("DeCI: contribution with all modalities active")
    axes.set_ylabel("ReRI: redundancy, summed over deactivations")
    axes.legend(fontsize=8, markerscale=2)
    return figure


def sparsity_over_epochs(events: Sequence[Mapping[str, Any]]) -> Figure:
    """Steps: the kept share of each modality and of the model after each event.

    Args:
        events: Entries with "epoch", "sparsity" and "kept" (group -> share), oldest first.
    """
    figure, axes = new_axes(width=6.5, height=4)
    epochs = [event["epoch"] for event in events]
    of_model = [1 - event["sparsity"] for event in events]
    axes.step(epochs, of_model, "k--", where="post", marker=".", label="model")
    colours = _colours(events[-1]["kept"])
    for (group, colour), marker in zip(colours.items(), MARKERS * len(colours), strict=False):
        shares = [event["kept"][group] for event in events]
        axes.step(epochs, shares, where="post", color=colour, marker=marker, markersize=4, label=group)
    axes.set_ylim(0, 1)
    axes.set_xlabel("epoch")
    axes.set_ylabel("share of weights kept")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(fontsize=8)
    return figure


def new_axes(width: float, height: float) -> tuple[Figure, Any]:
    """An empty figure of this size in inches, and its axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Not pyplot: it would choose a window system and keep every figure alive.
    figure = Figure(figsize=(width, height), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _bar_axes(num_bars: int, legend: Mapping[str, str]) -> tuple[Figure, Any]:
    """A figure for horizontal bars, the first on top, and its axes; above them labels with their colours."""
    from matplotlib.patches import Patch

    figure, axes = new_axes(width=8, height=max(2.5, 0.22 * num_bars + 1.2))
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=7)
    axes.margins(y=0.01)
    handles = [Patch(color=colour, label=label) for label, colour in legend.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), fontsize=8)
    return figure, axes


def _colours(groups: Iterable[str]) -> dict[str, str]:
    names = dict.fromkeys(groups)
    named = [group for group in names if group != SHARED]
    colours = dict(zip(named, COLOURS * len(named), strict=False))
    return {group: colours.get(group, SHARED_COLOUR) for group in names}
