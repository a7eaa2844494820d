"""What is pruned as one piece: strings and objects, what cannot go together, and shares of channels."""

import re
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from altermoma_pl import AlterEva, Channel, GraSP, Magnitude, Masks, NofM, Weight
from altermoma_pl.granularity import Granularity, Ranking, Traced, parse_granularity
from altermoma_pl.granularity.base import input_dims
from altermoma_pl.granularity.channels.groups import ChannelGroup, Channels, Slice


def layer(name, channels, each=1):
    """A group of one weight (channels * each, 1), of which a channel has `each` rows."""
    index = torch.arange(channels * each).view(channels, each)
    return ChannelGroup(name, channels, (Slice(f"{name}.weight", 0, index),), (f"{name}.weight",))


CHANNELS = Channels((layer("camera", 8), layer("lidar.a", 4), layer("lidar.b", 12), layer("head", 8)))
GROUP_OF = {"camera.weight": "camera", "lidar.a.weight": "lidar", "lidar.b.weight": "lidar"} | {
    "head.weight": "shared"
}


class Flops:
    """100 FLOPs of which a channel of the camera takes 5, one of any other layer 1, and the rest 36."""

    total = 100.0

    def __call__(self, widths):
        return 36.0 + sum(width * (5 if name == "camera" else 1) for name, width in widths.items())


def ranking(masks=None, scope="global", min_density=0.0):
    weights = {f"{name}.weight": torch.ones(group.num_channels, 1) for name, group in CHANNELS.items()}
    masks = masks or Masks.dense(weights)
    return Ranking(masks, GROUP_OF, scope, min_density, traced=Traced(CHANNELS, Flops()))


def scores(**changed):
    """1, 2, 3.. in each group."""
    found = {name: torch.arange(1.0, group.num_channels + 1) for name, group in CHANNELS.items()}
    return found | {name.replace("_", "."): value for name, value in changed.items()}


def widths(masks):
    return {name: int(flags.sum()) for name, flags in CHANNELS.kept(masks).items()}


# What a user writes.


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("weight", Weight()),
        ("channel", Channel()),
        ("2:4", NofM(2, 4)),
        (" 1 : 8 ", NofM(1, 8)),
        (NofM(3, 5), NofM(3, 5)),
        (Channel("flops", 4), Channel("flops", 4)),
    ],
)
def test_parse(value, expected):
    assert parse_granularity(value) == expected


@pytest.mark.parametrize(
    "value",
    [
        "Weight",
        "",
        "2",
        "2:",
        "2:4:8",
        "-2:4",
        "2/4",
        "2.0:4",
        0.5,
        124,
        None,
        True,
        2.5,
        [],
        {"class_path": "Channel"},
        Channel,
    ],
)
def test_what_is_no_granularity_is_refused(value):
    message = f"granularity must be 'weight', 'channel', N:M .* in quotes: .*got {re.escape(repr(value))}"
    with pytest.raises(ValueError, match=message.replace("* in", "*in")):
        parse_granularity(value)


@pytest.mark.parametrize(("n", "m"), [(0, 4), (4, 4), (5, 4), (-1, 4), (2.0, 4), (True, 4)])
def test_numbers_that_are_no_n_of_m_are_refused(n, m):
    with pytest.raises(ValueError, match=re.escape(f"1 <= N < M, like 2:4, got {n!r}:{m!r}")):
        NofM(n, m)


@pytest.mark.parametrize(("text", "given"), [("4:2", "4:2"), ("0:4", "0:4"), ("2:x", "'2:x'"), (":", "':'")])
def test_wrong_numbers_are_refused(text, given):
    with pytest.raises(ValueError, match=f"N:M .*got {given}"):
        parse_granularity(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "latency"}, "target must be one of .*got 'latency'"),
        ({"round_to": 0}, "round_to must be at least 1, got 0"),
        ({"round_to": 2.0}, "round_to must be .*got 2.0"),
    ],
)
def test_options_of_channels_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        Channel(**options)


