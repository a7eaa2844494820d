"""Figures of a comparison: metrics over sparsity, kept shares, the effect of beta, lost sensors.

matplotlib is imported where it is used (extra `plot`). Methods differ in colour, marker and line style, so
that colour-blind readers and black-and-white prints can tell them apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle
from typing import TYPE_CHECKING

from altermoma_pl.compare.summary import KEPT, Estimate, Summary, condition_label, percent
from altermoma_pl.report.figures import COLOURS, MARKERS, SHARED_COLOUR, new_axes
from altermoma_pl.score import AlterEva

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLES = ("-", "--", "-.", ":")
_FEWEST_FOR_A_CURVE = 3


def draw_comparison(summary: Summary) -> dict[str, Figure]:
    """Name -> figure, of all that the comparison allows."""
    drawn = {}
    for metric in summary.grid.benchmark.metrics:
        name = metric.replace("/", "_")  # it will be a file's
        drawn[f"{name}_over_sparsity"] = over_sparsity(summary, metric)
        if len(beta_family(summary)) >= _FEWEST_FOR_A_CURVE:
            drawn[f"{name}_over_beta"] = over_beta(summary, metric)
        if summary.conditions(metric):
            drawn[f"{name}_by_condition"] = by_condition(summary, metric)
    drawn["kept_share"] = kept_share(summary)
    return drawn


def over_sparsity(summary: Summary, metric: str) -> Figure:
    """Lines: the mean of a metric at each sparsity, with bands of its 95 % interval."""
    figure, axes = new_axes(width=7.5, height=4.8)
    sparsities = sorted(summary.grid.sparsities)
    for index, name in enumerate(summary.grid.methods):
        found = [summary.estimate(name, sparsity, metric) for sparsity in sparsities]
        lap, place = divmod(index, len(COLOURS))  # colours come round again with other markers and lines
        look = {
            "color": COLOURS[place],
            "marker": MARKERS[(index + lap) % len(MARKERS)],
            "linestyle": _STYLES[lap % len(_STYLES)],
            "linewidth": 2.4 if name == summary.reference else 1.4,
        }
        axes.plot(sparsities, [e.mean for e in found], label=name, markersize=5, **look)
        if _error_bars(found):
            low, high = [e.low for e in found], [e.high for e in found]
            axes.fill_between(sparsities, low, high, color=look["color"], alpha=0.1, linewidth=0)
    dense = summary.dense_estimate(metric)
    if dense is not None:
        axes.axhline(dense.mean, color="black", linewidth=0.8, linestyle=(0, (1, 2)), label="dense")
    axes.set_xticks(sparsities, [percent(s) for s in sparsities])
    axes.set(xlabel="sparsity", ylabel=f"{metric} ({summary.grid.benchmark.metrics[metric]} is better)")
    figure.legend(loc="outside right upper", fontsize=8, handlelength=3.5)  # to tell dashes from dots
    return figure


def kept_share(summary: Summary) -> Figure:
    """Bars: the share of each modality's weights that each method keeps, one panel a sparsity."""
    names = [name for name in summary.other_names if name.startswith(KEPT)]
    return _bars(summary, names, [condition_label(name) for name in names], "share of weights kept")


def by_condition(summary: Summary, metric: str) -> Figure:
    """Bars: the metric with all sensors and in each condition that the benchmark measures."""
    conditions = summary.conditions(metric)
    labels = ["all sensors", *(condition_label(name) for name in conditions)]
    return _bars(summary, [metric, *conditions], labels, metric)


def beta_family(summary: Summary) -> list[tuple[float, str]]:
    """(beta / alpha, method) of the most methods with `AlterEva` that differ in no more, ascending."""
    methods = summary.grid.methods
    families: dict[str, list[tuple[float, str]]] = {}
    for name, method in methods.items():
        criterion = method.criterion
        if isinstance(criterion, AlterEva) and not isinstance(criterion.beta, str) and criterion.alpha > 0:
            # In a discount alpha is a tolerance of its own; in a subtraction only the ratio counts.
            alpha = 1.0 if criterion.combination == "subtract" else criterion.alpha
            kind = repr(replace(method, criterion=replace(criterion, alpha=alpha, beta=0.0)))
            families.setdefault(kind, []).append((criterion.beta / criterion.alpha, name))
    ordered = sorted(families.values(), key=lambda family: -len(family))
    return sorted(ordered[0]) if ordered else []


def over_beta(summary: Summary, metric: str) -> Figure:
    """Lines: the metric over beta / alpha, as in figure 4 of the paper, one line a sparsity."""
    figure, axes = new_axes(width=6.5, height=4.2)
    family = beta_family(summary)
    for sparsity, colour, marker in zip(summary.grid.sparsities, cycle(COLOURS), cycle(MARKERS)):
        found = [summary.estimate(name, sparsity, metric) for _, name in family]
        look = {"color": colour, "marker": marker, "capsize": 3, "label": percent(sparsity)}
        ratios, means = [ratio for ratio, _ in family], [e.mean for e in found]
        axes.errorbar(ratios, means, yerr=_error_bars(found), **look)
    axes.set(xlabel="beta / alpha", ylabel=f"{metric} ({summary.grid.benchmark.metrics[metric]} is better)")
    figure.legend(loc="outside right upper", title="sparsity", fontsize=8)
    return figure


def _bars(summary: Summary, names: Sequence[str], labels: Sequence[str], label: str) -> Figure:
    """Grouped bars with error bars: methods downwards, one bar for each name, one panel a sparsity."""
    methods, sparsities = list(summary.grid.methods), summary.grid.sparsities
    height = 1.6 + len(methods) * (0.12 + 0.12 * len(names))
    figure, axes = new_axes(width=3 + 2.6 * len(sparsities), height=height)
    axes.remove()  # panels instead
    panels = figure.subplots(1, len(sparsities), sharey=True, sharex=True, squeeze=False)[0]
    colours = (*COLOURS[:2], SHARED_COLOUR, *COLOURS[2:])  # camera, LiDAR, shared as in the other figures
    thickness = 0.8 / len(names)
    for axes, sparsity in zip(panels, sparsities, strict=True):
        for index, (name, colour) in enumerate(zip(names, cycle(colours))):
            found = [summary.estimate(method, sparsity, name) for method in methods]
            places = [row + (index - (len(names) - 1) / 2) * thickness for row in range(len(methods))]
            bars = {"color": colour, "height": thickness, "error_kw": {"linewidth": 0.7}}
            axes.barh(places, [e.mean for e in found], xerr=_error_bars(found), label=labels[index], **bars)
        axes.set_title(f"{percent(sparsity)} sparsity", fontsize=10)
        axes.set_xlabel(label)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.margins(y=0.01)
    panels[0].set_yticks(range(len(methods)), methods)
    panels[0].invert_yaxis()
    handles, texts = panels[0].get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside upper center", ncols=len(names), fontsize=8)
    return figure


def _error_bars(found: Sequence[Estimate]) -> list[float] | None:
    widths = [e.half_width for e in found]
    return widths if all(math.isfinite(width) for width in widths) else None
