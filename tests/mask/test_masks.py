import re
import subprocess
import sys

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import nn

from altermoma_pl import Masks
from tests.helpers.models import OracleNet, fill

KEPT = {"camera.weight": [[1, 0], [0, 1]], "lidar.weight": [[0, 1]], "fusion.weight": [[1, 1, 0]]}


def masks_of(kept):
    return Masks({name: torch.tensor(rows, dtype=torch.bool) for name, rows in kept.items()})


def test_counts():
    masks = masks_of(KEPT)
    assert (masks.num_weights, masks.num_kept) == (9, 5)
    assert masks.sparsity == pytest.approx(4 / 9)
    assert len(masks) == 3
    assert list(masks) == list(KEPT)
    assert repr(masks) == "Masks(3 tensors, 5 of 9 weights kept)"


def test_dense_keeps_all():
    masks = Masks.dense(dict(OracleNet().named_parameters()))
    assert masks.sparsity == 0
    assert all(mask.dtype == torch.bool for mask in masks.values())
    assert masks["fusion.weight"].shape == (1, 3)


def test_equality_is_by_names_order_and_values():
    masks = masks_of(KEPT)
    assert masks == masks_of(KEPT)
    assert masks != masks_of(KEPT | {"lidar.weight": [[1, 1]]})
    assert masks != masks_of(dict(reversed(KEPT.items())))
    assert masks != masks_of({"lidar.weight": [[0, 1]]})
    assert masks != dict(masks)
    with pytest.raises(TypeError, match="unhashable"):
        hash(masks)


def test_apply_sets_pruned_weights_to_zero():
    model = fill(OracleNet())
    masks_of(KEPT).apply_(model)
    assert model.camera.weight.tolist() == [[1, 0], [0, 4]]
    assert model.lidar.weight.tolist() == [[0, 6]]
    assert model.fusion.weight.tolist() == [[7, 8, 0]]
    assert model.camera.weight.requires_grad


def test_apply_leaves_what_is_not_masked():
    model = fill(OracleNet())
    masks_of({"lidar.weight": [[0, 1]]}).apply_(model)
    assert model.camera.weight.tolist() == [[1, 2], [3, 4]]


def test_a_pruned_weight_is_plus_zero_whatever_it_was():
    model = fill(OracleNet())
    with torch.no_grad():
        model.fusion.weight.copy_(torch.tensor([[-1.0, float("inf"), float("nan")]]))
    masks_of({"fusion.weight": [[0, 0, 0]]}).apply_(model)
    assert torch.equal(model.fusion.weight, torch.zeros_like(model.fusion.weight))
    assert not torch.signbit(model.fusion.weight).any()


def test_fits_and_moves_to_the_model():
    model = OracleNet()
    masks = masks_of(KEPT)
    masks.check_fits(model)
    assert masks.to(model) == masks
    assert {mask.device for mask in masks.to(OracleNet().to("meta")).values()} == {torch.device("meta")}


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ({"radar.weight": [[1]]}, "masked parameter 'radar.weight' does not exist in OracleNet"),
        ({"lidar.weight": [1, 0]}, "mask of 'lidar.weight' has shape (2,), the parameter has (1, 2)"),
    ],
)
def test_masks_that_do_not_fit_are_named(kept, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        masks_of(kept).check_fits(OracleNet())


@pytest.mark.parametrize(
    ("masks", "error", "message"),
    [
        ({}, ValueError, "masks are empty: at least one parameter must be masked"),
        ({1: torch.ones(1, dtype=torch.bool)}, TypeError, "masks are keyed by parameter name, got 1"),
        ({"a": torch.ones(1)}, TypeError, "mask of 'a' must be a boolean tensor, got torch.float32"),
        ({"a": [True]}, TypeError, "mask of 'a' must be a boolean tensor, got list"),
    ],
)
def test_wrong_masks_are_named(masks, error, message):
    with pytest.raises(error, match=re.escape(message)):
        Masks(masks)


def test_bits_by_hand():
    masks = Masks({"a": torch.tensor([1, 0, 1, 0, 0, 0, 0, 1, 1], dtype=torch.bool)})
    state = masks.state_dict()
    assert state["a"]["shape"] == [9]
    assert state["a"]["bits"].tolist() == [1 + 4 + 128, 1]
    assert state["a"]["bits"].dtype == torch.uint8


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=3), st.lists(st.integers(0, 5), max_size=4), min_size=1, max_size=3
    ),
    st.integers(0, 2**31),
)
@settings(max_examples=80, deadline=None)
def test_bits_round_trip_for_any_shape(shapes, seed):
    generator = torch.Generator().manual_seed(seed)
    masks = Masks({name: torch.rand(shape, generator=generator) < 0.5 for name, shape in shapes.items()})
    state = masks.state_dict()
    assert Masks.from_state_dict(state) == masks
    assert all(entry["bits"].numel() == -(-masks[name].numel() // 8) for name, entry in state.items())


def test_masks_are_loaded_without_pickled_code_in_a_process_that_imports_the_package(tmp_path):
    masks = masks_of(KEPT)
    for name in ("fresh.pt", "counted.pt"):
        torch.save(masks, tmp_path / name)
        assert torch.load(tmp_path / name, weights_only=True) == masks
        code = f"import altermoma_pl, torch; print(torch.load({str(tmp_path / name)!r}, weights_only=True))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout == f"{masks!r}\n"  # and now they are counted


def test_the_state_is_loaded_without_pickled_code(tmp_path):
    torch.save(masks_of(KEPT).state_dict(), tmp_path / "masks.pt")
    state = torch.load(tmp_path / "masks.pt", weights_only=True)
    assert Masks.from_state_dict(state) == masks_of(KEPT)


def test_a_transposed_mask_is_packed_in_its_own_order():
    mask = (torch.arange(12).view(3, 4) % 3 == 0).T
    assert torch.equal(Masks.from_state_dict(Masks({"a": mask}).state_dict())["a"], mask)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"shape": [2]}, "KeyError('bits')"),
        (torch.ones(2), "IndexError("),
        ({"shape": [9], "bits": torch.zeros(1, dtype=torch.uint8)}, "[1] of torch.uint8 are not the 2 bytes"),
        ({"shape": [8], "bits": torch.zeros(1)}, "[1] of torch.float32 are not the 1 bytes of [8]"),
        ({"shape": [1, -8], "bits": torch.zeros(1, dtype=torch.uint8)}, "are not the -1 bytes of [1, -8]"),
        ({"shape": ["x"], "bits": torch.zeros(1, dtype=torch.uint8)}, "TypeError("),
        ({"shape": [8], "bits": None}, "AttributeError("),
        (None, "TypeError("),
    ],
)
def test_damaged_states_are_named(entry, message):
    place = "to its 'shape' and the 'bits' that fill it, which is not so at 'a': "
    with pytest.raises(ValueError, match=f"{re.escape(place)}.*{re.escape(message)}"):
        Masks.from_state_dict({"a": entry})


def test_what_is_no_state_is_refused():
    with pytest.raises(ValueError, match=r"state of masks must map each parameter name to .* got 'x'"):
        Masks.from_state_dict("x")


def test_an_empty_state_is_an_error():
    with pytest.raises(ValueError, match="masks are empty"):
        Masks.from_state_dict({})


def test_masks_survive_a_model_without_gradients():
    model = nn.Linear(2, 1, bias=False).requires_grad_(False)
    Masks({"weight": torch.tensor([[True, False]])}).apply_(model)
    assert model.weight[0, 1] == 0
    assert not model.weight.requires_grad