@pytest.mark.parametrize(
    ("granularity", "changes", "message"),
    [
        (NofM(), {"sparsity": 0.6}, "2:4 prunes a share of 0.5: set sparsity to that, got 0.6"),
        (NofM(1, 3), {"sparsity": 0.667}, f"1:3 prunes a share of {1 - 1 / 3}: set sparsity to that"),
        (NofM(), {"sparsity": {"camera": 0.5}}, "set sparsity to that, got .'camera'"),
        (NofM(), {"scope": "layer"}, "2:4 prunes every block alike: choose the scope 'global', got 'layer'"),
        (NofM(), {"min_density": 0.6}, "keeps 0.5 of each tensor, less than min_density=0.6: lower"),
        (Channel(), {"criterion": GraSP()}, "GraSP scores single weights, not channels: choose AlterEva"),
        (Channel(), {"scope": "row"}, "the scope 'row' is one of weights: choose 'global'"),
        (Channel("flops"), {"scope": "modality"}, "FLOPs are those of the whole model: choose .*'modality'"),
    ],
)
def test_what_cannot_go_together_is_refused(granularity, changes, message):
    options = {"criterion": Magnitude(), "sparsity": 0.5, "scope": "global", "min_density": 0.01} | changes
    with pytest.raises(ValueError, match=message):
        granularity.check(**options)


@pytest.mark.parametrize("granularity", [Weight(), NofM(), Channel(), Channel("flops")])
def test_the_usual_options_go_with_all(granularity):
    assert granularity.check(AlterEva(), 0.5, "global", 0.01) is None


def test_only_channels_are_traced():
    assert Weight().trace(nn.Linear(1, 1), lambda model, batch: None, [], []) is None
    with pytest.raises(ValueError, match="the channels are not known: the model was not traced"):
        Channel().pruned(Ranking(Masks.dense({"a": torch.ones(2)}), {"a": "a"}, "global", 0.0), False)
    assert [kind.by_channel for kind in (Weight, NofM, Channel)] == [False, False, True]


def test_whatever_derives_from_the_base_is_taken():
    class Mine(Weight):
        pass

    assert isinstance(parse_granularity(Mine()), Granularity)


# Weights, and N of M.

MASKS = Masks(
    {"camera.weight": torch.tensor([[True, False, True, False]]), "head.weight": torch.ones(1, 4) > 0}
)


def of_weights(masks=MASKS, **options):
    return Ranking(masks, {"camera.weight": "camera", "head.weight": "shared"}, "global", 0.0, **options)


def test_shares_of_weights():
    assert Weight().pruned(of_weights(), by_modality=False) == 0.25
    assert Weight().pruned(of_weights(), by_modality=True) == {"camera": 0.5, "shared": 0.0}


@pytest.mark.parametrize("grain", [Weight(), NofM()])
def test_missing_weights_are_counted(grain):
    assert grain.missing(0.5, of_weights()) == 0.25
    assert grain.missing(0.25, of_weights()) == 0.0
    assert grain.share_of == "weights"


@pytest.mark.parametrize(
    ("scope", "sparsity", "missing"),
    [
        ("global", 0.7, 0.5),  # 6 of 8 by rounding
        ("modality", {"camera": 0.5, "shared": 0.25}, 0.125),
        ("layer", 0.6, 0.25),  # 2 of 4 in each
        ("row", 0.6, 0.25),
    ],
)
def test_missing_weights_of_each_scope(scope, sparsity, missing):
    within = replace(of_weights(), scope=scope)
    assert Weight().missing(sparsity, within) == missing
    given = {name: torch.arange(4.0).view(1, 4) for name in MASKS}
    masks = Weight().masks(given, sparsity, within)
    assert (MASKS.num_kept - masks.num_kept) / 8 == missing
    assert Weight().missing(sparsity, replace(within, masks=masks)) == 0.0


