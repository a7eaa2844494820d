import contextlib
import importlib.util
import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from altermoma_pl.export import check_onnx, example_tensors, to_onnx, to_torch_export

WRITERS = [to_onnx, to_torch_export]


class Sample(NamedTuple):
    image: torch.Tensor  # (B, 3, 8, 8) uint8
    points: torch.Tensor  # (N, 4)
    frame: torch.Tensor  # (N,)
    target: torch.Tensor  # (B,), which no output depends on


class Answer(NamedTuple):
    maps: dict
    scores: torch.Tensor
    nothing: None = None


def sample(frames=2, points=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Sample(
        image=torch.randint(256, (frames, 3, 8, 8), generator=generator, dtype=torch.uint8),
        points=torch.randn(points, 4, generator=generator),
        frame=torch.randint(frames, (points,), generator=generator),
        target=torch.zeros(frames),
    )


class Net(nn.Module):
    """Two inputs of different first dimensions, BatchNorm and dropout."""

    def __init__(self):
        super().__init__()
        self.camera = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5))
        self.lidar = nn.Linear(4, 4)

    def forward(self, batch):
        x = self.camera(batch.image.float() / 255).mean((2, 3))
        pooled = torch.zeros_like(x).index_add(0, batch.frame, self.lidar(batch.points))
        return Answer({"lidar": pooled, "camera": x}, x + pooled)


class Pair(nn.Module):
    """Takes tensors."""

    def __init__(self, function):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 3), Function(function))

    def forward(self, left, right):
        return self.inner(left) + right


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def pair(rows=2):
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(rows, 3, generator=generator), torch.randn(rows, 3, generator=generator)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return Net()


@pytest.fixture(scope="module")
def net_onnx(net, tmp_path_factory):
    return to_onnx(net, sample(), tmp_path_factory.mktemp("net") / "net.onnx")


@pytest.mark.parametrize(
    ("inputs", "names"),
    [
        (sample(), ["image", "points", "frame", "target"]),
        ((sample(),), ["image", "points", "frame", "target"]),
        (pair(), ["left", "right"]),
        (torch.ones(1), ["left"]),
        ([torch.ones(1), torch.ones(1)], ["left", "right"]),
        (([torch.ones(1), torch.ones(1)],), ["left_0", "left_1"]),
        ((*pair(), torch.ones(1)), ["left", "right", "input_2"]),
        ({"x": (torch.ones(1), {"y": torch.ones(1)}), "lambda": torch.ones(1)}, ["x_0", "x_1_y", "lambda_"]),
        ({0: torch.ones(1), "name": "road", "none": None, "scale": 2.0}, ["input_0"]),
        ((sample(), torch.ones(1)), ["left_image", "left_points", "left_frame", "left_target", "right"]),
    ],
)
def test_names_of_inputs(inputs, names):
    assert list(example_tensors(Pair(torch.relu), inputs)) == names


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((), "there is no tensor among the example inputs"),
        ({"name": "road"}, "there is no tensor among the example inputs"),
        ({"a.b": torch.ones(1), "a": {"b": torch.ones(1)}}, "two example inputs are named 'a_b'"),
        ((torch.ones(1), {"x": object()}), re.escape("right.x is of type object")),
    ],
)
def test_inputs_without_a_name_are_refused(inputs, message):
    with pytest.raises(ValueError, match=message):
        example_tensors(Pair(torch.relu), inputs)


def test_onnx_has_the_inputs_that_matter_and_named_outputs(net_onnx):
    import onnx

    graph = onnx.load(net_onnx).graph
    assert [each.name for each in graph.input] == ["image", "points", "frame"]
    assert [each.name for each in graph.output] == ["maps.lidar", "maps.camera", "scores"]
    first = {each.name: each.type.tensor_type.shape.dim[0].dim_param for each in graph.input}
    assert first["points"] == first["frame"]
    assert "" not in first.values()
    assert first["image"] != first["points"]


