"""Figures: labels, legends, as many marks as there is data, a colour for each modality."""

import sys
from typing import Any

import pytest
import torch

from altermoma_pl import Components, Masks, SparsityReport
from altermoma_pl.report import figures
from tests.helpers.reports import GROUP_OF, MASKS, REPORT

pytest.importorskip("matplotlib")

EVENTS = [
    {"epoch": 0, "sparsity": 0.25, "kept": {"camera": 0.5, "lidar": 1.0, "shared": 1.0}},
    {"epoch": 3, "sparsity": 5 / 12, "kept": {"camera": 1 / 3, "lidar": 0.75, "shared": 1.0}},
]


def components() -> Components:
    deci = {name: torch.arange(1.0, mask.numel() + 1).view(mask.shape) for name, mask in MASKS.items()}
    reri = {
        "camera": {name: 2 * deci[name] for name in ("lidar.weight", "head.weight")},
        "lidar": {name: 3 * deci[name] for name in ("camera.weight", "camera.late.weight", "head.weight")},
    }
    return Components(deci, reri, {name: GROUP_OF[name] for name in MASKS}, {}, deci)


def labelled(figure: Any) -> Any:
    """The only axes of the figure, which has labels on both."""
    (axes,) = figure.axes
    assert axes.get_xlabel()
    return axes


def legend(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_kept_per_layer():
    from matplotlib.colors import to_hex

    axes = labelled(figures.kept_per_layer(REPORT))
    assert [bar.get_width() for bar in axes.patches] == [0.25, 1.0, 0.75, 0.5]
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "camera",
        "head",
        "lidar",
        "camera.late",
    ]
    camera, head, lidar, late = (to_hex(bar.get_facecolor()) for bar in axes.patches)
    assert camera == late
    assert len({camera, head, lidar}) == 3
    assert head == "#7f7f7f"
    assert [text.get_text() for text in axes.figure.legends[0].get_texts()] == [
        "camera: 0.333",
        "shared: 1.000",
        "lidar: 0.750",
    ]
    assert "0.583" in axes.get_xlabel()
    assert axes.lines[0].get_xdata()[0] == pytest.approx(7 / 12)
    assert axes.yaxis_inverted()
    assert axes.get_xlim() == (0, 1)


def test_sparsity_over_epochs():
    axes = labelled(figures.sparsity_over_epochs(EVENTS))
    assert legend(axes) == ["model", "camera", "lidar", "shared"]
    assert [list(line.get_xdata()) for line in axes.lines] == [[0, 3]] * 4
    expected = [[0.75, 7 / 12], [0.5, 1 / 3], [1.0, 0.75], [1.0, 1.0]]
    assert [line.get_ydata() for line in axes.lines] == [pytest.approx(shares) for shares in expected]
    assert len({line.get_color() for line in axes.lines}) == 4
    assert len({line.get_marker() for line in axes.lines}) == 4
    assert axes.get_ylabel() == "share of weights kept"
    assert axes.get_ylim() == (0, 1)


def test_importance_against_redundancy():
    axes = labelled(figures.importance_against_redundancy(components(), MASKS))
    assert legend(axes) == [
        "camera, pruned",
        "camera, kept",
        "shared, pruned",
        "shared, kept",
        "lidar, pruned",
        "lidar, kept",
    ]
    points = {each.get_label(): sorted(map(tuple, each.get_offsets().tolist())) for each in axes.collections}
    # camera: of weights 1, 2, 3, 4 and 1, 2 the first and the last are kept; redundancy is three times DeCI.
    assert points["camera, kept"] == [(1, 3), (2, 6)]
    assert points["camera, pruned"] == [(1, 3), (2, 6), (3, 9), (4, 12)]
    assert points["lidar, kept"] == [(1, 2), (2, 4), (3, 6)]
    assert points["shared, kept"] == [(1, 5), (2, 10)]
    assert points["shared, pruned"] == []
    hollow = [len(each.get_facecolor()) == 0 for each in axes.collections]
    assert hollow == [True, False] * 3
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert axes.get_ylabel().startswith("ReRI")


def test_points_that_a_log_axis_cannot_show_are_left_out():
    zeros = components()
    zeros.deci["lidar.weight"][0] = 0
    zeros.reri["camera"]["lidar.weight"][1] = 0
    axes = figures.importance_against_redundancy(zeros, MASKS).axes[0]
    points = {each.get_label(): each.get_offsets().tolist() for each in axes.collections}
    assert points["lidar, kept"] == [[3, 6]]


