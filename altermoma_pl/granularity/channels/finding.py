"""The groups of channels that can be removed: traced or declared, and proved by trial."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from altermoma_pl.granularity.channels.declared import Declared, declared_groups
from altermoma_pl.granularity.channels.groups import ChannelGroup, Channels
from altermoma_pl.granularity.channels.layouts import Names, group_of_layout, layouts
from altermoma_pl.granularity.channels.tracing import PRODUCERS, Coupling, Forward, trace
from altermoma_pl.granularity.channels.trial import TOLERANCE, difference, enliven_, half, outputs_of, why_not
from altermoma_pl.model.contexts import restored
from altermoma_pl.model.modality import prunable as prunable_weights


def find_channels(
    model: nn.Module,
    forward: Forward,
    prunable: Sequence[str] = (),
    declared: Declared | None = None,
    seed: int = 0,
) -> Channels:
    """Find what can be removed channel by channel, and prove it.

    Couplings come from the backward graph of `forward(model)`. Of each group a random half of the channels
    is removed on trial: only where the outputs are those of the masked model, the group is taken. So the
    last layers, whose width is what the task asks for, are left out by themselves, and so is whatever the
    graph reads wrongly; `excluded` of the result says why. Meanwhile parameters that are zero are not, as
    nothing could be told behind them. The model is left as it was, bit for bit.

    Args:
        model: Runs in the mode it is in; anything random must draw from torch's generators.
        forward: Runs the model on example inputs and returns its outputs or its loss.
        prunable: As for the callback: channels go only where all weights that put them out may be pruned.
        declared: Groups that the graph cannot follow, for example across an operator without a gradient:
            name -> module path -> "out" or "in", or "in:16" where its channels begin at input 16.
        seed: Of the choice of channels.

    Raises:
        ModuleNotFoundError: Without torch-pruning (extra `structured`).
        ValueError: If the model does not run, gives another output each time, cannot be followed, a
            declared group is wrong, or no channel can be removed.
    """
    allowed = set(prunable_weights(model, prunable))
    generator = torch.Generator().manual_seed(seed)
    with restored(model):
        enliven_(model, generator)
        with restored(model) as reset:
            search = _Search(model, forward, reset, Names(model), generator, allowed)
            search.check_repeatable()
            search.take_declared(declared or {})
            search.take_traced()
            search.check_together()
    order = {name: i for i, name in enumerate(search.names.parameters.values())}
    groups = sorted(search.found, key=lambda group: order[group.producers[0]])
    return Channels(tuple(groups), search.excluded)


_UNREACHED = "the graph of gradients does not reach it: declare its group by hand"
_ATTENTION = "nn.MultiheadAttention ties its width to the number of its heads"


@dataclass
class _Search:
    """What is found so far in a model that `reset` brings back."""

    model: nn.Module
    forward: Forward
    reset: Callable[[], None]
    names: Names
    generator: torch.Generator
    allowed: Collection[str]
    found: list[ChannelGroup] = field(default_factory=list)
    excluded: dict[str, str] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """The model's class, for messages."""
        return type(self.model).__name__

    def check_repeatable(self) -> None:
        """Outputs can only be compared if they are the same each time."""
        try:
            once, again = (outputs_of(self.model, self.forward) for _ in range(2))
        except Exception as error:  # of the user's code
            raise ValueError(f"{self.kind} does not run on the example inputs: {error}") from error
        self.reset()
        if not once:
            raise ValueError(f"{self.kind} returns no floating-point tensor: there is nothing to compare")
        if not difference(once, again) <= TOLERANCE:
            raise ValueError(
                f"{self.kind} gives another output each time it runs, or one that is not finite: what "
                f"removing channels changes cannot be told from that"
            )

    def take_declared(self, declared: Declared) -> None:
        """Groups of the user, each of which must pass."""
        for group in declared_groups(self.model, declared):
            reason = self.why_not([group])
            if reason:
                raise ValueError(f"the declared group {group.name!r} cannot be removed: {reason}")
            self.found.append(group)

    def take_traced(self) -> None:
        """Groups of the graph, those that pass."""
        couplings, unreached = [], _UNREACHED
        try:
            couplings = trace(self.model, self.forward)
        except ModuleNotFoundError:
            raise
        except Exception as error:  # of torch-pruning, of any kind
            if not self.found:
                raise ValueError(
                    f"the channels of {self.kind} cannot be followed: {error}; declare groups by hand, or "
                    f"prune single weights (granularity: weight)"
                ) from error
            unreached = f"the channels cannot be followed: {error}"
        self.reset()
        for coupling in couplings:
            result = self._forbidden(coupling) or self._proved(coupling)
            if isinstance(result, ChannelGroup):
                self.found.append(result)
            else:
                self._exclude(coupling, result)
        self._exclude_unreached(unreached)

    def check_together(self) -> None:
        """All groups at once, since each by itself passed."""
        if not self.found:
            listed = "; ".join(f"{name}: {reason}" for name, reason in list(self.excluded.items())[:5])
            raise ValueError(f"no channel of {self.kind} can be removed. {listed}")
        reason = self.why_not(self.found)
        if reason:
            raise ValueError(
                f"the channels of {self.kind} can be removed from one group at a time, but not together: "
                f"{reason}; leave layers out with prunable patterns such as '!encoder.neck.*'"
            )

    def why_not(self, groups: Sequence[ChannelGroup]) -> str | None:
        """Why half of the channels of each cannot be removed; None if they can."""
        kept = {group.name: half(group, self.generator) for group in groups}
        return why_not(self.model, groups, kept, self.forward, self.reset)

    def _forbidden(self, coupling: Coupling) -> str | None:
        """Why the user does not want these channels pruned, or torch does not let them."""
        for port in coupling.ports:
            if isinstance(port.module, nn.MultiheadAttention):
                return _ATTENTION
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
            if layout.num_channels < 2:
                continue
            try:
                group = group_of_layout(coupling, layout, self.names)
            except ValueError as error:
                reasons.append(str(error))
                continue
            reason = self.why_not([group])
            if reason is None:
                return "its channels are those of another group" if self._is_taken(group) else group
            reasons.append(reason)
        return reasons[0] if reasons else "its width cannot be divided as its layers need"

    def _is_taken(self, group: ChannelGroup) -> bool:
        taken = {position for other in self.found for position in other.positions()}
        return not taken.isdisjoint(group.positions())

    def _left(self) -> dict[nn.Module, str]:
        """Layers that put channels out which no group has so far, and their paths."""
        known = {name for group in self.found for name in group.producers}
        layers = {m: path for m, path in self.names.modules.items() if isinstance(m, PRODUCERS)}
        return {m: p for m, p in layers.items() if self.names.parameters.get(id(m.weight)) not in known}

    def _exclude(self, coupling: Coupling, reason: str) -> None:
        own = {port.module for port in coupling.ports if port.side == "out"}
        self.excluded |= {path: reason for module, path in self._left().items() if module in own}

    def _exclude_unreached(self, reason: str) -> None:
        """Layers whose outputs no coupling has, for example since they are detached."""
        for module, path in self._left().items():
            if path not in self.excluded and self.names.parameters.get(id(module.weight)) in self.allowed:
                parent = self.names.model.get_submodule(path.rpartition(".")[0])
                self.excluded[path] = _ATTENTION if isinstance(parent, nn.MultiheadAttention) else reason
