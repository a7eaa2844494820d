"""Figures of comparisons: what is drawn, its labels, and intervals where they are known."""

import math
from dataclasses import replace

import pytest

from altermoma_pl import AlterEva, Magnitude
from tests.helpers.summaries import complete, summary

figures = pytest.importorskip("altermoma_pl.compare.figures")
pytest.importorskip("matplotlib")

BETAS = {f"beta {beta:g}": complete(AlterEva(1.0, beta)) for beta in (2.0, 0.0, 1.0)}
SPARSITIES = (0.9, 0.975)


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def ticks(labels):
    return [label.get_text() for label in labels]


def test_what_is_drawn_depends_on_what_there_is():
    few = ["iou_over_sparsity", "iou_by_condition", "loss_over_sparsity", "kept_share"]
    assert list(figures.draw_comparison(summary())) == few
    many = [*few[:1], "iou_over_beta", *few[1:3], "loss_over_beta", "kept_share"]
    assert list(figures.draw_comparison(summary(BETAS))) == many


def test_a_metric_with_a_slash_makes_a_file_name(monkeypatch):
    found = summary(**{"val/iou": 1.0})
    monkeypatch.setattr(type(found.grid.benchmark), "metrics", {"val/iou": "higher"})
    assert list(figures.draw_comparison(found)) == ["val_iou_over_sparsity", "kept_share"]


def test_lines_over_sparsity():
    found = summary(sparsities=(0.975, 0.9))
    figure = figures.over_sparsity(found, "iou")
    (axes,) = figure.axes
    ours, other, dense = axes.lines
    assert list(ours.get_xdata()) == [0.9, 0.975]
    assert list(ours.get_ydata()) == pytest.approx([0.6, 0.6])
    assert list(other.get_ydata()) == pytest.approx([0.5, 0.5])
    assert dense.get_ydata()[0] == 1.0
    assert ours.get_linewidth() > other.get_linewidth()
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("sparsity", "iou (higher is better)")
    assert ticks(axes.get_xticklabels()) == ["90%", "97.5%"]
    assert legend(figure) == ["ours_1", "a|b [paper]", "dense"]
    low, high = (found.estimate("ours_1", 0.9, "iou").low, found.estimate("ours_1", 0.9, "iou").high)
    heights = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert (min(heights), max(heights)) == (pytest.approx(low), pytest.approx(high))


@pytest.mark.parametrize("options", [{"seeds": (0,)}, {"iou": math.nan, "iou/camera_dropped": math.nan}])
def test_no_interval_is_drawn_where_none_is_known(options):
    found = summary(BETAS, SPARSITIES, **options)
    assert len(figures.over_sparsity(found, "iou").axes[0].collections) == 0
    assert len(figures.over_beta(found, "iou").axes[0].collections) == 0
    assert all(len(axes.collections) == 0 for axes in figures.by_condition(found, "iou").axes)


def test_no_line_for_a_dense_model_that_was_not_measured():
    figure = figures.over_sparsity(summary(), "loss")
    assert legend(figure) == ["ours_1", "a|b [paper]"]


def test_many_methods_look_different():
    methods = {f"m{index}": complete(Magnitude(), num_epochs=index + 1) for index in range(28)}
    lines = figures.over_sparsity(summary(methods), "loss").axes[0].lines
    looks = {(line.get_color(), line.get_linestyle()) for line in lines}
    marks = {(line.get_color(), line.get_marker()) for line in lines}
    assert len(looks) == len(marks) == 28


def test_bars_of_kept_shares():
    figure = figures.kept_share(summary(sparsities=SPARSITIES))
    assert [axes.get_title() for axes in figure.axes] == ["90% sparsity", "97.5% sparsity"]
    first = figure.axes[0]
    assert [bar.get_width() for bar in first.patches] == [0.05, 0.05, 0.2, 0.2]
    assert ticks(first.get_yticklabels()) == ["ours_1", "a|b [paper]"]
    assert first.get_xlabel() == "share of weights kept"
    assert first.yaxis_inverted()
    assert legend(figure) == ["camera", "shared"]
    assert len(first.collections) == 2


def test_bars_by_condition():
    figure = figures.by_condition(summary(), "iou")
    assert legend(figure) == ["all sensors", "camera dropped"]
    assert [bar.get_width() for bar in figure.axes[0].patches] == pytest.approx([0.6, 0.5, 0.25, 0.25])
    camera = [bar.get_facecolor() for bar in figure.axes[0].patches[2:]]
    assert camera[0] == camera[1] != figure.axes[0].patches[0].get_facecolor()


def test_the_curve_over_beta():
    figure = figures.over_beta(summary(BETAS, SPARSITIES), "iou")
    (axes,) = figure.axes
    assert axes.get_xlabel() == "beta / alpha"
    assert axes.get_ylabel() == "iou (higher is better)"
    assert legend(figure) == ["90%", "97.5%"]
    lines = [line for line in axes.lines if len(line.get_xdata()) == 3 and line.get_linestyle() == "-"]
    assert [list(line.get_xdata()) for line in lines] == [[0, 1, 2]] * 2
    assert list(lines[0].get_ydata()) == pytest.approx([0.5, 0.4, 0.6])
    assert len(axes.collections) == 2


def test_the_family_is_the_largest_and_has_fixed_betas():
    methods = BETAS | {
        "auto": complete(AlterEva(beta="auto")),
        "magnitude": complete(Magnitude()),
        "longer": complete(AlterEva(1.0, 3.0), num_epochs=5),
        "no DeCI": complete(AlterEva(alpha=0.0, combination="subtract")),
    }
    assert figures.beta_family(summary(methods)) == [(0.0, "beta 0"), (1.0, "beta 1"), (2.0, "beta 2")]
    assert figures.beta_family(summary()) == [(2.0, "ours_1")]
    assert figures.beta_family(summary({"magnitude": complete(Magnitude())})) == []


def test_alpha_counts_by_its_ratio_to_beta():
    methods = {
        "half": complete(AlterEva(2.0, 1.0, combination="subtract")),
        "one": complete(AlterEva(1.0, 1.0, combination="subtract")),
        "four": complete(AlterEva(0.5, 2.0, combination="subtract")),
    }
    found = summary(methods)
    assert figures.beta_family(found) == [(0.5, "half"), (1.0, "one"), (4.0, "four")]
    assert figures.beta_family(replace(found, reference="four")) == figures.beta_family(found)
    discounts = {"one": complete(AlterEva(1.0, 1.0)), "tolerant": complete(AlterEva(2.0, 1.0))}
    assert figures.beta_family(summary(discounts)) == [(1.0, "one")]
