"""Scores of channels: by hand, against gates that autograd differentiates, and the paper's formulas."""

import copy

import pytest
import torch
from torch import nn

from altermoma_pl import SNIP, AlterEva, Magnitude, Masks, Random, Taylor, find_channels
from altermoma_pl.granularity.channels.calibration import ChannelCalibration
from altermoma_pl.model.contexts import noise_free
from altermoma_pl.score.criterion import Criterion
from altermoma_pl.score.passes import batch_derivatives
from tests.helpers.channel_models import Towers, paper
from tests.helpers.lightning_models import MODALITIES
from tests.helpers.models import concrete_subclasses, snapshot

pytestmark = pytest.mark.filterwarnings("ignore:.*batches were asked for")
pytest.importorskip("torch_pruning")


def squared_error(model, batch):
    x, target = batch
    return (model(x) - target).square().mean()


def batches(count, seed, size=6):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(5, size, generator=generator), torch.randn(5, 1, generator=generator))
        for _ in range(count)
    ]


def towers():
    """In train mode, with statistics and parameters of norms that are not the initial ones."""
    model = Towers()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), ("", model.camera[1].running_mean)]:
            tensor.add_(0.2 * torch.randn(tensor.shape, generator=generator), alpha=1.0 if name else 0.5)
    return model


def calibration(model=None, masks=None, probes=3, **options):
    model = towers() if model is None else model
    with noise_free(model):
        channels = find_channels(model, lambda m: squared_error(m, batches(1, 1)[0]))
    defaults = {"modalities": MODALITIES, "masks": masks, "channels": channels}
    return ChannelCalibration(
        model, squared_error, batches(probes, 1), batches(4, 2), **{**defaults, **options}
    )


