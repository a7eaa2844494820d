"""Proof by trial: removing channels must give what masking them gives."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from altermoma_pl.contexts import seed_generators
from altermoma_pl.structured.groups import ChannelGroup, Channels, Kept
from altermoma_pl.structured.resizing import Resizing
from altermoma_pl.structured.tracing import Forward, tensors_of

TOLERANCE = 1e-5
"""Largest difference of outputs, relative to their largest value (at least 1)."""


def sizes_of(model: nn.Module) -> dict[str, torch.Size]:
    """Name -> size of each parameter and buffer."""
    return {name: t.shape for name, t in (*model.named_parameters(), *model.named_buffers())}


@torch.no_grad()
def outputs_of(model: nn.Module, forward: Forward) -> list[Tensor]:
    """Copies of what the model returns, with the same random numbers each time."""
    seed_generators(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a loss that broadcasts what has lost channels, for one
        return [each.detach().clone() for each in tensors_of(forward(model))]


def difference(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """Largest difference relative to the largest value (at least 1); infinite if shapes differ."""
    if [t.shape for t in one] != [t.shape for t in other]:
        return torch.inf
    worst = 0.0
    for a, b in zip(one, other, strict=True):
        if a.numel():
            gap = (a.double() - b.double()).abs().max() / a.double().abs().max().clamp(min=1)
            worst = max(worst, torch.inf if gap.isnan() else float(gap))
    return worst


def why_not(
    model: nn.Module, groups: Sequence[ChannelGroup], kept: Kept, forward: Forward, reset: Callable[[], None]
) -> str | None:
    """Why removing these channels is not what masking them is; None if it is.

    Args:
        model: Is changed.
        groups: All groups with channels that go.
        kept: Group name -> (num_channels,) booleans.
        forward: Runs the model.
        reset: Brings the model back.
    """
    channels = Channels(tuple(groups))
    parameters = dict(model.named_parameters())
    try:
        with torch.no_grad():
            channels.to_masks(kept, parameters).apply_(model)
        masked = outputs_of(model, forward)
        Resizing.of(channels, kept, sizes_of(model)).apply_(model)
        gap = difference(masked, outputs_of(model, forward))
    except (RuntimeError, ValueError, IndexError, TypeError, AssertionError) as error:
        return f"the smaller model does not run: {(str(error) or type(error).__name__).splitlines()[0]}"
    finally:
        reset()
    if gap == torch.inf:
        return "its channels are an output, or outputs become not finite"
    if gap > TOLERANCE:
        return (
            f"what is left depends on how many channels there are, as with a norm over channels, or a layer "
            f"mixes them: outputs differ by {gap:.1e}"
        )
    return None


def half(group: ChannelGroup, generator: torch.Generator) -> Tensor:
    """A random half of the channels, as booleans."""
    kept = torch.ones(group.num_channels, dtype=torch.bool)
    kept[torch.randperm(group.num_channels, generator=generator)[: max(1, group.num_channels // 2)]] = False
    return kept
