"""Tensors and decisions that several processes share; with one process there is nothing to do.

Processes share a model in two ways. With data parallelism each holds all parameters and sees batches of
its own. With sharding (FSDP2's `fully_shard`) each also holds only some rows of every parameter, which
then is a `DTensor`. Every function here that communicates must be called by all processes alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

T = TypeVar("T")
N = TypeVar("N", int, float)


def num_processes() -> int:
    """How many processes share the work."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if num_processes() > 1 else 0


def is_sharded(tensors: Iterable[Tensor]) -> bool:
    """Whether this process holds only a part of one of the tensors."""
    return any(isinstance(tensor, DTensor) for tensor in tensors)


def check_division(tensors: Iterable[Tensor]) -> None:
    """Raise a `ValueError` if some are divided in a way other than by rows over all processes."""
    for shard in tensors:
        if not isinstance(shard, DTensor):
            continue
        mesh = shard.device_mesh
        if mesh.ndim != 1 or mesh.size() != num_processes() or shard.placements != (Shard(0),):
            raise ValueError(
                f"a parameter of shape {tuple(shard.shape)} is divided as {shard.placements} over {mesh}, "
                f"but only rows that are divided over all {num_processes()} processes can be pruned: use "
                f"fully_shard with one mesh of one dimension, without tensor parallelism"
            )


def reshard_(model: nn.Module) -> None:
    """Let go of rows of other processes; a forward pass without a backward leaves them gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local(tensor: Tensor) -> Tensor:
    """The rows that this process holds, in the same memory; all of a tensor that is not sharded."""
    if not isinstance(tensor, DTensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()


def like(rows: Tensor, reference: Tensor) -> Tensor:
    """A tensor whose local rows are `rows`, sharded as `reference` is."""
    if not isinstance(reference, DTensor):
        return rows
    return DTensor.from_local(
        rows, reference.device_mesh, reference.placements, shape=reference.shape, stride=reference.stride()
    )


def sharded_like(tensor: Tensor, reference: Tensor) -> Tensor:
    """The same values, placed as `reference` is and divided like it, if they are not divided yet."""
    if isinstance(tensor, DTensor) or not isinstance(reference, DTensor):
        return tensor.to(reference.device)
    mesh = reference.device_mesh
    num_rows = -(-tensor.shape[0] // mesh.size())
    first = mesh.get_local_rank() * num_rows
    return like(tensor[first : first + num_rows].to(reference.device), reference)


def full(tensor: Tensor) -> Tensor:
    """All rows, gathered from all processes."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sum_(tensor: Tensor) -> Tensor:
    """Add the tensors of all processes, in place; of a sharded one nothing but its rows."""
    if num_processes() > 1 and not isinstance(tensor, DTensor):
        dist.all_reduce(tensor)
    return tensor


def sums(values: Sequence[N]) -> list[N]:
    """The sum over all processes of each number."""
    return [sum(each) for each in zip(*gathered(values), strict=True)]


def total(tensor: Tensor) -> float:
    """The sum of all elements, in float64; of a sharded tensor those of all processes."""
    own = float(local(tensor).sum(dtype=torch.float64))
    return sums([own])[0] if isinstance(tensor, DTensor) else own


def gathered(value: T) -> list[T]:
    """The value of each process, in the order of processes; it is pickled."""
    values = [value] * num_processes()
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def all_agree(flag: bool) -> bool:
    """Whether the flag is set in all processes."""
    return all(gathered(flag))


def of_first(value: T) -> T:
    """The value of the first process, in all of them; it is pickled."""
    held = [value]
    if num_processes() > 1:
        dist.broadcast_object_list(held)
    return held[0]


def check_same(digest: bytes, what: str) -> None:
    """Raise a `RuntimeError` in every process if the digest of one differs from that of the first."""
    digests = gathered(digest)
    different = [process for process, other in enumerate(digests) if other != digests[0]]
    if different:
        raise RuntimeError(
            f"{what} of process {different} are not those of process 0: do all processes have the same "
            f"options, weights and code? Scores must not depend on the process"
        )


@contextmanager
def together(expected: type[Exception]) -> Iterator[None]:
    """An error inside, in one process, ends all of them: none waits for a process that has failed.

    The others raise `expected` too if it was such an error, which callers know how to deal with; otherwise a
    `RuntimeError`. Inside, processes must not wait for each other.
    """
    try:
        yield
    except Exception as error:
        gathered(1 if isinstance(error, expected) else 2)
        raise
    failures = gathered(0)
    if any(failures):
        failed = [process for process, failure in enumerate(failures) if failure]
        kind = RuntimeError if 2 in failures else expected
        raise kind(f"process {failed} failed, so this one cannot go on: see its message")
