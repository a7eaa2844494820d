"""The groups of channels that can be removed: traced or declared, and proved by trial."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from altermoma_pl.granularity.channels.groups import ChannelGroup, Channels, Kept
from altermoma_pl.granularity.channels.layouts import (
    Declared,
    Names,
    declared_groups,
    group_of_layout,
    layouts,
)
from altermoma_pl.granularity.channels.resizing import Resizing
from altermoma_pl.granularity.channels.tracing import PRODUCERS, Coupling, Forward, couplings_of, tensors_of
from altermoma_pl.model.contexts import restored, seed_generators
from altermoma_pl.model.inputs import as_forward
from altermoma_pl.model.modality import is_constant
from altermoma_pl.model.modality import prunable as prunable_weights

TOLERANCE = 1e-5
"""Largest difference of outputs, relative to their largest value (at least 1)."""
DEAD = 0.01
"""Running variances up to this share of a norm's largest one are taken for those of dead channels."""


def find_channels(
    model: nn.Module,
    example_inputs: Forward | Any,
    prunable: Sequence[str] = (),
    declared: Declared | None = None,
    seed: int = 0,
) -> Channels:
    """Find what can be removed channel by channel, and prove it.

    Couplings come from the backward graph of the outputs. Of each group a random half of the channels
    is removed on trial: only where the outputs are those of the masked model, the group is taken. So the
    last layers, whose width is what the task asks for, are left out by themselves, and so is whatever the
    graph reads wrongly; `excluded` of the result says why. Meanwhile parameters that are zero are not, as
    nothing could be told behind them. The model is left as it was, bit for bit.

    Args:
        model: Runs in the mode it is in; anything random must draw from torch's generators.
        example_inputs: As `as_arguments` takes them; or a function of the model that runs it and returns its
            outputs or its loss.
        prunable: As for the callback: channels go only where all weights that put them out may be pruned.
        declared: Groups that the graph cannot follow, for example across an operator without a gradient:
            name -> module path -> "out" or "in", or "in:16" where its channels begin at input 16.
        seed: Of the choice of channels.

    Raises:
        ModuleNotFoundError: Without torch-pruning (extra `structured`).
        TypeError: If the example inputs are of another type.
        ValueError: If the model does not run, gives another output each time, cannot be followed, a
            declared group is wrong, or no channel can be removed.
    """
    forward = as_forward(example_inputs)
    allowed = set(prunable_weights(model, prunable))
    generator = torch.Generator().manual_seed(seed)
    with restored(model):
        enliven_(model, generator)
        # Twice: each trial goes back to the enlivened model, and only the end to the user's.
        with restored(model) as reset:
            search = _Search(Names(model), forward, reset, generator, allowed)
            search.check_repeatable()
            search.take_declared(declared or {})
            search.take_traced()
            search.check_together()
    groups = sorted(search.found, key=lambda group: search.names.order[group.producers[0]])
    return Channels(tuple(groups), search.excluded)


_MULTIHEAD = "nn.MultiheadAttention ties its width to the number of its heads"


