import doctest
import re

import pytest
import torch
from torch import nn

from altermoma_pl import Calibration, Modalities
from altermoma_pl.model import modality
from altermoma_pl.model.modality import check_prunable, group_of, is_constant, prunable, selects
from tests.helpers.models import (
    BRANCHES,
    INTERLEAVED,
    Aliased,
    Compiled,
    Dead,
    FrozenTower,
    Geometry,
    Interleaved,
    Nested,
    OracleNet,
    ThreeModalities,
    TwoTower,
    squared_error,
)


def test_the_example_of_the_docstring_runs():
    result = doctest.testmod(modality)
    assert (result.failed, result.attempted) == (0, 3)


def test_each_parameter_goes_to_its_branch_and_the_rest_is_shared():
    groups = Modalities(BRANCHES).resolve(TwoTower())
    assert groups == {
        "camera": ("camera.0.weight", "camera.0.bias", "camera.1.weight", "camera.1.bias"),
        "lidar": ("lidar.0.weight", "lidar.0.bias", "lidar.1.weight", "lidar.1.bias"),
        "shared": ("head.1.weight", "head.1.bias"),
    }
    assert list(groups) == ["camera", "lidar", "shared"]


def test_the_order_of_modalities_is_as_given_and_of_parameters_as_in_the_model():
    groups = Modalities({"lidar": "lidar", "camera": ["camera.1", "camera.0"]}).resolve(TwoTower())
    assert list(groups) == ["lidar", "camera", "shared"]
    assert groups["camera"][0] == "camera.0.weight"


def test_three_modalities():
    groups = Modalities({"c": "camera", "l": "lidar", "r": "rad*"}).resolve(ThreeModalities())
    assert groups == {
        "c": ("camera.weight",),
        "l": ("lidar.weight",),
        "r": ("radar.weight",),
        "shared": ("head.weight",),
    }


def test_a_mapping_of_tuples():
    modalities = Modalities({"camera": "a", "lidar": ["b", "!b.c"]})
    assert dict(modalities) == {"camera": ("a",), "lidar": ("b", "!b.c")}
    assert len(modalities) == 2
    assert repr(modalities) == "Modalities({'camera': ('a',), 'lidar': ('b', '!b.c')})"


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("camera", "camera.0.weight", True),
        ("camera", "camera", True),
        ("camera", "cameras.0.weight", False),
        ("camera", "model.camera.0.weight", False),
        ("*.camera", "model.camera.0.weight", True),
        ("model.*.backbone", "model.encoders.camera.backbone.conv.weight", True),
        ("camera.?", "camera.0.weight", True),
        ("camera.[1-9]", "camera.0.weight", False),
        ("Camera", "camera.0.weight", False),
        ("camera.0", "camera._orig_mod.0.weight", True),
    ],
)
def test_globs(pattern, name, expected):
    assert selects([pattern], name) is expected


def test_an_excluding_pattern_wins_wherever_it_stands():
    assert not selects(["!lidar.fusion_*", "lidar"], "lidar.fusion_0.weight")
    assert not selects(["lidar", "!lidar.fusion_*"], "lidar.fusion_0.weight")
    assert selects(["lidar", "!lidar.fusion_*"], "lidar.stage_0.weight")


def test_fusion_blocks_inside_the_lidar_stream_are_shared():
    groups = Modalities(INTERLEAVED).resolve(Interleaved())
    assert "towers.lidar.stage_1.weight" in groups["lidar"]
    assert groups["shared"] == (
        "towers.lidar.fusion_0.weight",
        "towers.lidar.fusion_0.bias",
        "head.weight",
        "head.bias",
    )


def test_a_nested_model():
    modalities = Modalities({"camera": "model.camera", "lidar": "*.lidar"})
    assert modalities.resolve(Nested(TwoTower()))["lidar"][0] == "model.lidar.0.weight"


def test_compiled_modules_are_named_as_before():
    model = TwoTower()
    model.camera = Compiled(model.camera)
    groups = Modalities(BRANCHES).resolve(Compiled(model))
    assert groups["camera"][0] == "_orig_mod.camera._orig_mod.0.weight"
    assert groups["lidar"][0] == "_orig_mod.lidar.0.weight"


def test_a_module_under_two_names_is_counted_once_and_found_by_both():
    by_first = Modalities({"camera": "backbone", "lidar": "lidar"}).resolve(Aliased())
    by_second = Modalities({"camera": "camera", "lidar": "lidar"}).resolve(Aliased())
    assert by_first == by_second
    assert by_first["camera"][0] == "backbone.0.weight"
    assert sum(map(len, by_first.values())) == len(list(Aliased().parameters()))


