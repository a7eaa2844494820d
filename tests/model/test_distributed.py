"""Several processes come to the scores and masks of one."""

import dataclasses
import re

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from altermoma_pl import (
    SNIP,
    AlterEva,
    GraSP,
    Magnitude,
    Masks,
    ProsPr,
    Random,
    Taylor,
    Wanda,
    choose_beta,
    top_k,
)
from altermoma_pl.model.distributed import (
    all_agree,
    check_division,
    check_same,
    full,
    gathered,
    is_sharded,
    like,
    local,
    num_processes,
    rank,
    sharded_like,
    sum_,
    sums,
    together,
    total,
)
from altermoma_pl.score.passes import NonFiniteError, batch_loss
from tests.helpers.masks import shrank
from tests.helpers.models import calibration, random_batches, snapshot, two_tower
from tests.helpers.processes import in_processes, result_of

pytestmark = pytest.mark.filterwarnings("ignore:.*batches were asked for")

PROBES = [tuple(t.double() for t in batch) for batch in random_batches(5, seed=1, samples=4)]
TRAININGS = [tuple(t.double() for t in batch) for batch in random_batches(6, seed=2, samples=4)]
SMALL = AlterEva(num_probe_batches=6, num_reactivation_steps=3, learning_rate=0.05)


def joined(batches):
    """Pairs of batches put together."""
    return [
        tuple(map(torch.cat, zip(*pair, strict=True)))
        for pair in zip(batches[::2], batches[1::2], strict=True)
    ]


def own(batches):
    """Every n-th batch, for each of n processes."""
    return batches[rank() :: num_processes()]


def made(probes=PROBES, trainings=TRAININGS, **changes):
    model = changes.pop("model", None) or two_tower().double()
    return calibration(model, probe_batches=probes, training_batches=trainings, **changes)


# What processes tell each other.


def arithmetic():
    mine = torch.tensor([1.0, 2.0]) * (rank() + 1)
    return {
        "sum_": sum_(mine).tolist(),
        "sums": sums([rank(), 0.5]),
        "gathered": gathered([rank(), 7]),
        "agree": (all_agree(True), all_agree(rank() == 0)),
    }


def test_numbers_go_round():
    expected = {"sum_": [3, 6], "sums": [1, 1], "gathered": [[0, 7], [1, 7]], "agree": (True, False)}
    assert result_of(arithmetic) == [expected, expected]


def test_one_process_talks_to_nobody():
    assert num_processes() == 1
    assert sums([1, 2]) == [1, 2]
    assert gathered([3]) == [[3]]
    assert sum_(torch.ones(2)).tolist() == [1, 1]
    check_same(b"1", "anything")
    with together(ValueError):
        pass


def different_digests():
    check_same(bytes([7, rank()]), "the masks")


def test_what_differs_is_an_error_in_all_processes():
    first, second = in_processes(different_digests)
    assert isinstance(first, RuntimeError)
    assert str(first) == str(second)
    assert str(first).startswith("the masks of process [1] are not those of process 0")


def failing(error):
    with together(ValueError):
        if rank() == 1:
            raise error


@pytest.mark.parametrize(
    ("error", "expected"), [(ValueError("x"), ValueError), (KeyError("x"), RuntimeError)]
)
def test_one_failure_fails_all(error, expected):
    first, second = in_processes(failing, error)
    assert type(first) is expected
    assert str(first).startswith("process [1] failed")
    assert type(second) is type(error)


# Rows of tensors.


def rows(shape):
    values = torch.arange(torch.Size(shape).numel(), dtype=torch.float64).view(shape)
    mesh = init_device_mesh("cpu", (num_processes(),))
    sharded = sharded_like(values, distribute_tensor(torch.zeros(shape), mesh, [Shard(0)]))
    again = like(local(sharded) * 1, sharded)
    return (
        is_sharded([sharded]), total(sharded), torch.equal(full(again), values), local(sharded).shape[0],
        torch.equal(local(distribute_tensor(values, mesh, [Shard(0)])), local(sharded)),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "num_rows"), [((4, 3), (2, 2)), ((5, 2), (3, 2)), ((1, 3), (1, 0)), ((3,), (2, 1))]
)
def test_tensors_by_rows(shape, num_rows):
    count = torch.Size(shape).numel()
    expected = [(True, count * (count - 1) / 2, True, own_rows, True) for own_rows in num_rows]
    assert result_of(rows, shape) == expected


def masks_by_rows():
    mesh = init_device_mesh("cpu", (num_processes(),))
    whole = Masks(
        {"a": torch.tensor([[True, False], [True, True], [False, False]]), "b": torch.tensor([True] * 9)}
    )
    model = nn.ParameterDict(
        {n: nn.Parameter(distribute_tensor(m + 1.0, mesh, [Shard(0)])) for n, m in whole.items()}
    )
    masks = whole.to(model)
    masks.apply_(model)
    again = Masks.from_state_dict(masks.state_dict())
    return (
        masks.sharded, masks.counts, masks.sparsity, again == whole, shrank(masks, masks),
        full(model["a"].detach()).tolist(), masks.digest == masks.to(model).digest,
    )  # fmt: skip