class TwoLayers(nn.Module):
    """y = v . (w x + b) with w = (3, 0; 0, 5), b = (4, 12), v = (1, 2)."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(2, 2), nn.Linear(2, 1, bias=False)
        with torch.no_grad():
            self.first.weight.copy_(torch.tensor([[3.0, 0], [0, 5]]))
            self.first.bias.copy_(torch.tensor([4.0, 12]))
            self.last.weight.copy_(torch.tensor([[1.0, 2]]))

    def forward(self, x):
        return self.last(self.first(x))


def test_by_hand():
    """Of x = (1, 1): h = (7, 17), y = 41; the sums of theta g are 3 + 4 + 7 and 10 + 24 + 34."""
    model, x = TwoLayers(), torch.ones(1, 2)
    channels = find_channels(model, lambda m: m(x))
    own = by_hand(model, x, channels)
    sizes = torch.tensor([10.0, 29.0]).sqrt()  # without biases: 9 + 1, 25 + 4
    torch.testing.assert_close(own.weights["first"].detach(), sizes)
    loss, derivatives = batch_derivatives(own, "batch", x, own.weights)
    assert loss == 41
    torch.testing.assert_close(derivatives["first"], torch.tensor([14.0, 68.0]) / sizes)


def by_hand(model, x, channels):
    class OneGroup(ChannelCalibration):
        def _check_modalities(self):
            """One tower is enough to compute by hand."""

    return OneGroup(
        model, lambda m, b: m(b).sum(), [x], [x], {"a": ["first"], "b": ["last"]}, channels=channels
    )


def gated_derivatives(own, batch):
    """dL/dt of each channel at t = 1, with all its parameters scaled by t: no code of the package."""
    model = own.model
    parameters = dict(model.named_parameters())
    found = {}
    for name, group in own.channels.items():
        gate = torch.ones(group.num_channels, requires_grad=True)
        changed = dict(parameters)
        for each in group.slices:
            if each.name not in parameters:
                continue
            scale = torch.ones(parameters[each.name].shape[each.dim])
            scale = scale.index_put((each.index,), gate[:, None].expand(each.index.shape))
            shape = [1] * parameters[each.name].ndim
            shape[each.dim] = -1
            changed[each.name] = changed[each.name] * scale.view(shape)
        x, target = batch
        loss = (torch.func.functional_call(model, changed, (x,)) - target).square().mean()
        found[name] = torch.autograd.grad(loss, gate)[0]
    return found


def test_size_times_derivative_is_that_by_a_gate():
    own = calibration()
    assert set(own.channels) == {"camera.0", "camera.3", "lidar.0", "lidar.2"}
    batch = batches(1, 3)[0]
    with noise_free(own.model):
        _, derivatives = batch_derivatives(own, "batch", batch, own.weights)
        expected = gated_derivatives(own, batch)
    for name, size in own.weights.items():
        torch.testing.assert_close(size.detach() * derivatives[name], expected[name], rtol=1e-4, atol=1e-6)
    assert all(value.abs().max() > 1e-3 for value in expected.values())


def test_the_size_is_the_norm_of_the_weights():
    own = calibration()
    camera = own.model.camera
    rows, columns = camera[0].weight.flatten(1), camera[3].weight.transpose(0, 1).flatten(1)
    expected = torch.cat([rows, columns], 1).norm(dim=1)
    torch.testing.assert_close(own.weights["camera.0"].detach(), expected.detach())
    assert "camera.1.weight" in own.masked
    assert own.group_of == {name: name.partition(".")[0] for name in own.channels}


def sums_of_channels(own, products):
    """Group -> sum over all coupled parameters, with loops."""
    found = {}
    for name, group in own.channels.items():
        total = torch.zeros(group.num_channels)
        for each in group.slices:
            if each.name in products:
                for channel, positions in enumerate(each.index):
                    total[channel] += products[each.name].index_select(each.dim, positions).sum()
        found[name] = total
    return found


def gradients_of(model, batch):
    names, leaves = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(squared_error(model, batch), leaves, allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for n, p, g in zip(names, leaves, found, strict=True)}


def reference(own, steps, rate):
    """D_ch and R_ch of the paper: |sum theta g| and |sum theta (g - g')|, theta as before training."""
    theta = {name: p.detach().clone() for name, p in own.model.named_parameters()}
    (first, second), trainings = own.probe_batches[:2], own.training_batches
    with noise_free(own.model):
        model = copy.deepcopy(own.model)
        products = {n: theta[n] * g for n, g in gradients_of(model, first).items()}
        contribution = {n: s.abs() for n, s in sums_of_channels(own, products).items()}
        redundancy = {}
        for modality in ("camera", "lidar"):
            model = copy.deepcopy(own.model)
            for name, p in model.named_parameters():
                if name.startswith(modality):
                    p.data.zero_()
            before = gradients_of(model, first)
            for batch in trainings[:steps]:
                gradients = gradients_of(model, batch)
                for name, p in model.named_parameters():
                    if not name.startswith(modality):
                        p.data -= rate * gradients[name]
            after = gradients_of(model, second)
            change = sums_of_channels(own, {n: theta[n] * (before[n] - after[n]) for n in theta})
            redundancy[modality] = {n: s.abs() for n, s in change.items() if not n.startswith(modality)}
    return contribution, redundancy


def test_the_papers_components_are_those_of_a_plain_reference():
    own, criterion = calibration(), paper(num_reactivation_steps=3, learning_rate=0.05)
    contribution, redundancy = reference(own, steps=3, rate=0.05)
    found = criterion.components(own)
    for name, expected in contribution.items():
        torch.testing.assert_close(found.deci[name], expected, rtol=1e-4, atol=1e-6)
    assert {modality: set(own) for modality, own in found.reri.items()} == {
        "camera": {"lidar.0", "lidar.2"},
        "lidar": {"camera.0", "camera.3"},
    }
    for modality, expected in redundancy.items():
        for name, value in expected.items():
            torch.testing.assert_close(found.reri[modality][name], value, rtol=1e-3, atol=1e-6)
            assert value.max() > 1e-4


def pruned(own, group, gone):
    kept = {name: torch.ones(g.num_channels, dtype=torch.bool) for name, g in own.channels.items()}
    kept[group][gone] = False
    return own.channels.to_masks(kept, own.masked)


def test_channels_that_are_gone_have_no_derivative():
    dense = calibration()
    masks = pruned(dense, "camera.0", [1, 5])
    masks.apply_(dense.model)
    own = calibration(dense.model, masks)
    _, derivatives = batch_derivatives(own, "batch", batches(1, 3)[0], own.weights)
    assert (derivatives["camera.0"] == 0).nonzero().flatten().tolist() == [1, 5]
    assert (own.weights["camera.0"] == 0).nonzero().flatten().tolist() == [1, 5]
    assert own.alive["camera.0"].tolist() == [True, False, True, True, True, False, True, True]
    assert own.alive["lidar.0"].all()
    assert dense.alive is None


def test_masks_of_something_else_are_refused():
    dense = calibration()
    masks = dict(pruned(dense, "camera.0", [1]))
    masks["lidar.0.weight"] = masks["lidar.0.weight"].clone()
    masks["lidar.0.weight"][0, 0] = False
    with pytest.raises(ValueError, match=r"the mask of 'lidar.0.weight' prunes something else than whole ch"):
        calibration(dense.model, Masks(masks))


def test_a_modality_without_channels_is_an_error():
    model = towers()
    with noise_free(model):
        channels = find_channels(model, lambda m: squared_error(m, batches(1, 1)[0]), prunable=["!lidar.*"])
    with pytest.raises(
        ValueError, match=r"no channel of modality 'lidar' can be removed\. .*not prunable by"
    ):
        calibration(model, channels=channels)


CRITERIA = [
    Magnitude(),
    Random(),
    SNIP(2),
    Taylor(2),
    paper(),
    AlterEva(num_probe_batches=2, num_reactivation_steps=2),
    AlterEva(num_probe_batches=2, num_reactivation_steps=2, estimator="difference", beta=1.0),
]


def test_all_criteria_of_channels_are_here():
    kinds = {kind for kind in concrete_subclasses(Criterion) if kind.for_channels}
    assert kinds == {type(criterion) for criterion in CRITERIA}


@pytest.mark.parametrize("criterion", CRITERIA, ids=repr)
def test_a_criterion_scores_channels_and_leaves_the_model_alone(criterion):
    own = calibration()
    before = snapshot(own.model)
    scores = criterion.score(own)
    assert {name: score.shape for name, score in scores.items()} == {
        "camera.0": (8,),
        "camera.3": (4,),
        "lidar.0": (8,),
        "lidar.2": (4,),
    }
    assert all(score.isfinite().all() and len(score.unique()) > 2 for score in scores.values())
    after = snapshot(own.model)
    assert {k: v for k, v in after.items() if "rng" not in k} == {
        k: v for k, v in before.items() if "rng" not in k
    }
