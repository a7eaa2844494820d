"""`slim`: the channels that masks prune are removed from a copy of the model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from altermoma_pl.granularity.channels.finding import TOLERANCE, difference, find_channels, outputs_of
from altermoma_pl.granularity.channels.groups import Channels
from altermoma_pl.granularity.channels.layouts import Declared
from altermoma_pl.granularity.channels.resizing import Attributes, Resizing
from altermoma_pl.granularity.channels.tracing import Forward, trainable
from altermoma_pl.mask.masks import Masks
from altermoma_pl.model.contexts import modes_restored, restored
from altermoma_pl.model.inputs import as_arguments


@dataclass(frozen=True, eq=False)
class Slim:
    """A model without its pruned channels.

    Args:
        model: The smaller model, a copy.
        resizing: Which positions of which tensors stayed, also for an optimizer's state.
        attributes: Module path -> attributes that differ from the dense model's, such as `groups`.
        difference: Largest difference between its outputs and those of the masked model, relative.
        widths: Group of channels -> (how many stay, of how many).
        still_masked: Layer -> why channels that masks prune are still there, as zeros.
        channels: All groups of the dense model.
    """

    model: nn.Module
    resizing: Resizing
    attributes: Attributes
    difference: float
    widths: Mapping[str, tuple[int, int]]
    still_masked: Mapping[str, str]
    channels: Channels


def slim(model: nn.Module, masks: Masks, example_inputs: Any, declared: Declared | None = None) -> Slim:
    """Remove from a copy of `model` every channel that `masks` prunes in all coupled layers.

    Evaluated on the example inputs, the copy gives what the masked model gives, to a relative 1e-5, or there
    is an error. `model` is left as it was.

    Args:
        model: The pruned model, or its dense weights: masks are applied to the copy.
        masks: Of the weights; those of `AlterMOMACallback` with the granularity "channel".
        example_inputs: As `as_arguments` takes them: a tuple or list of the positional arguments, or the only
            one if that is a tensor, a NamedTuple or a dictionary.
        declared: As for `find_channels`.

    Raises:
        ModuleNotFoundError: Without torch-pruning (extra `structured`).
        TypeError: If the example inputs are of another type.
        ValueError: If the masks do not fit the model, the inputs are missing or refused, the model cannot be
            followed, no channel is pruned as a whole, or the smaller model gives something else.
    """
    masks.check_fits(model)
    arguments = as_arguments(example_inputs)
    try:
        smaller = copy.deepcopy(model)
    except Exception as error:  # of any module
        raise ValueError(f"{type(model).__name__} cannot be copied: {error}") from error
    masks.apply_(smaller)

    def forward(module: nn.Module) -> Any:
        return module(*arguments)

    with modes_restored(smaller):
        smaller.eval()
        with trainable(smaller):  # it may have been frozen after it was pruned
            channels = find_channels(smaller, forward, declared=declared)
        # By the weights, not by the masks: a channel whose bias no mask prunes still puts something out.
        kept = channels.kept(dict(smaller.named_parameters()))
        _check_worthwhile(kept, masks)
        resizing, attributes, gap = _remove_(smaller, forward, channels, kept)
    widths = {name: (int(flags.sum()), len(flags)) for name, flags in kept.items()}
    still_masked = _still_masked(masks, resizing, channels)
    return Slim(smaller, resizing, attributes, gap, widths, still_masked, channels)


def _remove_(
    masked: nn.Module, forward: Forward, channels: Channels, kept: Mapping[str, Tensor]
) -> tuple[Resizing, Attributes, float]:
    """Remove channels from the masked model, in place, and check that its outputs stay."""
    # Once more, though each group was proved: that was with other weights, and with half of the channels.
    with restored(masked):
        before = outputs_of(masked, forward)
    resizing = Resizing.of(channels, kept, masked)
    attributes = resizing.apply_(masked)
    with restored(masked):
        gap = difference(before, outputs_of(masked, forward))
    if not gap <= TOLERANCE:
        cut = [name for name, flags in kept.items() if not bool(flags.all())]
        raise ValueError(
            f"without its pruned channels {type(masked).__name__} gives something else than with zeros "
            f"there: the difference is {gap:.1e}, allowed are {TOLERANCE:.0e}. Channels were removed from "
            f"{cut}: leave layers out by prunable patterns to find the one at fault"
        )
    return resizing, attributes, gap


def _check_worthwhile(kept: Mapping[str, Tensor], masks: Masks) -> None:
    gone = [name for name, flags in kept.items() if not bool(flags.any())]
    if gone:
        raise ValueError(f"all channels of {gone} are pruned: nothing would be left of these layers")
    if all(bool(flags.all()) for flags in kept.values()):
        share = 1 - masks.num_kept / max(1, masks.num_weights)
        raise ValueError(
            f"no channel is pruned as a whole (sparsity of the masks: {share:.4g}): prune with the "
            f"granularity 'channel'; zeros that are scattered over a layer save no time"
        )


def _still_masked(masks: Masks, resizing: Resizing, channels: Channels) -> dict[str, str]:
    """Layers of which rows are pruned but not removed."""
    found = {}
    for name, mask in masks.items():
        if mask.ndim < 2:
            continue
        rows = mask.flatten(1).any(1).cpu()
        stay = resizing.positions.get(name, {}).get(0, torch.arange(len(rows)))
        left = int((~rows[stay]).sum())
        if left:
            path = name.rpartition(".")[0]
            reason = channels.excluded.get(path, "not all that is coupled with them is pruned")
            found[path] = f"{left} of {len(stay)} channels are zero but stay: {reason}"
    return found