def test_masks_by_rows():
    expected = (True, {"a": 3, "b": 9}, 0.2, True, True, [[2, 0], [2, 2], [0, 0]], True)
    for result in result_of(masks_by_rows):
        assert result == (*expected[:2], pytest.approx(0.2), *expected[3:])


def printed_by_one():
    mesh = init_device_mesh("cpu", (num_processes(),))
    masks = Masks({"a": distribute_tensor(torch.eye(3), mesh, [Shard(0)]).bool()})
    shown = (repr(masks), masks.num_kept, masks.sparsity, len(masks.digest)) if rank() == 1 else None
    return shown, gathered([rank()])


def test_one_process_may_print_masks_that_all_share():
    expected = "Masks(1 tensors, 3 of 9 weights kept)", 3, pytest.approx(2 / 3), 32
    assert result_of(printed_by_one) == [(None, [[0], [1]]), (expected, [[0], [1]])]


def replicated():
    mesh = init_device_mesh("cpu", (num_processes(),))
    divided = [distribute_tensor(torch.zeros(2, 2), mesh, [Replicate()])]
    assert is_sharded(divided)
    check_division(divided)


def test_other_divisions_are_refused():
    for error in in_processes(replicated):
        assert isinstance(error, ValueError)
        assert "use fully_shard with one mesh of one dimension, without tensor parallelism" in str(error)


# Scores of data-parallel processes: each has half of the batches, and half of each training batch.


def scores():
    return {name: criterion.score(made(own(PROBES), own(TRAININGS))) for name, criterion in CRITERIA.items()}


@pytest.fixture(scope="module")
def replicas():
    return result_of(scores)


def one_process(criterion, probes=PROBES, **changes):
    return criterion.score(made(probes, joined(TRAININGS), **changes))


CRITERIA = {
    "AlterEva": SMALL,
    "AlterEva of weights": dataclasses.replace(
        SMALL, redundancy_level="weight", combination="subtract", beta=0.5
    ),
    "AlterEva, differences": dataclasses.replace(SMALL, estimator="difference", second_probe="same"),
    "AlterEva, sgd and clipping": dataclasses.replace(SMALL, optimizer="sgd", gradient_clip=0.1),
    "SNIP": SNIP(6),
    "Taylor": Taylor(6),
    "GraSP": GraSP(6, "finite_difference"),
    "GraSP exact": GraSP(6),
    "ProsPr": ProsPr(num_steps=2, learning_rate=0.01, num_probe_batches=6),
    "ProsPr full": ProsPr("full", num_steps=2, learning_rate=0.01, momentum=0.5, num_probe_batches=6),
    "Wanda": Wanda(6),
    "Magnitude": Magnitude(),
    "Random": Random(),
}


def assert_close(found, expected, rtol=1e-6):
    assert list(found) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=rtol, atol=1e-12)


@pytest.mark.parametrize("name", CRITERIA)
def test_scores_are_those_of_one_process(replicas, name):
    first, second = (result[name] for result in replicas)
    assert_close(first, one_process(CRITERIA[name]))
    assert all(torch.equal(first[n], second[n]) for n in first)


def losses():
    return SMALL.components(made(own(PROBES), own(TRAININGS))).losses


def test_losses_are_those_of_one_process():
    expected = SMALL.components(made(PROBES, joined(TRAININGS))).losses
    for found in result_of(losses):
        assert list(found) == list(expected)
        assert list(found.values()) == pytest.approx(list(expected.values()), rel=1e-9)


def uneven(criterion):
    return criterion.score(made(PROBES[:4] if rank() == 0 else PROBES[4:], own(TRAININGS)))


def test_processes_may_have_different_numbers_of_batches():
    for found in result_of(uneven, dataclasses.replace(SMALL, num_probe_batches=8)):
        assert_close(found, one_process(SMALL))


def nothing_on_one(criterion):
    return criterion.score(made(PROBES if rank() == 0 else [], own(TRAININGS)))


def test_a_process_may_have_no_batch():
    for found in result_of(nothing_on_one, dataclasses.replace(SMALL, num_probe_batches=10)):
        assert_close(found, one_process(SMALL))


def no_training_on_one():
    SMALL.score(made(own(PROBES), TRAININGS if rank() == 0 else []))


def test_training_takes_a_batch_of_each_process():
    for error in in_processes(no_training_on_one):
        assert isinstance(error, ValueError)
        assert "the training loader gives no batch" in str(error)


def betas():
    made_ = made(own(PROBES), own(TRAININGS))
    components = SMALL.components(made_)
    return choose_beta(SMALL, components, made_, lambda each: top_k(each, 0.5))[1]


def test_beta_is_chosen_together():
    first, second = result_of(betas)
    assert first == second
    one = made(PROBES, joined(TRAININGS))
    expected = choose_beta(SMALL, SMALL.components(one), one, lambda each: top_k(each, 0.5))[1]
    assert first == pytest.approx(expected, rel=1e-6)


# Batches that are not finite.


