"""Functions run in several processes that talk to each other over gloo."""

import io
import os
import socket
import traceback
from multiprocessing import get_context

import torch
import torch.distributed as dist

_TIMEOUT = 120  # seconds, for tests that hang


def in_processes(function, *arguments, num=2):
    """What `function(*arguments)` returns in each of `num` processes; an exception counts as a result.

    They are forked: nothing is imported again. In Lightning's eyes torchrun has started them.
    """
    context, port = get_context("fork"), _free_port()
    pipes = [context.Pipe(duplex=False) for _ in range(num)]
    workers = [
        context.Process(target=_work, args=(rank, num, port, sender, function, arguments))
        for rank, (_, sender) in enumerate(pipes)
    ]
    for worker in workers:
        worker.start()
    try:
        return [_received(receiver) for receiver, _ in pipes]
    finally:
        for worker in workers:
            worker.kill()
            worker.join()


def result_of(function, *arguments, num=2):
    """The result that all processes have in common; an exception is raised."""
    results = in_processes(function, *arguments, num=num)
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


def _work(rank, num, port, sender, function, arguments):
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num), LOCAL_WORLD_SIZE=str(num),
        GROUP_RANK="0", MASTER_ADDR="localhost", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="test",
    )  # fmt: skip
    try:
        dist.init_process_group("gloo", rank=rank, world_size=num)
        result = function(*arguments)
    except Exception as error:
        traceback.print_exc()
        result = error
    # As bytes: tensors would be shared in a memory that ends with this process.
    content = io.BytesIO()
    torch.save(result, content)
    sender.send_bytes(content.getvalue())


def _received(receiver):
    if not receiver.poll(_TIMEOUT):
        raise TimeoutError("a process gives no answer: do all of them communicate alike?")
    return torch.load(io.BytesIO(receiver.recv_bytes()), weights_only=False)


def _free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]