@dataclass
class _Search:
    """What is found so far in a model that `reset` brings back."""

    names: Names
    forward: Forward
    reset: Callable[[], None]
    generator: torch.Generator
    allowed: Collection[str]
    found: list[ChannelGroup] = field(default_factory=list)
    excluded: dict[str, str] = field(default_factory=dict)

    def check_repeatable(self) -> None:
        """Outputs can only be compared if they are the same each time."""
        try:
            once, again = (outputs_of(self.names.model, self.forward) for _ in range(2))
        except Exception as error:  # of the user's code
            raise ValueError(f"{self.names.kind} does not run on the example inputs: {error}") from error
        self.reset()
        if not once:
            raise ValueError(
                f"{self.names.kind} returns no floating-point tensor: there is nothing to compare"
            )
        if not difference(once, again) <= TOLERANCE:
            raise ValueError(
                f"{self.names.kind} gives another output each time it runs, or one that is not finite: what "
                f"removing channels changes cannot be told from that"
            )

    def take_declared(self, declared: Declared) -> None:
        """Groups of the user, each of which must pass."""
        for group in declared_groups(self.names.model, declared):
            reason = self.why_not([group])
            if reason:
                raise ValueError(f"the declared group {group.name!r} cannot be removed: {reason}")
            self.found.append(group)

    def take_traced(self) -> None:
        """Groups of the graph, those that pass."""
        couplings, unreached = [], "the graph of gradients does not reach it: declare its group by hand"
        try:
            couplings = couplings_of(self.names.model, self.forward)
        except ModuleNotFoundError:  # torch-pruning itself
            raise
        except Exception as error:  # of torch-pruning, of any kind
            if not self.found:
                raise ValueError(
                    f"the channels of {self.names.kind} cannot be followed: {error}; declare groups by hand, "
                    f"or prune single weights (granularity: weight)"
                ) from error
            unreached = f"the channels cannot be followed: {error}"
        self.reset()
        reasons: dict[object, str] = {}
        for coupling in couplings:
            result = self._forbidden(coupling) or self._proved(coupling)
            if isinstance(result, ChannelGroup):
                self.found.append(result)
            else:
                reasons |= {port.module: result for port in coupling.ports if port.side == "out"}
        self._exclude(reasons, unreached)

    def check_together(self) -> None:
        """All groups at once, since each by itself passed."""
        if not self.found:
            listed = "; ".join(f"{name}: {reason}" for name, reason in list(self.excluded.items())[:5])
            raise ValueError(f"no channel of {self.names.kind} can be removed. {listed}")
        reason = self.why_not(self.found)
        if reason:
            raise ValueError(
                f"the channels of {self.names.kind} can be removed from one group at a time, but not "
                f"together: {reason}; leave layers out with prunable patterns such as '!encoder.neck.*'"
            )

    def why_not(self, groups: Sequence[ChannelGroup]) -> str | None:
        """Why removing half of the channels of each is not what masking them is; None if it is."""
        model, channels, kept = self.names.model, Channels(tuple(groups)), Kept()
        for group in groups:
            size = group.num_channels
            gone = torch.randperm(size, generator=self.generator)[: max(1, size // 2)]
            kept[group.name] = torch.ones(size, dtype=torch.bool).index_fill(0, gone, False)
        try:
            channels.to_masks(kept, dict(model.named_parameters())).apply_(model)
            masked = outputs_of(model, self.forward)
            # From the masked model, so that between the two runs nothing but sizes changes.
            Resizing.of(channels, kept, model).apply_(model)
            gap = difference(masked, outputs_of(model, self.forward))
        except Exception as error:  # of the user's code, of any kind
            return f"the smaller model does not run: {(str(error) or type(error).__name__).splitlines()[0]}"
        finally:
            self.reset()
        if gap == torch.inf:
            return "its channels are an output, or outputs become not finite"
        if gap > TOLERANCE:
            return (
                f"what is left depends on how many channels there are, as with a norm over channels, or a "
                f"layer mixes them: outputs differ by {gap:.1e}"
            )
        return None

    def _forbidden(self, coupling: Coupling) -> str | None:
        """Why the user does not want these channels pruned, or torch does not let them."""
        for port in coupling.ports:
            if isinstance(port.module, nn.MultiheadAttention):
                return _MULTIHEAD
            if port.side == "out" and isinstance(port.module, PRODUCERS):
                try:
                    name = self.names.tensor(port.module.weight)
                except ValueError as error:
                    return str(error)
                if not port.module.weight.requires_grad:
                    return f"{name!r} is frozen"
                if name not in self.allowed:
                    return f"{name!r} is not prunable by the patterns"
        return None

    def _proved(self, coupling: Coupling) -> ChannelGroup | str:
        """The group of the finest layout that passes the trial; else why the finest of all failed."""
        reasons = []
        for layout in layouts(coupling, self.names):
            if layout.num_channels < 2:  # no half of it can go
                continue
            try:
                group = group_of_layout(coupling, layout, self.names)
            except ValueError as error:
                reasons.append(str(error))
                continue
            reason = self.why_not([group])
            if reason is None:
                # A layer that reads two couplings' channels may belong to both; a position to one only.
                taken = {position for other in self.found for position in other.positions()}
                free = taken.isdisjoint(group.positions())
                return group if free else "its channels are those of another group"
            reasons.append(reason)
        return reasons[0] if reasons else "its width cannot be divided as its layers need"

    def _exclude(self, reasons: Mapping[object, str], unreached: str) -> None:
        """Say of each layer that puts channels out and is in no group, why."""
        known = {name for group in self.found for name in group.producers}
        for module, path in self.names.modules.items():
            if not isinstance(module, PRODUCERS):
                continue
            weight = self.names.tensors.get(id(module.weight))  # None: one that is computed
            if weight in known:
                continue
            if module in reasons:
                self.excluded[path] = reasons[module]
            elif weight in self.allowed:  # no coupling has its outputs, for example since they are detached
                parent = self.names.model.get_submodule(path.rpartition(".")[0])
                self.excluded[path] = _MULTIHEAD if isinstance(parent, nn.MultiheadAttention) else unreached


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
    pairs = ((a.double(), b.double()) for a, b in zip(one, other, strict=True) if a.numel())
    gaps = ((a - b).abs().max() / a.abs().max().clamp(min=1) for a, b in pairs)
    return max((torch.inf if gap.isnan() else float(gap) for gap in gaps), default=0.0)  # max() drops a NaN


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
