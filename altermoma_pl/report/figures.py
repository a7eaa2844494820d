"""Figures: which layers are kept and how wide, importance against redundancy, sparsity over epochs.

matplotlib is imported where it is used (extra `plot`). Colours are those of Okabe and Ito, which
colour-blind readers can tell apart; markers differ as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from altermoma_pl.mask.masks import Masks
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
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def draw(
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
        drawn["widths"] = _widths_after(events[-1]["widths"], report)
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
    from matplotlib.patches import Patch

    colours = _colours(report.groups)
    figure, axes = new_axes(width=8, height=max(2.5, 0.22 * len(report.rows) + 1.2))
    axes.barh(
        [layer.name.removesuffix(".weight") for layer in report.rows],
        [layer.kept for layer in report.rows],
        color=[colours[layer.group] for layer in report.rows],
    )
    axes.axvline(1 - report.sparsity, color="black", linewidth=0.8, linestyle="--")
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=7)
    axes.set_xlim(0, 1)
    axes.set_xlabel(f"share of weights kept (dashed: whole model, {1 - report.sparsity:.3f})")
    handles = [
        Patch(color=colours[name], label=f"{name}: {total.kept:.3f}") for name, total in report.groups.items()
    ]
    axes.margins(y=0.01)
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), fontsize=8)
    return figure


def widths(before: Mapping[str, int], after: Mapping[str, int], group_of: Mapping[str, str]) -> Figure:
    """Horizontal bars: output channels of each layer before (light) and after (solid) slimming.

    Args:
        before: Layer name -> output channels, in the order of the figure.
        after: The same layers, slimmed.
        group_of: Layer name -> modality, which gives the colour.

    Raises:
        ValueError: If the three do not name the same layers, or there is none.
    """
    if not before or not before.keys() == after.keys() == group_of.keys():
        odd = sorted((before.keys() ^ after.keys()) | (before.keys() ^ group_of.keys()))
        raise ValueError(
            f"before, after and group_of must name the same layers, at least one; these differ: {odd}"
        )
    from matplotlib.patches import Patch

    colours = _colours(dict.fromkeys(group_of[name] for name in before))
    figure, axes = new_axes(width=8, height=max(2.5, 0.22 * len(before) + 1.2))
    own = [colours[group_of[name]] for name in before]
    axes.barh(list(before), list(before.values()), color=own, alpha=0.3)
    axes.barh(list(before), [after[name] for name in before], color=own)
    for row, (name, width) in enumerate(before.items()):
        axes.annotate(
            f"{after[name]} of {width}",
            (width, row),
            xytext=(3, 0),
            textcoords="offset points",
            va="center",
            fontsize=6,
        )
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=7)
    axes.set_xlim(0, 1.1 * max(before.values()))  # room for the numbers
    axes.set_xlabel("output channels (light: before, solid: after)")
    axes.margins(y=0.01)
    handles = []
    for group, colour in colours.items():
        names = [name for name in before if group_of[name] == group]
        total, left = sum(before[name] for name in names), sum(after[name] for name in names)
        handles.append(Patch(color=colour, label=f"{group}: {left:,} of {total:,}"))
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), fontsize=8)
    return figure


def _widths_after(kept_of: Mapping[str, Sequence[int]], report: SparsityReport) -> Figure:
    """Of groups of channels, which are called as the first layer that puts them out."""
    groups = {layer.name.removesuffix(".weight"): layer.group for layer in report.layers}
    before = {name: total for name, (_, total) in kept_of.items()}
    after = {name: kept for name, (kept, _) in kept_of.items()}
    return widths(before, after, {name: groups.get(name, "shared") for name in before})


def importance_against_redundancy(components: Components, masks: Masks) -> Figure:
    """Scatter of a sample of weights: DeCI against the sum of ReRI, pruned ones hollow."""
    groups = list(dict.fromkeys(components.group_of.values()))
    colours = _colours(groups)
    figure, axes = new_axes(width=6.5, height=5)
    generator = torch.Generator().manual_seed(0)
    for group, marker in zip(groups, MARKERS * len(groups), strict=False):
        names = [name for name, own in components.group_of.items() if own == group]
        deci = torch.cat([components.deci[n].flatten().cpu() for n in names])
        reri = torch.cat([_total_reri(components, n) for n in names])
        kept = torch.cat([masks[n].flatten().cpu() for n in names])
        visible = ((deci > 0) & (reri > 0)).nonzero().squeeze(1)
        sample = visible[torch.randperm(len(visible), generator=generator)[: _MAX_POINTS // len(groups)]]
        for flag, face in ((False, "none"), (True, colours[group])):
            part = sample[kept[sample] == flag]
            axes.scatter(
                deci[part].numpy(),
                reri[part].numpy(),
                s=8,
                marker=marker,
                facecolors=face,
                edgecolors=colours[group],
                linewidths=0.5,
                alpha=0.6,
                label=f"{group}, {'kept' if flag else 'pruned'}",
            )
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
    axes.step(
        epochs, [1 - event["sparsity"] for event in events], "k--", where="post", marker=".", label="model"
    )
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


def _colours(groups: Any) -> dict[str, str]:
    named = [group for group in groups if group != "shared"]
    colours = dict(zip(named, COLOURS * len(named), strict=False))
    return {group: colours.get(group, SHARED_COLOUR) for group in groups}


def _total_reri(components: Components, name: str) -> torch.Tensor:
    size = components.deci[name].shape  # also where one value stands for the whole tensor
    parts = [own[name].cpu().expand(size).flatten() for own in components.reri.values() if name in own]
    return torch.stack(parts).sum(0)
