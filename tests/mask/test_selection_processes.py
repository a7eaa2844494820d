"""Selection over rows that two or three processes share, against one process that holds all."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from altermoma_pl import Masks, top_k
from altermoma_pl.model.distributed import full

GROUPS = {"a": "camera", "b": "lidar", "c": "camera", "d": "lidar", "e": "camera"}
SHAPES = {"a": (5, 4), "b": (1, 9), "c": (7,), "d": (4, 2, 3), "e": (2, 6)}  # uneven; a process without rows


def tensors(seed, values):
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.tensor(values)
    return {n: drawn[torch.randint(len(values), s, generator=generator)] for n, s in SHAPES.items()}


def few(seed):
    """Many ties, of which -0.0 and 0.0 are one."""
    return tensors(seed, [0.0, -0.0, 1.0, 1.0, 2.0, -3.0])


def many(seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def within(seed):
    return {
        name: mask | (mask.cumsum(-1) < 1) for name, mask in tensors(seed, [True, True, True, False]).items()
    }


def equal(value):
    return {name: torch.full(shape, value) for name, shape in SHAPES.items()}


def bad():
    scores = many(0)
    scores["a"][0, :2] = torch.nan  # in one process
    scores["a"][4, 3] = torch.inf  # in another one
    return scores


CASES = {
    "distinct": (many(0), 0.6, {}),
    "ties": (few(1), 0.5, {}),
    "all equal": (equal(0.0), 0.5, {}),
    "broken ties": (few(2), 0.5, {"tie_breaker": many(3)}),
    "twice tied": (few(2), 0.5, {"tie_breaker": few(4)}),
    "masked": (few(5), 0.6, {"within": within(6), "tie_breaker": few(7)}),
    "floors": (few(8), 0.7, {"min_density": 0.2}),
    "all": (many(9), 0.6, {"within": within(6), "tie_breaker": few(7), "min_density": 0.1}),
    "float64": ({n: s.double() for n, s in many(10).items()}, 0.6, {"tie_breaker": equal(1.0)}),
}
SCOPES = {"masked": ("global", "layer", "row"), "all": ("global", "modality", "row")}
ERRORS = {
    "not finite": (bad(), 0.5, {}),
    "not finite in rows": (bad(), 0.5, {"scope": "row"}),
    "below": (many(0), 0.1, {"within": within(6)}),
    "a row below": (many(0), 0.1, {"within": within(6), "scope": "row"}),
    "floors": (many(0), 0.8, {"min_density": 0.5}),
}


def attempt(function):
    try:
        return function()
    except ValueError as error:
        return str(error)


def select(scores, sparsity, options, place=lambda tensor: tensor):
    """Masks, or the message of the error, of tensors that are placed first."""
    placed = {
        key: {name: place(tensor) for name, tensor in value.items()} if isinstance(value, dict) else value
        for key, value in ({"scores": scores} | options).items()
    }
    if "within" in placed:
        placed["within"] = Masks(placed["within"])
    return attempt(lambda: top_k(sparsity=sparsity, groups=GROUPS, **placed))


def refuse(*args, **kwargs):
    raise RuntimeError("a tensor was gathered")


def sharded(mesh, case):
    """Sharded masks, found without gathering, and only then as whole tensors."""
    gather = DTensor.full_tensor, DTensor.redistribute
    try:
        DTensor.full_tensor = DTensor.redistribute = refuse
        masks = select(*case, place=lambda tensor: shards[id(tensor)])
    finally:
        DTensor.full_tensor, DTensor.redistribute = gather
    if isinstance(masks, str):
        return masks
    assert all(isinstance(mask, DTensor) and mask.placements == (Shard(0),) for mask in masks.values())
    return {name: full(mask) for name, mask in masks.items()}


def cases():
    for name, (scores, sparsity, options) in CASES.items():
        for scope in SCOPES.get(name, ["global"]):
            yield f"{name}, {scope}", (scores, sparsity, options | {"scope": scope})
    yield from ERRORS.items()


shards = {}


def work(process, num_processes, folder):
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=process, world_size=num_processes
    )
    mesh = init_device_mesh("cpu", (num_processes,))
    for _, (scores, _, options) in cases():
        for given in (scores, *(value for value in options.values() if isinstance(value, dict))):
            for tensor in given.values():
                shards[id(tensor)] = distribute_tensor(tensor, mesh, [Shard(0)])
    found = {name: sharded(mesh, case) for name, case in cases()}
    found["replicated"] = dict(select(*CASES["all"]))
    mixed = many(0) | {"b": shards[id(CASES["distinct"][0]["b"])]}
    found["mixed"] = attempt(lambda: top_k(mixed, 0.5))
    torch.save(found, f"{folder}/{process}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.soak)])
def found(request, tmp_path_factory):
    """What each process found."""
    folder = tmp_path_factory.mktemp("processes")
    mp.spawn(work, (request.param, str(folder)), nprocs=request.param)
    return [torch.load(folder / f"{process}.pt") for process in range(request.param)]


@pytest.mark.parametrize("case", [name for name, _ in cases() if name not in ERRORS])
def test_masks_are_those_of_one_process(found, case):
    expected = dict(select(*dict(cases())[case]))
    for process in found:
        assert list(process[case]) == list(expected)
        assert all(torch.equal(process[case][name], mask) for name, mask in expected.items())


def test_whole_scores_on_each_process_are_ranked_there(found):
    expected = dict(select(*CASES["all"]))
    for process in found:
        assert all(torch.equal(process["replicated"][name], mask) for name, mask in expected.items())


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("not finite", "score of 'a' is not finite at 3 weights"),
        ("not finite in rows", "score of 'a' is not finite at 3 weights"),
        ("below", "sparsity 0.1 of the model is below what is already pruned"),
        ("a row below", "sparsity 0.1 of a row of 'a' is below what is already pruned"),
        ("floors", "sparsity 0.8 of the model keeps"),
    ],
)
def test_all_processes_raise_the_error_of_one(found, case, message):
    expected = select(*ERRORS[case])
    assert expected.startswith(message)
    assert [process[case] for process in found] == [expected] * len(found)


def test_some_sharded_scores_and_some_whole_ones_are_refused(found):
    message = (
        "scores of ['a', 'c', 'd', 'e'] are whole on each process, others are sharded: shard all or none"
    )
    assert [process["mixed"] for process in found] == [message] * len(found)
