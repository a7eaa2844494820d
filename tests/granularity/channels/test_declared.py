import pytest
import torch
from torch import nn

from altermoma_pl.granularity.channels.layouts import declared_groups
from tests.helpers.coupled_channels import found
from tests.helpers.coupled_models import CASES, Net, conv
from tests.helpers.searching import OUTPUT, column, refused, search, slices

UNREACHED = "the graph of gradients does not reach it: declare its group by hand"


def test_declared_groups_bridge_what_is_detached():
    case = CASES["island"]
    bare = search(case.model())
    assert (list(bare), bare.excluded) == (["b"], {"head": OUTPUT, "a": UNREACHED})
    bridge = found("island")["bridge"]
    assert slices(bridge) == {
        ("a.weight", 0): column(8),
        ("a.bias", 0): column(8),
        ("b.weight", 1): column(8),
    }
    assert bridge.producers == ("a.weight",)


def test_declared_with_depthwise_norms_and_offsets():
    def function(m, x):
        x = m.norm(m.depth(m.a(x)))
        x = torch.cat([m.b(x), x], 1)
        return m.head(torch.relu(x)).detach()

    model = Net(
        function, a=conv(3, 8), depth=conv(8, 8, groups=8), norm=nn.BatchNorm2d(8), b=conv(8, 4),
        head=conv(12, 2),
    ).eval()  # fmt: skip
    sides = {"a": "out", "depth": "out", "norm": "out", "b": "in", "head": "in:4"}
    channels = search(model, declared={"stream": sides})
    [group] = channels.groups
    assert group.attributes == (("depth", "groups"),)
    assert slices(group)["head.weight", 1] == column(8, 4)
    assert ("norm.running_var", 0) in slices(group)
    follow = "the channels cannot be followed: nothing that Net returns depends on its parameters"
    assert channels.excluded.keys() == {"b", "head"}
    assert all(reason.startswith(follow) for reason in channels.excluded.values())


def test_declared_groups_are_not_found_again():
    model = CASES["residual"].model()
    channels = search(model, declared={"mine": {"a": "out", "norm": "out", "b": "in"}})
    assert set(channels) == {"stem", "mine"}
    assert channels.excluded == {"head": OUTPUT}


@pytest.mark.parametrize(
    ("sides", "message"),
    [
        ({"absent": "out"}, r"'g': \['absent'\] are no modules of Net"),
        ({"b": "in"}, "'g' has no convolution or linear layer with side 'out'"),
        ({"norm": "out"}, "'g' has no convolution or linear layer with side 'out'"),
        ({"a": "both"}, "the side of 'a' must be 'out', 'in', or 'in:16' .* got 'both'"),
        ({"a": "out:4"}, "got 'out:4'"),
        ({"a": "out", "b": "in:x"}, "got 'in:x'"),
        ({"a": "out", "b": "in:1"}, "'b' has 6 channels, and 'a' puts out 6, beginning at 1"),
        ({"a": "out", "stem": "out"}, "'stem' has 8 channels, and 'a' puts out 6"),
        ({"a": "out", "": "in"}, "'' is a Net, whose channels cannot be removed one by one"),
        ({"a": "out"}, "the declared group 'g' cannot be removed: the smaller model does not run"),
    ],
)
def test_wrong_declarations(sides, message):
    refused(message, CASES["residual"].model(), declared={"g": sides})


def test_declared_groups_are_not_proved_by_themselves():
    [group] = declared_groups(CASES["residual"].model(), {"wrong": {"a": "out"}})
    assert group.num_channels == 6
