"""Example inputs in each of their forms, which all functions take alike."""

from typing import NamedTuple

import pytest
import torch
from torch import nn

from altermoma_pl import find_channels, slim
from altermoma_pl.export import check_onnx, example_tensors, to_onnx, to_torch_export
from altermoma_pl.model.inputs import as_arguments, as_forward
from tests.helpers.coupled_channels import random_masks


class Sample(NamedTuple):
    image: torch.Tensor  # (B, 3)


class Net(nn.Module):
    """Takes an image by itself or as the entry of a structure, and perhaps a scale."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))

    def forward(self, batch, scale=1.0):
        if isinstance(batch, Sample):
            batch = batch.image
        elif isinstance(batch, dict):
            batch = batch["image"]
        return self.layers(batch) * scale


IMAGE, SCALE = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)), torch.ones(2, 1)
FORMS = {
    "tensor": (IMAGE, (IMAGE,)),
    "NamedTuple": (Sample(IMAGE), (Sample(IMAGE),)),
    "dictionary": ({"image": IMAGE}, ({"image": IMAGE},)),
    "tuple": ((IMAGE, SCALE), (IMAGE, SCALE)),
    "list": ([IMAGE, SCALE], (IMAGE, SCALE)),
}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Net().eval()


@pytest.mark.parametrize("form", FORMS)
def test_arguments(form):
    given, arguments = FORMS[form]
    assert as_arguments(given) == arguments
    assert as_arguments(arguments) == arguments


@pytest.mark.parametrize("form", FORMS)
def test_channels_and_the_slim_model_are_the_same(form, model):
    given, arguments = FORMS[form]
    channels = find_channels(model, given)
    assert channels.keys() == find_channels(model, lambda m: m(*arguments).square().mean()).keys()
    masks = random_masks(channels, model, 0)
    one, other = slim(model, masks, given), slim(model, masks, arguments)
    assert one.widths == other.widths
    assert one.model.layers[0].out_features < 8
    assert torch.equal(one.model(*arguments), other.model(*arguments))


@pytest.mark.parametrize("form", FORMS)
def test_files_are_the_same(form, model, tmp_path):
    given, arguments = FORMS[form]
    tensors = example_tensors(model, given)
    assert tensors.keys() == example_tensors(model, arguments).keys()
    path = to_onnx(model, given, tmp_path / "model.onnx")
    assert check_onnx(path, model, given) == check_onnx(path, model, arguments) < 1e-6
    program = torch.export.load(to_torch_export(model, given, tmp_path / "model.pt2")).module()
    assert torch.equal(program(**tensors)["output"], model(*arguments))


@pytest.mark.parametrize(
    "given", [None, "image", object(), nn.Linear(1, 1)], ids=lambda each: type(each).__name__
)
def test_another_type_is_refused(given):
    with pytest.raises(TypeError, match=rf"got {type(given).__name__}: give it as \(batch,\)"):
        as_arguments(given)
    assert as_arguments((given,)) == (given,)


@pytest.mark.parametrize("given", [(), []])
def test_no_argument_is_refused(given):
    with pytest.raises(ValueError, match="there is no tensor among the example inputs: give what `forward`"):
        as_arguments(given)


def test_a_function_of_the_model_is_taken_as_it_is(model):
    forward = lambda m: m(IMAGE).sum()  # noqa: E731
    assert as_forward(forward) is forward
    assert torch.equal(as_forward([IMAGE, SCALE])(model), model(IMAGE, SCALE))
