"""Scoring channels instead of weights, by any criterion that looks at weights and their gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import nn

from altermoma_pl.granularity.channels.groups import Channels, owners, reduce_channels
from altermoma_pl.mask.masks import Masks
from altermoma_pl.model.modality import SHARED, group_of
from altermoma_pl.score.calibration import Calibration, Gradients, LossAndGradients, Weights


@dataclass
class ChannelCalibration(Calibration):
    """A calibration whose "weights" are channels: one number each, their size.

    Write the weights of a channel as size * direction, with the size the L2 norm of all of them. The
    derivative by the size, times the size, is the sum of theta_i * g_i over all parameters of the channel,
    the first-order change of the loss if the channel goes. So |theta * g| of a criterion becomes
    |sum theta_i g_i|, the absolute value after the sum, which is the paper's score of a channel, summed over
    the coupled tensors; and the magnitude of a channel is the norm of its weights.

    Args:
        channels: The groups that `find_channels` found.

    Raises:
        ValueError: As `Calibration`, if no channel of a modality can be removed, if earlier masks prune
            something else than whole channels, or if parameters are sharded.
    """

    channels: Channels = field(kw_only=True)

    def __post_init__(self) -> None:
        self._check_modalities()
        super().__post_init__()
        self._check_masks()
        if self.sharded:
            raise ValueError("channels of sharded parameters cannot be scored: use one device or DDP")
        # The weights to multiply with: those of now, also while a criterion trains or deactivates.
        self._reference = {name: p.detach().clone() for name, p in self.masked.items()}
        self.weights  # noqa: B018 (the sizes of now)

    def _check_modalities(self) -> None:
        found = set(self.group_of.values())
        for group in self.groups:
            if group not in found | {SHARED}:
                reasons = "; ".join(f"{name}: {why}" for name, why in self.channels.excluded.items())
                raise ValueError(
                    f"no channel of modality {group!r} can be removed. {reasons or 'It has no such layer'}"
                )

    def _check_masks(self) -> None:
        if self.masks is None:
            return
        whole = self.channels.to_masks(self.channels.kept(self.masks), self.masks)
        for name, mask in self.masks.items():
            if not torch.equal(mask, whole[name]):
                raise ValueError(
                    f"the mask of {name!r} prunes something else than whole channels: go on with the "
                    f"granularity that it was made for, or start from a dense model"
                )

    @cached_property
    def masked(self) -> Weights:
        """The parameters in which channels lie: weights, biases and those of norms, in the model's order."""
        own = {each.name for group in self.channels.groups for each in group.slices}
        return {name: p for name, p in self.model.named_parameters() if name in own}

    @cached_property
    def weights(self) -> dict[str, nn.Parameter]:
        """Group name -> the size of each channel, (num_channels,)."""
        sizes = {}
        for name, group in self.channels.items():
            squares = [
                reduce_channels(self.masked[each.name].detach().square(), each)
                for each in group.slices
                if each.name in self.masked and self.masked[each.name].ndim > 1
            ]
            sizes[name] = nn.Parameter(torch.stack(squares).sum(0).sqrt().float(), requires_grad=False)
        return sizes

    @cached_property
    def group_of(self) -> dict[str, str]:
        """Group name -> the modality whose layers put its channels out; "shared" if there are several."""
        return owners(self.channels, group_of(self.groups))

    @property
    def alive(self) -> Masks | None:
        """Which channels are there."""
        if self.masks is None:
            return None
        kept = self.channels.kept(self.masks)
        return Masks({name: kept[name].to(size.device) for name, size in self.weights.items()})

    def derivatives(
        self, gradients_of: Callable[[Weights], LossAndGradients], scored: Weights
    ) -> LossAndGradients:
        """The loss on a batch and its derivatives by the sizes of channels; 0 where a channel is gone."""
        slices = [(name, each) for name in scored for each in self.channels[name].slices]
        needed = {each.name: self.masked[each.name] for _, each in slices if each.name in self.masked}
        loss, found = gradients_of({name: p for name, p in needed.items() if p.requires_grad})
        products = {name: self._reference[name] * gradient for name, gradient in found.items()}
        sums: Gradients = {}
        for name, each in slices:
            if each.name in products:
                part = reduce_channels(products[each.name], each)
                sums[name] = sums[name] + part if name in sums else part
        sizes = {name: self.weights[name].detach() for name in sums}
        return loss, {n: torch.where(s > 0, sums[n] / s, 0).to(s.dtype) for n, s in sizes.items()}