def test_excluding_by_any_of_its_names_excludes_a_parameter():
    groups = Modalities({"camera": ["backbone", "!camera.1"], "lidar": "lidar"}).resolve(Aliased())
    assert groups["camera"] == ("backbone.0.weight", "backbone.0.bias")
    assert "backbone.1.weight" in groups["shared"]


def test_a_parameter_of_two_modalities_is_an_error_and_its_advice_helps():
    model = Aliased(shared_stem=True)
    message = (
        "parameter 'backbone.0.weight' belongs to 2 modalities, 'camera' and 'lidar': exclude it from "
        "all but one, for example with the pattern '!backbone.0.weight'"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        Modalities(BRANCHES).resolve(model)
    advice = ["!backbone.0.weight", "!backbone.0.bias"]
    in_camera = Modalities({"camera": ["camera"], "lidar": ["lidar", *advice]}).resolve(model)
    assert "backbone.0.weight" in in_camera["camera"]
    in_lidar = Modalities({"camera": ["camera", *advice], "lidar": ["lidar"]}).resolve(model)
    assert "backbone.0.weight" in in_lidar["lidar"]


def test_geometry_constants_belong_to_nothing():
    groups = Modalities(BRANCHES).resolve(Geometry())
    assert groups["camera"] == ("camera.net.weight", "camera.net.bias")
    assert not any("dx" in name or "nx" in name for names in groups.values() for name in names)


@pytest.mark.parametrize(
    ("leaf", "value", "requires_grad", "constant"),
    [
        ("weight", torch.ones(2), True, False),
        ("weight", torch.ones(2), False, False),
        ("in_proj_bias", torch.ones(2), False, False),
        ("token", torch.ones(2), True, False),
        ("dx", torch.ones(2), False, True),
        ("weight", torch.ones(2, dtype=torch.long), False, True),
        ("weight", torch.ones(2, dtype=torch.complex64), True, False),
    ],
)
def test_what_is_a_constant(leaf, value, requires_grad, constant):
    assert is_constant(leaf, nn.Parameter(value, requires_grad=requires_grad)) is constant


def test_a_frozen_tower_is_a_modality_but_has_nothing_to_prune():
    groups = Modalities(BRANCHES).resolve(FrozenTower())
    assert len(groups["camera"]) == 4
    message = (
        "modality 'camera' has nothing to prune: all of its 4 parameters are frozen or belong to no "
        "convolution, linear or attention layer; unfreeze the branch, correct the pattern, or add its "
        "weights with the option `prunable`"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        check_prunable(groups, prunable(FrozenTower()))
    with pytest.raises(ValueError, match=re.escape(message)):
        Calibration(FrozenTower(), squared_error, [], [], BRANCHES)


def test_an_empty_shared_group_is_no_error():
    model = nn.ModuleDict({"camera": nn.Linear(2, 2), "lidar": nn.Linear(2, 2)})
    groups = Modalities(BRANCHES).resolve(model)
    assert groups["shared"] == ()
    check_prunable(groups, prunable(model))


def test_group_of_inverts():
    assert group_of({"camera": ("a", "b"), "shared": ("c",)}) == {"a": "camera", "b": "camera", "c": "shared"}


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["camera", "lidar"], "modalities must map names to patterns, got ['camera', 'lidar']"),
        ({"camera": [1], "lidar": "b"}, "modality 'camera': 1 is not a pattern over module paths"),
        ({"camera": "a", "lidar": ["!"]}, "modality 'lidar': '!' is not a pattern over module paths"),
        ({"camera": "", "lidar": "b"}, "modality 'camera': '' is not a pattern over module paths"),
    ],
)
def test_wrong_types_are_named(patterns, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        Modalities(patterns)


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (
            {"camera": "camera"},
            "at least two modalities are needed to find what one makes redundant in another, got ['camera']",
        ),
        (
            {"camera": "a", "shared": "b"},
            "modality name 'shared' is not allowed: give a non-empty name other",
        ),
        (
            {"": "a", "lidar": "b"},
            "modality name '' is not allowed: give a non-empty name other than 'shared'",
        ),
        ({1: "a", "lidar": "b"}, "modality name 1 is not allowed"),
        (
            {"camera": ["!a"], "lidar": "b"},
            "modality 'camera' needs at least one pattern without '!', got ['!a']",
        ),
        ({"camera": [], "lidar": "b"}, "modality 'camera' needs at least one pattern without '!', got []"),
    ],
)
def test_wrong_values_are_named(patterns, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Modalities(patterns)


@pytest.mark.parametrize(
    ("model", "patterns", "message"),
    [
        (
            TwoTower(),
            "camra",
            "lidar: pattern 'camra' matches no parameter of TwoTower; did you mean 'camera'",
        ),
        (
            TwoTower(),
            ["lidar", "!lidar.9"],
            "lidar: pattern '!lidar.9' matches no parameter of TwoTower; did you",
        ),
        (
            Nested(TwoTower()),
            "lidar",
            "lidar: pattern 'lidar' matches no parameter of Nested; did you mean 'model.lidar'",
        ),
        (TwoTower(), "zzz", "lidar: pattern 'zzz' matches no parameter of TwoTower; did you mean 'camera'"),
        (
            TwoTower(),
            ["lidar", "!lidar*"],
            "modality 'lidar' has no parameter: its patterns ['lidar', '!lidar*'] exclude",
        ),
        (
            nn.Sequential(nn.LazyLinear(2)),
            "0",
            "parameter '0.weight' has no shape yet: run one batch through the lazy layers first",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_a_model_that_does_not_fit_is_explained(model, patterns, message):
    first = "*camera*" if not isinstance(model, nn.Sequential) else "0"
    with pytest.raises(ValueError, match=re.escape(message)):
        Modalities({"camera": first, "lidar": patterns}).resolve(model)


def test_a_module_without_parameters_is_not_suggested_for_its_own_name():
    model = OracleNet()
    model.camera = nn.Identity()
    with pytest.raises(ValueError, match="'camera' matches no parameter of OracleNet") as error:
        Modalities(BRANCHES).resolve(model)
    assert "did you mean 'camera'" not in str(error.value)


def test_a_module_of_constants_only_is_not_suggested_for_its_own_name():
    model = Geometry()
    del model.camera.net
    with pytest.raises(ValueError, match="'camera' matches no parameter of Geometry") as error:
        Modalities(BRANCHES).resolve(model)
    assert "'camera'" not in str(error.value).split("did you mean")[1]


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(3, 4)
        self.conv = nn.Conv2d(1, 1, 1)
        self.up = nn.ConvTranspose1d(1, 1, 1)
        self.norm = nn.LayerNorm(4)
        self.attention = nn.MultiheadAttention(4, 2)
        self.separate = nn.MultiheadAttention(4, 2, kdim=3, vdim=3)
        self.bilinear = nn.Bilinear(2, 2, 1)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.token = nn.Parameter(torch.ones(1, 4))


def test_prunable_by_default():
    assert prunable(Layers()) == (
        "conv.weight",
        "up.weight",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "separate.q_proj_weight",
        "separate.k_proj_weight",
        "separate.v_proj_weight",
        "separate.out_proj.weight",
        "bilinear.weight",
    )


def test_prunable_patterns_add_and_remove():
    names = prunable(Layers(), ["embedding", "token", "!*attention", "!separate", "!up"])
    assert names == ("token", "embedding.weight", "conv.weight", "bilinear.weight")


def test_a_sparse_convolution_is_known_by_its_name():
    class SubMConv3d(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2, 3, 3, 3, 2))
            self.bias = nn.Parameter(torch.ones(2))

    class ConvNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))

    assert prunable(nn.Sequential(SubMConv3d(), ConvNorm())) == ("0.weight",)


def test_shared_and_dead_weights_are_prunable_once():
    assert prunable(Aliased(shared_stem=True)) == (
        "backbone.0.weight",
        "backbone.1.weight",
        "lidar.1.weight",
        "head.weight",
    )
    assert "auxiliary.weight" in prunable(Dead())


def test_a_parameter_on_the_model_itself():
    assert prunable(nn.Linear(2, 2)) == ("weight",)


@pytest.mark.parametrize(
    ("model", "patterns", "message"),
    [
        (
            nn.LayerNorm(2),
            [],
            "nothing is prunable: the model has no trainable weight of a convolution, linear or",
        ),
        (
            nn.Linear(2, 2),
            ["!*"],
            "attention layer that the patterns leave; unfreeze it or add parameters by pattern",
        ),
        (
            TwoTower(),
            ["haed"],
            "prunable: pattern 'haed' matches no parameter of TwoTower; did you mean 'head'",
        ),
    ],
)
def test_nothing_prunable_is_explained(model, patterns, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        prunable(model, patterns)
