"""Proof by trial: removing channels must give what masking them gives."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from altermoma_pl.granularity.channels.groups import ChannelGroup, Channels, Kept
from altermoma_pl.granularity.channels.resizing import Resizing
from altermoma_pl.granularity.channels.tracing import Forward, tensors_of
from altermoma_pl.model.contexts import seed_generators
from altermoma_pl.model.modality import is_constant

TOLERANCE = 1e-5
"""Largest difference of outputs, relative to their largest value (at least 1)."""
DEAD = 0.01
"""Running variances up to this share of a norm's largest one are taken for those of dead channels."""


@torch.no_grad()
def outputs_of(model: nn.Module, forward: Forward) -> list[Tensor]:
    """Copies of what the model returns, with the same random numbers each time."""
    seed_generators(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a loss that broadcasts what has lost channels, for one
        return [each.detach().clone() for each in tensors_of(forward(model))]


def difference(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """Largest difference relative to the largest value (at least 1); infinite if shapes differ."""
    if [t.shape for t in one] != [t.shape for t in other]:  # a channel that went was an output
        return torch.inf
    worst = 0.0
    for a, b in zip(one, other, strict=True):
        if a.numel():
            gap = (a.double() - b.double()).abs().max() / a.double().abs().max().clamp(min=1)
            worst = max(worst, torch.inf if gap.isnan() else float(gap))  # max() would drop a NaN
    return worst


def why_not(
    model: nn.Module, groups: Sequence[ChannelGroup], kept: Kept, forward: Forward, reset: Callable[[], None]
) -> str | None:
    """Why removing these channels is not what masking them is; None if it is.

    The model is changed, and brought back by `reset`.
    """
    channels = Channels(tuple(groups))
    parameters = dict(model.named_parameters())
    try:
        with torch.no_grad():
            channels.to_masks(kept, parameters).apply_(model)
        masked = outputs_of(model, forward)
        # From the masked model, so that between the two runs nothing but sizes changes.
        Resizing.of(channels, kept, model).apply_(model)
        gap = difference(masked, outputs_of(model, forward))
    except Exception as error:  # of the user's code, of any kind
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


@torch.no_grad()
def enliven_(model: nn.Module, generator: torch.Generator) -> None:
    """Add small random numbers to parameters that are zero or all the same, in place.

    Behind a branch that is multiplied by zero, as it begins where a norm's weight or a head is initialised
    so, or where channels are pruned, nothing would be proved: whatever is removed, outputs are the same.
    Running variances of channels that were zero in training are raised to those of others: divided by
    them, the random numbers would grow from norm to norm until rounding alone exceeds the tolerance.
    """
    for name, parameter in model.named_parameters():
        if is_constant(name.rpartition(".")[2], parameter) or not parameter.numel():
            continue
        # Also all the same: a norm's ones or a bias of one number treat channels alike, so that removing the
        # wrong ones would not show.
        same = (parameter == 0) | (parameter.min() == parameter.max())
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 100  # vectors: a tenth, beside ones
        noise = torch.randn(parameter.shape, generator=generator) / max(1, fan_in) ** 0.5
        parameter.add_(noise.to(parameter) * same)
    for name, buffer in model.named_buffers():
        if name.rpartition(".")[2] == "running_var" and buffer.numel():
            largest = buffer.max()
            buffer.copy_(buffer.where(buffer > DEAD * largest, largest if largest > 0 else 1.0))
