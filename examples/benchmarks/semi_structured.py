"""What 2:4 weights save on an NVIDIA GPU: time of linear layers and an MLP, against the dense ones.

python examples/benchmarks/semi_structured.py --device cuda --json semi_structured.json

Forward passes in float16 of layers (width, width) and of the MLP of a Transformer, width to 4 * width and
back, over `--tokens` inputs. Of each 4 weights the 2 of the largest magnitude stay, in both models; they
take turns in one process, `--passes` passes each time. On a device that gains nothing the script says so and
ends.
"""

import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout, so that `examples` is found

from altermoma_pl.export.semi_structured import device_obstacle, to_semi_structured
from altermoma_pl.mask.n_of_m import keep_n_of_m
from altermoma_pl.model.modality import prunable
from examples.benchmarks.measuring import Row, in_turns, options, ratios, show

WIDTHS = (1024, 2048, 4096, 8192)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    arguments = options(__doc__, argv, tokens=4096, passes=20, times=5)
    obstacle = device_obstacle(torch.device(arguments.device))
    if obstacle is not None:
        print(f"Nothing to measure with --device {arguments.device}. {obstacle}")
        return
    widths = WIDTHS
    if arguments.quick:
        widths, arguments.tokens, arguments.passes, arguments.times = (64,), 32, 1, 1
    rows = [
        row for width in widths for what, model in cases(width) for row in measure(what, model, arguments)
    ]
    show("2:4 / dense, float16", rows, arguments)


def cases(width: int) -> Iterator[tuple[str, nn.Sequential]]:
    """Label and model, of `width` inputs and outputs."""
    torch.manual_seed(0)
    yield f"linear, {width}", nn.Sequential(nn.Linear(width, width))
    mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
    yield f"MLP, {width}", mlp


def measure(what: str, model: nn.Sequential, arguments: Namespace) -> list[Row]:
    """A row for the dense model and one for the compressed one, with the largest deviation of its output."""
    model = model.to(arguments.device, torch.float16)
    inputs = torch.randn(arguments.tokens, model[0].in_features).to(arguments.device, torch.float16)
    parameters = dict(model.named_parameters())
    masks = keep_n_of_m({name: parameters[name].detach().abs() for name in prunable(model)}, 2, 4)
    compressed, converted, _ = to_semi_structured(model, masks)
    masks.apply_(model)  # zeros in the dense one too: the same numbers, so the same outputs
    with torch.inference_mode():
        expected = model(inputs)
        deviation = float((compressed(inputs) - expected).abs().max() / expected.abs().max())
    kinds = {"dense": model, "2:4": compressed}
    actions = {kind: forward(kinds[kind], inputs, arguments.passes) for kind in kinds}
    taken = in_turns(actions, arguments.repeats, arguments.times, arguments.device)

    def per_pass(total: Sequence[float]) -> list[float]:
        return [1e3 * seconds / arguments.passes for seconds in total]

    notes = {"dense": "", "2:4": f"{len(converted)} of {len(masks)} compressed, deviation {deviation:.1e}"}
    return [
        Row(
            f"{what}: {kind}",
            ratios(total, taken["dense"]),
            amounts=per_pass(total),
            unit="ms",
            note=notes[kind],
        )
        for kind, total in taken.items()
    ]


def forward(model: nn.Module, inputs: Tensor, passes: int) -> Callable[[], None]:
    """Some forward passes, one after the other."""

    @torch.inference_mode()
    def run() -> None:
        for _ in range(passes):
            model(inputs)

    return run


if __name__ == "__main__":
    main()
