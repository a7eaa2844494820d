"""Whether the time of scoring, selecting and applying masks grows in proportion.

python examples/benchmarks/growth.py --json growth.json

In the number of parameters, and of probe batches. A straight line is fitted to the times, by least squares
of relative deviations; the ratio of a row is the time over the line at that size. The model is two linear
towers and a batch is one row, so that time goes with the parameters. Caches and the allocator bend every
line, so the note says how the simplest work of the same kind grows: the bare loop of the same passes,
`torch.cat` with `kthvalue`, and a multiplication in place.
"""

import statistics
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout, so that `examples` is found

from altermoma_pl import AlterEva, Masks
from altermoma_pl.mask.top_k import top_k
from examples.benchmarks.measuring import Row, in_turns, options, ratios, show
from examples.benchmarks.scoring import MIN_DENSITY, SPARSITY, bare_loop, calibration_of, event
from examples.benchmarks.workloads import Towers

AT_MOST = 1.1


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    arguments = options(
        __doc__, argv, millions="1,3,10,30,100", batches="4,8,16,32,64", parameters=3e6, probes=4, steps=4
    )
    if arguments.quick:
        arguments.millions, arguments.batches, arguments.parameters = "0.001,0.002", "1,2", 1e3
    sizes = [1e6 * float(each) for each in arguments.millions.split(",")]
    counts = [int(each) for each in arguments.batches.split(",")]
    scoring = {size: event_of(size, arguments.probes, arguments.steps, arguments) for size in sizes}
    probing = {n: event_of(arguments.parameters, n, arguments.steps, arguments) for n in counts}
    rows = [
        *grown("event, {:.4g} M parameters", 1e6, scoring, arguments),
        *grown("event, {:g} probe batches", 1, probing, arguments),
        *grown("selection, {:.4g} M scores", 1e6, {n: selection_of(n, arguments) for n in sizes}, arguments),
        *grown("masks, {:.4g} M weights", 1e6, {n: masking_of(n, arguments) for n in sizes}, arguments),
    ]
    show("Time / straight line", rows, arguments)


Action = Callable[[], object]
Make = Callable[[], tuple[Action, Action]]
"""What is measured, and the simplest work of the same kind."""


def grown(label: str, unit: float, makers: Mapping[float, Make], arguments: Namespace) -> list[Row]:
    """A row for each size."""
    taken = {}
    for size, make in makers.items():  # one after the other: not all of them fit into memory together
        ours, simplest = make()
        actions = {"ours": ours, "simplest": simplest}
        taken[size] = in_turns(actions, arguments.repeats, device=arguments.device)
    ours, simplest = ({size: each[kind] for size, each in taken.items()} for kind in ("ours", "simplest"))
    on_line, simplest_on_line = over_line(ours), over_line(simplest)
    return [
        Row(
            label.format(size / unit),
            on_line[size],
            AT_MOST,
            ours[size],
            note=f"simplest {statistics.median(simplest_on_line[size]):.3f}",
        )
        for size in taken
    ]


def over_line(taken: Mapping[float, Sequence[float]]) -> dict[float, list[float]]:
    """Times divided by the line through their medians."""
    expected = line(list(taken), [statistics.median(each) for each in taken.values()])
    return {size: ratios(each, [expected(size)] * len(each)) for size, each in taken.items()}


def line(sizes: Sequence[float], times: Sequence[float]) -> Callable[[float], float]:
    """The straight line with the least squares of relative deviations from the times."""
    x, y = torch.tensor(sizes, dtype=torch.float64), torch.tensor(times, dtype=torch.float64)
    design = torch.stack([x / x.max(), torch.ones_like(x)], 1)
    slope, start = torch.linalg.lstsq(design / y[:, None], torch.ones_like(y)[:, None]).solution.flatten()
    return lambda size: float(slope * size / x.max() + start)


def event_of(size: float, probes: int, steps: int, arguments: Namespace) -> Make:
    """A scoring event of AlterEva with so many batches."""

    def make() -> tuple[Action, Action]:
        torch.manual_seed(0)
        towers = Towers(size).to(arguments.device)
        calibration = calibration_of(towers, towers.batches(max(probes, steps), 1))
        criterion = AlterEva(num_probe_batches=probes, num_reactivation_steps=steps)
        return partial(event, criterion, calibration), partial(bare_loop, criterion, calibration)

    return make


def selection_of(size: float, arguments: Namespace) -> Make:
    """Global selection among so many scores, in tensors as the towers have them."""

    def make() -> tuple[Action, Action]:
        parameters = Towers(size).to(arguments.device).named_parameters()
        scores = {name: weight.detach().abs() for name, weight in parameters}
        return partial(top_k, scores, SPARSITY, min_density=MIN_DENSITY), partial(kth_value, scores)

    return make


def masking_of(size: float, arguments: Namespace) -> Make:
    """Applying masks, as after each training step."""

    def make() -> tuple[Action, Action]:
        towers = Towers(size).to(arguments.device)
        parameters = dict(towers.named_parameters())
        masks = Masks({name: torch.rand_like(p) >= SPARSITY for name, p in parameters.items()})
        return partial(masks.apply_, towers), lambda: [
            each.detach().mul_(1.0) for each in parameters.values()
        ]

    return make


def kth_value(scores: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The threshold, all scores in one tensor."""
    flat = torch.cat([each.flatten() for each in scores.values()])
    return flat.kthvalue(max(1, round(SPARSITY * flat.numel()))).values


if __name__ == "__main__":
    main()