def test_a_large_model_is_sampled():
    masks = Masks({name: torch.ones(9000, dtype=torch.bool) for name in GROUP_OF})
    value = {name: torch.rand(9000, generator=torch.Generator().manual_seed(1)) + 0.1 for name in GROUP_OF}
    axes = figures.importance_against_redundancy(
        Components(value, {"camera": value}, GROUP_OF, {}, value), masks
    ).axes[0]
    assert sum(len(each.get_offsets()) for each in axes.collections) == 3 * (4000 // 3)


def test_what_is_drawn_depends_on_what_there_is():
    assert list(figures.draw_pruning(REPORT, [], None, None)) == ["kept_per_layer"]
    assert list(figures.draw_pruning(REPORT, EVENTS, None, MASKS)) == [
        "kept_per_layer",
        "sparsity_over_epochs",
    ]
    assert list(figures.draw_pruning(REPORT, EVENTS, components(), MASKS)) == [
        "kept_per_layer",
        "sparsity_over_epochs",
        "importance_against_redundancy",
    ]


def test_save_writes_images(tmp_path):
    drawn = figures.draw_pruning(REPORT, EVENTS, components(), MASKS)
    figures.save(drawn, tmp_path / "new" / "folder")
    written = sorted((tmp_path / "new" / "folder").iterdir())
    assert [path.name for path in written] == [f"{name}.png" for name in sorted(drawn)]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


def test_many_modalities_have_colours_of_their_own():
    names = [f"m{i}" for i in range(7)]
    masks = Masks({f"{name}.weight": torch.ones(2, dtype=torch.bool) for name in [*names, "shared"]})
    report = SparsityReport.of(masks, {f"{name}.weight": name for name in [*names, "shared"]})
    axes = figures.kept_per_layer(report).axes[0]
    assert len({tuple(bar.get_facecolor()) for bar in axes.patches}) == 8


def test_more_modalities_than_colours_are_all_in_the_legend():
    modality_of = {f"layer{i}": f"m{i}" for i in range(8)}
    figure = figures.widths(dict.fromkeys(modality_of, (1, 2)), modality_of)
    assert len(figure.legends[0].get_texts()) == 8


def test_without_matplotlib_nothing_is_drawn(monkeypatch, tmp_path):
    from tests.helpers.lightning_models import Fusion, fit, pruner

    assert figures.available()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert not figures.available()
    callback = pruner(figures=True, output_dir=str(tmp_path / "out"))
    fit(Fusion(), callback)
    assert len(callback.events) == 1
    assert list(tmp_path.iterdir()) == []


WIDTHS = {"camera.a": (16, 64), "lidar.a": (32, 32), "head": (8, 8), "camera.b": (32, 128)}
OF_LAYER = {"camera.a": "camera", "lidar.a": "lidar", "camera.b": "camera"}


def test_widths():
    from matplotlib.colors import to_hex

    axes = labelled(figures.widths(WIDTHS, OF_LAYER))
    light, solid = axes.patches[:4], axes.patches[4:]
    assert [bar.get_width() for bar in light] == [64, 32, 8, 128]
    assert [bar.get_width() for bar in solid] == [16, 32, 8, 32]
    assert [(one.get_y(), to_hex(one.get_facecolor())) for one in light] == [
        (one.get_y(), to_hex(one.get_facecolor())) for one in solid
    ]
    assert {bar.get_alpha() for bar in light} != {bar.get_alpha() for bar in solid}
    camera, lidar, head, late = (to_hex(bar.get_facecolor()) for bar in solid)
    assert camera == late
    assert len({camera, lidar, head}) == 3
    assert [label.get_text() for label in axes.get_yticklabels()] == list(WIDTHS)
    assert [text.get_text() for text in axes.texts] == ["16 of 64", "32 of 32", "8 of 8", "32 of 128"]
    assert [text.get_text() for text in axes.figure.legends[0].get_texts()] == [
        "camera: 48 of 192",
        "lidar: 32 of 32",
        "shared: 8 of 8",
    ]


def test_widths_are_drawn_where_channels_are_pruned_and_their_components_are_not():
    events = [*EVENTS, {**EVENTS[-1], "widths": {"camera": [2, 4], "mine": [3, 8]}}]
    of_channels = Components({"camera": torch.ones(4)}, {}, {"camera": "camera"}, {}, {})
    drawn = figures.draw_pruning(REPORT, events, of_channels, MASKS)
    assert set(drawn) == {"kept_per_layer", "sparsity_over_epochs", "widths"}
    axes = labelled(drawn["widths"])
    assert [text.get_text() for text in axes.texts] == ["2 of 4", "3 of 8"]
    assert [text.get_text() for text in axes.figure.legends[0].get_texts()] == [
        "camera: 2 of 4",
        "shared: 3 of 8",
    ]
