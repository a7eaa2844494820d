"""What a training step with masks costs, against the dense step.

python examples/benchmarks/step.py --json step.json

Two models at 90 % sparsity: the example's fusion model, and an MLP of 50 M parameters, the worst case, as
it does little but read its weights. Forward, backward, masks on gradients, clipping where it is on,
optimizer, masks on weights, as `AlterMOMACallback` does it in `Trainer.fit`; beside it Lightning's
`ModelPruning` and `torch.nn.utils.prune`, which make the pruned weights anew in each forward pass.
"""

import copy
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelPruning
from torch import nn
from torch.nn.utils import prune

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout, so that `examples` is found

from altermoma_pl import Masks
from altermoma_pl.enforce.enforcement import Enforcement
from altermoma_pl.model.modality import prunable
from examples.benchmarks.measuring import Row, in_turns, options, ratios, show
from examples.benchmarks.workloads import Fusion, Towers, fusion

SPARSITY = 0.9
OPTIMIZERS = {
    "SGD with momentum": lambda parameters: torch.optim.SGD(parameters, lr=1e-5, momentum=0.9),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-5),
}
Module = Fusion | Towers


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    arguments = options(__doc__, argv, parameters=50e6, batch=128, size="small", times=5)
    if arguments.quick:
        arguments.parameters, arguments.batch, arguments.size, arguments.times = 1e3, 2, "tiny", 1
    torch.manual_seed(0)
    rows = []
    for (name, at_most, module, batch), optimizer, clip in product(
        cases(arguments), OPTIMIZERS, (False, True)
    ):
        kinds = {kind: make(module, batch, optimizer, clip) for kind, make in KINDS.items()}
        taken = in_turns(kinds, arguments.repeats, arguments.times, arguments.device)
        for kind, amounts in taken.items():
            label = f"{name}, {optimizer}, {'clipped' if clip else 'not clipped'}: {kind}"
            target = at_most if kind == "ours" else None
            rows.append(Row(label, ratios(amounts, taken["dense"]), target, amounts))
    show("Training step / dense step", rows, arguments)


def cases(arguments: Namespace) -> Iterator[tuple[str, float, Module, Any]]:
    """Name, target, model and batch; `--size ""` or `--parameters 0` leave one out."""
    if arguments.size:
        image_size = (32, 96) if arguments.quick else (96, 320)
        model, batches = fusion(arguments.size, 1, image_size, arguments.device)
        yield f"fusion, {arguments.size}", 1.02, model, batches[0]
    if arguments.parameters:
        towers = Towers(arguments.parameters).to(arguments.device)
        name = f"MLP of {towers.num_parameters / 1e6:.1f} M, batch {arguments.batch}"
        yield name, 1.05, towers, towers.batches(1, arguments.batch)[0]


def dense(module: Module, batch: Any, optimizer: str, clip: bool) -> Callable[[], None]:
    """The step without any masks."""
    own = copy.deepcopy(module)
    return step(own, batch, OPTIMIZERS[optimizer](own.parameters()), clip)


def ours(module: Module, batch: Any, optimizer: str, clip: bool) -> Callable[[], None]:
    """The step with masks held as the callback holds them."""
    own = copy.deepcopy(module)
    stepper = OPTIMIZERS[optimizer](own.parameters())
    parameters = dict(own.named_parameters())
    masks = {name: torch.rand_like(parameters[name]) >= SPARSITY for name in prunable(own)}
    enforcement = Enforcement(own, Masks(masks), [stepper])
    # As `reads_gradients` decides: without clipping nothing here takes gradients together.
    return step(own, batch, stepper, clip, enforcement.hold_gradients_ if clip else None)


def model_pruning(module: Module, batch: Any, optimizer: str, clip: bool) -> Callable[[], None]:
    """The step after a round of Lightning's callback."""
    own = copy.deepcopy(module)
    stepper = OPTIMIZERS[optimizer](own.parameters())
    callback = ModelPruning(
        "l1_unstructured", layers(own), amount=SPARSITY, use_lottery_ticket_hypothesis=False
    )
    callback.setup(None, own, "fit")
    callback.apply_pruning(SPARSITY)
    return step(own, batch, stepper, clip)


def torch_prune(module: Module, batch: Any, optimizer: str, clip: bool) -> Callable[[], None]:
    """The step after a round of torch's functions."""
    own = copy.deepcopy(module)
    stepper = OPTIMIZERS[optimizer](own.parameters())
    for layer, name in layers(own):
        prune.random_unstructured(layer, name, SPARSITY)
    return step(own, batch, stepper, clip)


KINDS = {
    "dense": dense,
    "ours": ours,
    "ModelPruning": model_pruning,
    "torch.nn.utils.prune": torch_prune,
}


def layers(module: nn.Module) -> list[tuple[nn.Module, str]]:
    """The modules of the weights that are pruned, and how they call them."""
    paths = (name.rpartition(".") for name in prunable(module))
    return [(module.get_submodule(path), name) for path, _, name in paths]


def step(
    module: Module,
    batch: Any,
    optimizer: torch.optim.Optimizer,
    clip: bool,
    before_clipping: Callable[[], None] | None = None,
) -> Callable[[], None]:
    """One step of training, in the order in which Lightning does it."""

    def run() -> None:
        value = module.loss(batch)
        optimizer.zero_grad()
        value.backward()
        if before_clipping is not None:
            before_clipping()
        if clip:
            torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()

    return run


if __name__ == "__main__":
    main()
