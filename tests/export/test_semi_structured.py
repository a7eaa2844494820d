import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard, init_device_mesh
from torch.sparse import SparseSemiStructuredTensorCUTLASS
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

from altermoma_pl import Masks
from altermoma_pl.export import semi_structured
from altermoma_pl.export.semi_structured import device_obstacle, to_semi_structured
from altermoma_pl.mask.n_of_m import keep_n_of_m

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor:UserWarning")

NEEDS_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
CUDA = torch.device("cuda")


class Net(nn.Module):
    """Layers of all kinds; of `mixer` and `block` PyTorch's own code reads the weights."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(64, 128)
        self.act = nn.Sequential(nn.GELU(), nn.Linear(128, 64, bias=False))
        self.odd = nn.Linear(64, 40)
        self.conv = nn.Conv1d(64, 64, 1)
        self.mixer = nn.MultiheadAttention(64, 4, batch_first=True)
        self.block = nn.TransformerEncoderLayer(64, 4, 64, batch_first=True)

    def forward(self, x):
        return self.odd(self.act(self.first(x)))


CONVERTED = ("first.weight", "act.1.weight")


def masked(model, n=2, m=4):
    """Masks of all weights by magnitude."""
    weights = {name: p.detach().abs() for name, p in model.named_parameters() if p.ndim > 1}
    return keep_n_of_m(weights, n, m)


@pytest.fixture
def gaining(monkeypatch):
    """Every device gains."""
    monkeypatch.setattr(semi_structured, "device_obstacle", lambda device: None)


@pytest.fixture
def compressing(monkeypatch, gaining):
    """Compression that runs on a CPU, and can be undone there."""

    def compress(weight):
        packed, meta = sparse_semi_structured_from_dense_cutlass(weight)
        return SparseSemiStructuredTensorCUTLASS(weight.shape, packed, meta, None, None, None)

    monkeypatch.setattr(semi_structured, "to_sparse_semi_structured", compress)


# ------------------------------------------------------------------------------------------- conversion


@pytest.mark.usefixtures("compressing")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_linear_layers_are_compressed_and_others_are_told_why_not(dtype):
    model = Net().to(dtype)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    masks = masked(model)
    compressed, converted, dense = to_semi_structured(model, masks)
    assert converted == CONVERTED
    only = "only the weight of an nn.Linear can be compressed"
    fast = "nn.TransformerEncoderLayer reads its weights without calling the layer: call"
    assert dense == {
        "odd.weight": "shape (40, 64): both dimensions must be multiples of 16",
        "conv.weight": f"'weight' of Conv1d: {only}",
        "mixer.in_proj_weight": f"'in_proj_weight' of MultiheadAttention: {only}",
        "mixer.out_proj.weight": f"'weight' of NonDynamicallyQuantizableLinear: {only}",
        "block.self_attn.in_proj_weight": f"'in_proj_weight' of MultiheadAttention: {only}",
        "block.self_attn.out_proj.weight": f"'weight' of NonDynamicallyQuantizableLinear: {only}",
        "block.linear1.weight": f"{fast} torch.backends.mha.set_fastpath_enabled(False) first",
        "block.linear2.weight": f"{fast} torch.backends.mha.set_fastpath_enabled(False) first",
    }
    parameters = dict(compressed.named_parameters())
    for name, mask in masks.items():
        weight = parameters[name].detach()
        found = weight.to_dense() if name in converted else weight
        assert torch.equal(found, torch.where(mask, before[name], 0)), name
    assert all(not parameters[name].requires_grad for name in converted)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


@pytest.mark.usefixtures("compressing")
def test_without_the_fast_path_layers_of_a_transformer_are_compressed():
    model = nn.TransformerEncoderLayer(64, 4, 64).half()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        _, converted, _ = to_semi_structured(model, masked(model))
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert converted == ("linear1.weight", "linear2.weight")


@pytest.mark.usefixtures("compressing")
@pytest.mark.parametrize(
    ("n", "m", "reason"),
    [
        (1, 4, None),
        (1, 2, None),
        (2, 8, None),
        (4, 8, "more than 2 weights of some 4 consecutive inputs stay"),
        (3, 4, "more than 2 weights of some 4 consecutive inputs stay"),
    ],
)
def test_others_are_compressed_if_two_of_four_are_zero(n, m, reason):
    model = nn.Sequential(nn.Linear(64, 32)).half()
    _, converted, dense = to_semi_structured(model, masked(model, n, m))
    assert converted == (() if reason else ("0.weight",))
    assert dense == ({"0.weight": reason} if reason else {})


@pytest.mark.usefixtures("gaining")
@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Linear(64, 64), "torch.float32: turn the model into float16 or bfloat16 first, by .half() or"),
        (nn.Linear(64, 24).half(), "shape (24, 64): both dimensions must be multiples of 16"),
        (nn.Linear(8, 64).half(), "shape (64, 8): both dimensions must be multiples of 16"),
    ],
)
def test_a_matrix_that_cannot_be_compressed_stays_dense_and_masked(layer, reason):
    model = nn.Sequential(layer)
    compressed, converted, dense = to_semi_structured(model, masked(model))
    assert converted == ()
    assert dense["0.weight"].startswith(reason)
    assert int((compressed[0].weight == 0).sum()) == layer.weight.numel() // 2


@pytest.mark.usefixtures("compressing")
def test_layers_on_another_device_stay_dense(monkeypatch):
    monkeypatch.setattr(
        semi_structured, "device_obstacle", lambda device: "too slow" if device.type == "meta" else None
    )
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).half()
    masks = masked(model)
    model[1].to("meta")
    _, converted, dense = to_semi_structured(model, masks)
    assert (converted, dense) == (("0.weight",), {"1.weight": "too slow"})


# ------------------------------------------------------------------------------------------- errors


def test_a_model_on_a_cpu_is_refused():
    model = Net().half()
    with pytest.raises(ValueError, match="2:4 has no gain on a CPU: the zeros are multiplied like other"):
        to_semi_structured(model, masked(model))


def test_masks_of_another_model_are_refused():
    with pytest.raises(ValueError, match=r"masked parameter '0.weight' does not exist in Net"):
        to_semi_structured(Net(), masked(nn.Sequential(nn.Linear(64, 64))))


def test_sharded_masks_are_refused(tmp_path):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    try:
        mask = DTensor.from_local(torch.ones(4, 4).bool(), init_device_mesh("cpu", (1,)), [Shard(0)])
        with pytest.raises(ValueError, match="sharded weights cannot be compressed: load the checkpoint"):
            to_semi_structured(nn.Linear(4, 4), Masks({"weight": mask}))
    finally:
        torch.distributed.destroy_process_group()


# ------------------------------------------------------------------------------------------- devices


@pytest.fixture
def machine(monkeypatch):
    """A machine whose GPU is described by the test."""

    def describe(available=True, capability=(8, 0), hip=None, cusparselt=True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: cusparselt)

    return describe


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({}, None),
        ({"capability": (9, 0)}, None),
        ({"available": False}, "PyTorch finds no CUDA device here"),
        ({"capability": (7, 5)}, "this is Some GPU with compute capability 7.5"),
        ({"capability": (9, 4), "hip": "6.2"}, "this is Some GPU with compute capability 9.4"),
        ({"cusparselt": False}, "2:4 needs cuSPARSELt, without which this PyTorch was built"),
    ],
)
def test_what_stands_in_the_way_on_cuda(machine, found, expected):
    machine(**found)
    obstacle = device_obstacle(CUDA)
    assert (obstacle is None) if expected is None else expected in obstacle


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        ("cpu", "2:4 has no gain on a CPU: the zeros are multiplied like other numbers"),
        ("mps", "2:4 has no gain on the device 'mps': the zeros are"),
    ],
)
def test_what_stands_in_the_way_elsewhere(device, expected):
    assert device_obstacle(torch.device(device)).startswith(expected)


# ------------------------------------------------------------------------------------------- on a GPU


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(32, 64), (2, 5, 64)])
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=NEEDS_GPU)])
def test_outputs_are_those_of_the_masked_model(device, shape, dtype):
    reason = device_obstacle(torch.device(device))
    if reason is not None:
        pytest.skip(reason)
    model = Net().eval().to(device, dtype)
    masks = masked(model)
    compressed, converted, _ = to_semi_structured(model, masks)
    masks.apply_(model)
    assert converted == CONVERTED
    inputs = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    with torch.inference_mode():
        tolerance = 1e-2 if dtype == torch.float16 else 5e-2
        torch.testing.assert_close(compressed(inputs), model(inputs), rtol=tolerance, atol=tolerance)
