"""`keep_only_`: exact zeros where a mask says so and not one bit changed elsewhere."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from altermoma_pl.enforce.enforcement import Enforcement
from altermoma_pl.mask import masks
from altermoma_pl.mask.masks import Masks, keep_only_
from tests.helpers.models import OracleNet, fill

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
OTHERS = [torch.complex64, torch.complex128, torch.int8, torch.int64, torch.bool]
SPECIAL = [float("nan"), float("inf"), float("-inf"), -0.0, 0.0, -1.5, 2.0, 1e-40, 6e-8]
LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1) if t.dim() else t,
    "channels last": lambda t: t.to(memory_format=torch.channels_last) if t.dim() == 4 else t,
    "strided": lambda t: torch.stack([t, t], -1)[..., 0],
}


def as_bytes(tensor):
    return tensor.clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)


def expected(tensor, mask):
    return torch.where(mask, tensor, torch.zeros_like(tensor))


@torch.no_grad()
def apply(tensor, mask):
    keep_only_(tensor, mask)


@pytest.mark.parametrize("dtype", FLOATS)
def test_by_hand(dtype):
    tensor = torch.tensor([[1.0, float("nan"), float("inf")], [-0.0, float("-inf"), -2.0]], dtype=dtype)
    apply(tensor, torch.tensor([[True, False, False], [False, True, False]]))
    assert tensor.tolist() == [[1, 0, 0], [0, float("-inf"), 0]]
    assert torch.signbit(tensor).tolist() == [[False] * 3, [False, True, False]]


@settings(max_examples=150, deadline=None)
@given(
    shape=st.lists(st.integers(0, 5), max_size=4),
    dtype=st.sampled_from(FLOATS + OTHERS),
    layouts=st.tuples(st.sampled_from(sorted(LAYOUTS)), st.sampled_from(sorted(LAYOUTS))),
    chunk=st.integers(1, 40),
    seed=st.integers(0, 2**31),
)
def test_bit_for_bit_whatever_type_layout_and_chunk(shape, dtype, layouts, chunk, seed):
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(SPECIAL), shape, generator=generator)
    values = torch.tensor(SPECIAL, dtype=torch.float64)[picks]
    if dtype not in FLOATS and not dtype.is_complex:
        values = values.nan_to_num(3, 4, -4)
    tensor = LAYOUTS[layouts[0]](values.to(dtype))
    mask = LAYOUTS[layouts[1]](torch.rand(shape, generator=generator) < 0.5)
    wanted, strides, memory = expected(tensor, mask), tensor.stride(), tensor.data_ptr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masks, "_IN_CACHE", chunk)
        apply(tensor, mask)
    assert torch.equal(as_bytes(tensor), as_bytes(wanted))
    assert (tensor.stride(), tensor.data_ptr()) == (strides, memory)


@pytest.mark.parametrize("extra", [-1, 0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sizes_around_the_chunk(extra, dtype):
    size = masks._IN_CACHE + extra
    generator = torch.Generator().manual_seed(0)
    for shape in ((size,), (1, size), (size, 1), (2, size)):
        tensor = torch.randn(shape, generator=generator).to(dtype)
        mask = torch.rand(shape, generator=generator) < 0.5
        wanted = expected(tensor, mask)
        apply(tensor, mask)
        assert torch.equal(as_bytes(tensor), as_bytes(wanted))


def test_autograd_hears_of_it():
    """A backward pass whose weights were changed meanwhile must be an error, not a wrong gradient."""
    weight = torch.nn.Parameter(torch.ones(2))
    loss = (weight**2).sum()
    apply(weight, torch.tensor([True, False]))
    assert weight.requires_grad
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_tensors_that_are_whole_are_left_alone(monkeypatch):
    model, done = fill(OracleNet()), []
    monkeypatch.setattr(
        "altermoma_pl.enforce.enforcement.keep_only_",
        lambda tensor, mask: (done.append(tensor.shape), keep_only_(tensor, mask)),
    )
    dense = Masks.dense({name: p for name, p in model.named_parameters() if p.dim() > 1})
    enforcement = Enforcement(model, dense, [])
    assert done == []
    fewer = {name: mask.clone() for name, mask in dense.items()}
    fewer["lidar.weight"][0, 0] = False
    enforcement.masks = Masks(fewer)
    assert done == [model.lidar.weight.shape]
    assert model.lidar.weight.tolist() == [[0, 6]]