@pytest.mark.parametrize(("frames", "points"), [(1, 7), (3, 1), (4, 0), (2, 5)])
def test_onnx_gives_the_same_for_other_sizes(net, net_onnx, frames, points):
    assert 0 <= check_onnx(net_onnx, net, sample(frames, points, seed=1)) <= 1e-6


def test_torch_export_takes_names_and_other_sizes(net, tmp_path):
    path = to_torch_export(net, sample(), tmp_path / "new" / "net.pt2")
    module = torch.export.load(path).module()
    other = sample(3, 8, seed=1)
    found = module(points=other.points, image=other.image, frame=other.frame)
    net.eval()
    expected = net(other)
    net.train()
    assert list(found) == ["maps.lidar", "maps.camera", "scores"]
    assert_close(found["scores"], expected.scores)
    assert_close(found["maps.lidar"], expected.maps["lidar"])


@pytest.mark.parametrize("write", WRITERS)
def test_an_input_of_which_only_the_size_matters_stays(write, tmp_path):
    class Sized(nn.Module):
        def forward(self, image, points, frame):
            return points.new_zeros(image.shape[0], 4).index_add(0, frame, points)

    path = write(Sized(), sample()[:3], tmp_path / "sized")
    three = sample(3, 4)
    if write is to_onnx:
        assert check_onnx(path, Sized(), three[:3]) == 0
    else:
        found = torch.export.load(path).module()(image=three.image, points=three.points, frame=three.frame)
        assert_close(found["output"], Sized()(*three[:3]))


@pytest.mark.parametrize("write", WRITERS)
def test_an_input_that_does_not_matter_may_have_no_row(write, tmp_path):
    assert write(Net(), sample()._replace(target=torch.zeros(0)), tmp_path / "model").exists()


def test_without_dynamic_sizes_are_those_of_the_example(tmp_path):
    model = Pair(torch.relu)
    path = to_onnx(model, pair(1), tmp_path / "pair.onnx", dynamic=False)
    assert check_onnx(path, model, pair(1)) < 1e-6
    with pytest.raises(ValueError, match=r"does not accept the inputs left \(2, 3\), right \(2, 3\)"):
        check_onnx(path, model, pair(2))