@pytest.mark.parametrize(
    ("scope", "sparsity", "min_density", "message"),
    [
        ("global", 0.1, 0.0, "sparsity 0.1 of the model is below what is already pruned, 0.25: masks only"),
        ("layer", 0.25, 0.0, "sparsity 0.25 of 'camera.weight' is below what is already pruned, 0.5"),
        ("row", 0.25, 0.0, "sparsity 0.25 of a row of 'camera.weight' is below what is already pruned, 0.5"),
        ("global", 0.5, 1.0, "keeps 4 of 8 weights, but min_density=1 protects 6: lower one of them"),
        ("row", 0.75, 0.5, "sparsity 0.75 of 'camera.weight' keeps 1 of 4 weights, but min_density=0.5"),
    ],
)
def test_weights_that_cannot_be_reached_are_an_error(scope, sparsity, min_density, message):
    within = replace(of_weights(), scope=scope, min_density=min_density)
    given = {name: torch.arange(4.0).view(1, 4) for name in MASKS}
    for act in (Weight().check_reachable, Weight().missing, partial(Weight().masks, given)):
        with pytest.raises(ValueError, match=re.escape(message)):
            act(sparsity, within)


def test_blocks_that_cannot_be_reached_are_an_error():
    assert NofM().check_reachable(0.5, of_weights()) is None
    with pytest.raises(
        ValueError, match=r"masks of before leave 2 of 4 weights in a block of 'camera.weight'"
    ):
        NofM(3, 4).check_reachable(0.25, of_weights())
    with pytest.raises(
        ValueError, match=r"4 of shape .1, 4., is not divisible by 3 as 2:3 needs it: exclude"
    ):
        NofM(2, 3).check_reachable(1 / 3, of_weights())


def test_blocks_of_four_keep_their_best_two():
    given = {"camera.weight": torch.tensor([[3.0, 9, 2, 9]]), "head.weight": torch.tensor([[1.0, 2, 4, 3]])}
    masks = NofM().masks(given, 0.5, of_weights())
    assert masks["camera.weight"].tolist() == [[True, False, True, False]]  # what was left
    assert masks["head.weight"].tolist() == [[False, False, True, True]]
    earlier = NofM().masks(given, 0.375, of_weights())
    assert earlier["head.weight"].tolist() == [[False, True, True, True]]
    with pytest.raises(TypeError, match=r"2:4 has one sparsity, got .'camera'"):
        NofM().masks(given, {"camera": 0.5}, of_weights())


def test_inputs_of_transposed_convolutions_come_first():
    model = nn.Sequential(nn.Conv2d(4, 8, 1), nn.ConvTranspose2d(8, 3, 1))
    assert input_dims(model) == {"1.weight": 0}
    dense = Masks.dense(dict(model.named_parameters()))
    given = {"1.weight": torch.arange(24.0).view(8, 3, 1, 1)}
    within = Ranking(
        Masks({"1.weight": dense["1.weight"]}), {"1.weight": "a"}, "global", 0.0, input_dims=input_dims(model)
    )
    kept = NofM().masks(given, 0.5, within)["1.weight"][:, 0, 0, 0]
    assert kept.tolist() == [False, False, True, True] * 2


# Channels.


def test_all_channels_compete():
    masks = Channel(round_to=2).masks(scores(), 0.5, ranking())
    assert sum(widths(masks).values()) == 16
    assert masks["camera.weight"][:, 0].tolist() == [False] * 4 + [True] * 4


def test_channels_of_a_modality_compete():
    low = scores(camera=torch.arange(8.0) / 100)
    assert widths(Channel(round_to=2).masks(low, 0.5, ranking()))["camera"] == 2  # one block always stays
    within = ranking(scope="modality")
    masks = Channel(round_to=2).masks(low, 0.5, within)
    assert widths(masks)["camera"] == 4
    assert widths(masks)["head"] == 4
    assert widths(masks)["lidar.a"] + widths(masks)["lidar.b"] == 8


