"""What a scoring event costs, against the bare loop of the same passes.

python examples/benchmarks/scoring.py --json scoring.json

The event is `AlterEva`: components, scores, selection. The bare loop runs as many forward passes, backward
passes and steps of Adam on the same model and batches, and does nothing with the gradients. It goes
backwards through the whole model, where AlterEva leaves the deactivated backbone out.
"""

import statistics
import sys
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout, so that `examples` is found

from altermoma_pl import AlterEva, Calibration, Masks
from altermoma_pl.mask.top_k import Computed, top_k
from altermoma_pl.model.contexts import noise_free
from examples.benchmarks.measuring import Row, in_turns, options, ratios, show
from examples.benchmarks.workloads import Fusion, Towers, fusion

SPARSITY, MIN_DENSITY = 0.9, 0.01


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    arguments = options(__doc__, argv, sizes="small", parameters=20e6, batch=64, probes=16, steps=25)
    if arguments.quick:
        arguments.sizes, arguments.parameters, arguments.probes, arguments.steps = "tiny", 1e3, 2, 2
    criterion = AlterEva(num_probe_batches=arguments.probes, num_reactivation_steps=arguments.steps)
    rows = []
    for name, module, batches in workloads(arguments):
        calibration = calibration_of(module, batches)
        actions = {
            "event": partial(event, criterion, calibration),
            "bare": partial(bare_loop, criterion, calibration),
        }
        taken = in_turns(actions, arguments.repeats, device=arguments.device)
        note = f"bare loop {statistics.median(taken['bare']):.4g} s"
        rows.append(Row(name, ratios(taken["event"], taken["bare"]), 1.05, taken["event"], note=note))
    show("Scoring event / bare loop", rows, arguments)


def workloads(arguments: Namespace) -> list[tuple[str, Fusion | Towers, list[Any]]]:
    """Name, model and batches."""
    count = max(arguments.probes, arguments.steps)
    image_size = (32, 96) if arguments.quick else (96, 320)
    found: list[tuple[str, Fusion | Towers, list[Any]]] = [
        (f"fusion, {size}", *fusion(size, count, image_size, arguments.device))
        for size in arguments.sizes.split(",")
        if size
    ]
    if arguments.parameters:
        towers = Towers(arguments.parameters).to(arguments.device)
        name = f"MLP of {towers.num_parameters / 1e6:.1f} M, batch {arguments.batch}"
        found.append((name, towers, towers.batches(count, arguments.batch)))
    return found


def calibration_of(module: Fusion | Towers, batches: Sequence[Any]) -> Calibration:
    """The batches are for probing and for training."""
    return Calibration(module, lambda m, batch: m.loss(batch), batches, batches, module.modalities)


def event(criterion: AlterEva, calibration: Calibration) -> Masks:
    """What an event of `AlterMOMACallback` does."""
    weights = calibration.weights
    magnitudes = Computed(weights, lambda name: weights[name].detach().abs())
    scores = criterion.combine(criterion.components(calibration))
    return top_k(scores, SPARSITY, min_density=MIN_DENSITY, tie_breaker=magnitudes)


def bare_loop(criterion: AlterEva, calibration: Calibration) -> None:
    """The passes of `criterion.components`, and no more; the weights are brought back, not timed apart."""
    module, loss = calibration.model, calibration.loss_fn
    probes = list(calibration.probe_batches)[: criterion.num_probe_batches]
    trainings = list(calibration.training_batches)[: criterion.num_reactivation_steps]
    weights = [parameter.detach().clone() for parameter in module.parameters()]
    with noise_free(module):
        backward(calibration, probes)
        for _ in range(len(calibration.groups) - ("shared" in calibration.groups)):
            with torch.no_grad():
                for batch in probes:
                    float(loss(module, batch))
            backward(calibration, trainings, torch.optim.Adam(module.parameters(), lr=1e-9, fused=True))
            backward(calibration, probes)
    with torch.no_grad():
        for parameter, weight in zip(module.parameters(), weights, strict=True):
            parameter.copy_(weight)
            parameter.grad = None


def backward(
    calibration: Calibration, batches: Sequence[Any], optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Forward, backward, and a step if there is an optimizer."""
    for batch in batches:
        calibration.model.zero_grad()
        loss = calibration.loss_fn(calibration.model, batch)
        loss.backward()
        float(loss.detach())
        if optimizer is not None:
            optimizer.step()


if __name__ == "__main__":
    main()