def with_nan(batches, index):
    image, points, target = batches[index]
    return [*batches[:index], (image * float("nan"), points, target), *batches[index + 1 :]]


def skipping(probes, trainings):
    one = made(own(probes), own(trainings), on_nonfinite="skip")
    found = SMALL.score(one)
    return found, one.num_skipped


def test_a_probe_batch_is_skipped_by_its_process():
    (first, count), (second, none) = result_of(skipping, with_nan(PROBES, 2), TRAININGS)
    assert (count, none) == (5, 0)  # all modalities, and each of two deactivated before and after
    assert_close(first, one_process(SMALL, [*PROBES[:2], *PROBES[3:]]))
    assert all(torch.equal(first[n], second[n]) for n in first)


def test_a_training_batch_is_skipped_by_all():
    (first, count), (second, other) = result_of(skipping, PROBES, with_nan(TRAININGS, 2))
    assert count == other == 2  # once with each modality deactivated
    trainings = joined([*TRAININGS[:2], *TRAININGS[4:]])
    assert_close(first, SMALL.score(made(PROBES, trainings)))
    assert all(torch.equal(first[n], second[n]) for n in first)


def failing_on_one(probes):
    one = made(own(probes), own(TRAININGS))
    before = snapshot(one.model)
    try:
        SMALL.score(one)
    except NonFiniteError as error:
        return snapshot(one.model) == before, str(error)


def test_a_broken_batch_of_one_process_is_an_error_in_all():
    (same, first), (other, second) = result_of(failing_on_one, with_nan(PROBES, 3))
    assert same
    assert other
    assert first.startswith("process [1] failed")
    assert second.startswith("the loss of probe batch 1 is nan")


def test_a_broken_training_batch_of_one_process_is_an_error_in_all():
    first, second = in_processes(skipping_not, with_nan(TRAININGS, 2))
    assert isinstance(first, NonFiniteError)
    assert str(first).startswith("the loss of training batch 1 is nan")
    assert str(second) == "training batch 1 of another process is not finite: see its message"


def skipping_not(trainings):
    SMALL.score(made(own(PROBES), own(trainings)))


# Sharded parameters: a batch is one of each process, so one process takes them joined.


def shard(model, whole=False):
    """Each part by itself, as in a LightningModule whose steps call them, or the whole around them too."""
    mesh = init_device_mesh("cpu", (num_processes(),))
    for part in (model.camera, model.lidar, model.head, *([model] if whole else ())):
        fully_shard(part, mesh=mesh)
    return model


SHARDABLE = {name: criterion for name, criterion in CRITERIA.items() if criterion.shardable}


def sharded_scores(masks):
    """Criterion -> its scores and masks, gathered, and whether the model is as it was."""
    model = shard(two_tower().double(), whole=masks is None)
    if masks is not None:
        masks = masks.to(model)
        masks.apply_(model)
    before = {name: local(p.detach()).clone() for name, p in model.named_parameters()}
    results = {}
    for name, criterion in SHARDABLE.items():
        one = made(own(PROBES[:4]), own(TRAININGS), model=model, masks=masks)
        found = criterion.score(one)
        kept = top_k(found, 0.5, within=masks, min_density=0.05)
        results[name] = (
            {n: full(s) for n, s in found.items()},
            {n: full(m.int()).bool() for n, m in kept.items()},
            all(torch.equal(local(p.detach()), before[n]) for n, p in model.named_parameters()),
        )
    return results


@pytest.fixture(scope="module", params=[False, True], ids=["dense", "pruned"])
def sharded(request):
    model, masks = two_tower().double(), None
    if request.param:
        masks = top_k({n: w.detach().abs() for n, w in calibration(model).weights.items()}, 0.3)
        masks.apply_(model)
    return model, masks, result_of(sharded_scores, masks)


@pytest.mark.parametrize("name", SHARDABLE)
def test_sharded_scores_and_masks_are_those_of_one_process(sharded, name):
    model, masks, results = sharded
    expected = SHARDABLE[name].score(made(joined(PROBES[:4]), joined(TRAININGS), model=model, masks=masks))
    for result in results:
        found, kept, same = result[name]
        assert_close(found, expected)
        assert Masks(kept) == top_k(expected, 0.5, within=masks, min_density=0.05)
        assert same


def partly_sharded():
    model = two_tower()
    fully_shard(model.camera, mesh=init_device_mesh("cpu", (num_processes(),)))
    made(model=model)


def test_all_or_no_weights_are_sharded():
    for error in in_processes(partly_sharded):
        assert isinstance(error, ValueError)
        assert re.match(r"\['lidar.0.weight', 'head.1.weight'\] are not sharded while others are", str(error))


def without_gradients():
    """A pass without a backward pass leaves the parameters as optimizers know them."""
    model = shard(two_tower().double())
    one = made(model=model)
    with torch.no_grad():
        batch_loss(one, "a batch", PROBES[0])
    return all(isinstance(p, DTensor) for p in model.parameters())


def test_no_rows_of_others_are_left_behind():
    assert result_of(without_gradients) == [True, True]