def test_one_sparsity_for_each_modality():
    share = {"camera": 0.75, "lidar": 0.5, "shared": 0.0}
    masks = Channel(round_to=2).masks(scores(), share, ranking(scope="modality"))
    assert widths(masks)["camera"] == 2
    assert widths(masks)["lidar.a"] + widths(masks)["lidar.b"] == 8
    assert widths(masks)["head"] == 8
    assert Channel().pruned(ranking(masks, "modality"), by_modality=True) == share


def test_each_layer_by_itself():
    masks = Channel(round_to=4).masks(scores(lidar_a=torch.ones(4)), 0.0, ranking(scope="layer"))
    assert masks == ranking().masks
    masks = Channel(round_to=2).masks(scores(), 0.4, ranking(scope="layer"))
    assert widths(masks) == {"camera": 4, "lidar.a": 2, "lidar.b": 6, "head": 4}


def test_a_later_event_takes_no_more_than_blocks_of_the_first_forced():
    """Blocks of 4 take half of the camera for a share of 0.1, yet the widest layer needs no more for it."""
    grain = Channel(round_to=2)
    within = ranking(grain.masks(scores(), 0.1, ranking(scope="layer")), "layer")
    assert widths(within.masks) == {"camera": 6, "lidar.a": 2, "lidar.b": 10, "head": 6}
    assert grain.pruned(within, by_modality=False) == pytest.approx(1 / 6)  # of `lidar.b`; 0.25 of all
    assert grain.masks(scores(), grain.pruned(within, False), within) == within.masks
    assert grain.missing(1 / 6, within) == 0.0
    assert grain.missing(0.2, within) == pytest.approx(0.2 - 1 / 6)
    assert grain.share_of == "channels"


def test_the_share_of_flops_is_reached_by_less_than_a_block_too_much():
    grain = Channel("flops", round_to=2)
    masks = grain.masks(scores(camera=torch.arange(8.0) / 100), 0.25, ranking())
    assert widths(masks) == {"camera": 2, "lidar.a": 4, "lidar.b": 12, "head": 8}
    assert grain.pruned(ranking(masks), by_modality=False) == pytest.approx(0.3)
    assert grain.missing(0.3, ranking(masks)) == 0.0
    assert grain.missing(0.4, ranking(masks)) == pytest.approx(0.1)
    assert grain.share_of == "FLOPs"


def test_missing_channels_are_those_of_the_modality_that_lacks_most():
    share = {"camera": 0.5, "lidar": 0.25, "shared": 0.0}
    assert Channel(round_to=2).missing(share, ranking(scope="modality")) == 0.5


@pytest.mark.parametrize(
    ("grain", "sparsity", "min_density"), [(Channel(round_to=8), 0.5, 0.0), (Channel(round_to=2), 0.5, 0.6)]
)
def test_what_cannot_be_reached_is_an_error(grain, sparsity, min_density):
    within = ranking(min_density=min_density, scope="layer")
    with pytest.raises(ValueError, match=r"sparsity 0\.5 cannot be reached: .*lower round_to"):
        grain.check_reachable(sparsity, within)


def test_scores_that_are_not_finite_are_an_error():
    with pytest.raises(ValueError, match="scores of the channels of 'head' are not finite"):
        Channel().masks(scores(head=torch.full((8,), torch.nan)), 0.1, ranking())


def test_widths_of_layers_are_multiples_where_a_channel_has_several_rows():
    group = layer("wide", 8, each=4)
    traced = Traced(Channels((group,)), Flops())
    within = Ranking(
        Masks.dense({"wide.weight": torch.ones(32, 1)}), {"wide.weight": "a"}, "global", 0.0, traced=traced
    )
    masks = Channel(round_to=8).masks({"wide": torch.arange(8.0)}, 0.3, within)
    assert int(masks["wide.weight"].sum()) == 16  # 5 channels are 20 rows, 4 are 16