def content(model):
    """Bits, flags and hooks of a model."""
    return (
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        [
            (module.training, len(module._forward_hooks), len(module._forward_pre_hooks))
            for module in model.modules()
        ],
        [(p.requires_grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()],
    )


class Destructive(Net):
    """Changes its weights in every forward pass."""

    def forward(self, batch):
        with torch.no_grad():
            self.lidar.weight.add_(1)
        return super().forward(batch)


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("kind", [Net, Destructive])
def test_the_model_is_left_as_it_was(kind, write, tmp_path):
    model = kind()
    model(sample()).scores.sum().backward()
    model.camera[1].eval()
    model.lidar.bias.requires_grad_(False)
    before = content(model)
    write(model, sample(), tmp_path / "model")
    assert_close(content(model), before, rtol=0, atol=0)


def fails_when_traced(x):
    return x if x.sum() > 0 else -x


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("function", [fails_when_traced, lambda x: x.reshape(7, 7)])
def test_the_model_is_left_as_it_was_after_an_error(write, function, tmp_path):
    model = Pair(function)
    model.inner[0].eval()
    before = content(model)
    with pytest.raises(ValueError, match=re.escape("inner.1 (Function)")):
        write(model, pair(), tmp_path / "model")
    assert_close(content(model), before, rtol=0, atol=0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((torch.ones(2, 3),), r"^Pair does not accept the inputs left \(2, 3\): TypeError: .* 'right'"),
        ((torch.ones(2, 5), torch.ones(2, 3)), r"^inner.0 \(Linear\) does not accept .* RuntimeError: mat1"),
        (pair(1), r"the example inputs \['left', 'right'\] have fewer than two rows"),
    ],
)
def test_example_inputs_that_do_not_fit(write, inputs, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        write(Pair(torch.relu), inputs, tmp_path / "model")


def test_an_exception_that_the_model_catches_does_not_mislead(tmp_path):
    class Catching(Pair):
        def forward(self, left, right):
            with contextlib.suppress(RuntimeError):
                self.inner(left)
            return self.inner[0](left) @ right.T[:2]

    with pytest.raises(ValueError, match=r"^Catching does not accept"):
        to_torch_export(Catching(lambda x: x.reshape(7, 7)), pair(), tmp_path / "model")


def test_branches_on_values_name_the_module_and_keep_the_cause(tmp_path):
    with pytest.raises(
        ValueError, match=r"^inner.1 \(Function\) cannot be traced: Could not guard"
    ) as caught:
        to_onnx(Pair(fails_when_traced), pair(), tmp_path / "model")
    assert "data-dependent" in str(caught.value.__cause__)
    assert "\n" not in str(caught.value)


def test_a_size_that_cannot_vary_is_an_error(tmp_path):
    model = Pair(lambda x: x + torch.ones(2, 1))
    with pytest.raises(ValueError, match=r"^Pair cannot be traced with first dimensions that vary") as caught:
        to_torch_export(model, pair(), tmp_path / "model")
    assert "left" in str(caught.value)
    assert to_torch_export(model, pair(), tmp_path / "model.pt2", dynamic=False).exists()


def test_a_model_without_a_tensor_is_refused(tmp_path):
    class Silent(nn.Module):
        def forward(self, x):
            return {"length": x.dim()}

    with pytest.raises(ValueError, match="Silent gives no tensor"):
        to_onnx(Silent(), pair()[0], tmp_path / "model")


def test_an_output_of_another_type_is_refused(tmp_path):
    class Opaque(nn.Module):
        def forward(self, x):
            return {"boxes": [x, object()]}

    with pytest.raises(ValueError, match=r"^Opaque does not accept .* boxes.1 is of type object"):
        to_onnx(Opaque(), pair()[0], tmp_path / "model")


class Repeating(nn.Module):
    """Gives one tensor twice, and an input as it came, all by the names given."""

    def __init__(self, *names):
        super().__init__()
        self.names = names

    def forward(self, x):
        y = x.sin()
        return dict(zip(self.names, (y, y, x), strict=True))


def test_a_tensor_that_is_given_twice_and_an_input_as_it_came(tmp_path):
    import onnx

    model = Repeating("first", "second", "same")
    path = to_onnx(model, pair()[0], tmp_path / "model.onnx")
    onnx.checker.check_model(path)
    assert check_onnx(path, model, pair(3)[0]) < 1e-6


def test_an_output_with_the_name_of_an_input_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"outputs \['x'\] of Repeating have the names of inputs"):
        to_onnx(Repeating("first", "second", "x"), pair()[0], tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
    assert to_torch_export(Repeating("first", "second", "x"), pair()[0], tmp_path / "model.pt2").exists()


def test_two_outputs_of_one_name_are_refused(tmp_path):
    with pytest.raises(ValueError, match="two outputs are named '0'"):
        to_onnx(Repeating("0", 0, "same"), pair()[0], tmp_path / "model")


def test_an_operator_that_onnx_lacks_is_named(tmp_path):
    class Inverse(nn.Module):
        def forward(self, x):
            return torch.linalg.inv(x)

    with pytest.raises(
        ValueError, match=r"Inverse has no ONNX: there is no operator for aten[.]linalg_inv_ex"
    ):
        to_onnx(Inverse(), torch.eye(3).expand(2, 3, 3), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("opset", [18, 21])
def test_opset(opset, tmp_path):
    import onnx

    model = Pair(torch.relu)
    path = to_onnx(model, pair(), tmp_path / "model", opset=opset)
    assert onnx.load(path).opset_import[0].version == opset
    assert check_onnx(path, model, pair(3)) < 1e-6


@pytest.mark.parametrize("opset", [6, 99])
def test_an_opset_that_cannot_be_had_is_an_error(opset, tmp_path):
    with pytest.raises(ValueError, match=f"opset {opset} cannot be had for Pair, only 18: give 18 or more"):
        to_onnx(Pair(torch.relu), pair(), tmp_path / "model", opset=opset)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_printed(tmp_path, capfd, caplog):
    to_onnx(Net(), sample(), tmp_path / "model")
    to_torch_export(Net(), sample(), tmp_path / "model.pt2")
    with pytest.raises(ValueError, match="cannot be traced"):
        to_onnx(Pair(fails_when_traced), pair(), tmp_path / "model")
    assert capfd.readouterr() == ("", "")
    assert [record for record in caplog.records if record.levelname != "DEBUG"] == []


def test_another_model_is_told_by_the_output(net, net_onnx):
    other = Net()
    other.load_state_dict(net.state_dict())
    with torch.no_grad():
        other.lidar.bias.add_(1)
    with pytest.raises(ValueError, match=r"output 'maps.lidar' of .* 0.0001 is allowed") as caught:
        check_onnx(net_onnx, other, sample())
    assert 0.01 < float(re.search(r"differs by ([\d.]+) of its scale", str(caught.value))[1]) < 10


def test_another_kind_of_model_is_refused(net_onnx):
    with pytest.raises(ValueError, match=r"takes \['image', 'points', 'frame'\] and gives .*'left', 'right'"):
        check_onnx(net_onnx, Pair(torch.relu), pair())


@pytest.mark.parametrize(
    ("changed", "allowed"), [(float("nan"), False), (float("inf"), True)], ids=["NaN", "infinite"]
)
def test_values_that_are_not_finite(changed, allowed, tmp_path):
    class Constant(nn.Module):
        def forward(self, x):
            return x.relu() * changed

    path = to_onnx(Constant(), torch.ones(2, 3), tmp_path / "model")
    if allowed:
        assert check_onnx(path, Constant(), torch.ones(2, 3)) == 0
    else:
        with pytest.raises(ValueError, match="differs by nan"):
            check_onnx(path, Constant(), torch.ones(2, 3))


@pytest.mark.parametrize(
    ("write", "saving"), [(to_onnx, "torch.onnx.ONNXProgram"), (to_torch_export, "torch.export")]
)
def test_a_file_is_there_whole_or_not_at_all(write, saving, tmp_path, monkeypatch):
    path = write(Pair(torch.relu), pair(), tmp_path / "model.file")
    before = path.read_bytes()

    def half(*arguments):
        destination = next(each for each in arguments if isinstance(each, Path))
        destination.write_bytes(before[:100])
        raise KeyboardInterrupt

    monkeypatch.setattr(f"{saving}.save", half)
    with pytest.raises(KeyboardInterrupt):
        write(Pair(torch.relu), pair(), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_weights_in_a_second_file_move_with_the_first(tmp_path, monkeypatch):
    save = torch.onnx.ONNXProgram.save
    monkeypatch.setattr(torch.onnx.ONNXProgram, "save", lambda *a: save(*a, external_data=True))
    model = Pair(torch.relu)
    path = to_onnx(model, pair(), tmp_path / "model.onnx")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    assert check_onnx(path, model, pair(3)) < 1e-6


@pytest.mark.parametrize("missing", ["onnx", "onnxscript", "onnxruntime"])
def test_the_extra_is_named_where_it_is_missing(net, net_onnx, missing, monkeypatch, tmp_path):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else found(name))
    use = {"onnxruntime": lambda: check_onnx(net_onnx, net, sample())}
    message = rf"{missing} not found: pip install altermoma-pl\[export\]"
    with pytest.raises(ModuleNotFoundError, match=message):
        use.get(missing, lambda: to_onnx(net, sample(), tmp_path / "model"))()
