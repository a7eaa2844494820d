"""Everything that the callback changes, and its form in a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from altermoma_pl.callback.rewinding import RewindPoint
from altermoma_pl.callback.state_checks import check_components, check_epoch, check_events, check_groups
from altermoma_pl.granularity import Traced
from altermoma_pl.mask.masks import Masks
from altermoma_pl.report.sparsity import SparsityReport
from altermoma_pl.score import Components
from altermoma_pl.score.decision import Decision

FORMAT = 2


@dataclass
class PruningState:
    """Masks, the position in the schedule, and what the latest event measured.

    Args:
        masks: What is pruned; None before fit.
        group_of: Masked parameter -> its modality or "shared".
        last_event_epoch: Epoch of the latest event, -1 before the first.
        events: One entry for each event, oldest first: "epoch", "step", "sparsity", "kept" (group ->
            share) and "losses"; with beta="auto" also the "beta" that was chosen and "beta_losses", the
            loss of each candidate by its name, None if not finite; "num_skipped", if any batch was left
            out because its loss or gradient was not finite. Where channels are pruned, "widths" (group
            of channels -> how many stay, of how many), the shares of all "channels" and "flops" that are
            gone, and the groups that were "declared".
        components: DeCI and ReRI of the latest event, where the criterion has them and they are stored.
        rewind_point: What the events that are left rewind to; None where the schedule rewinds nothing.
    """

    masks: Masks | None = None
    group_of: dict[str, str] = field(default_factory=dict)
    last_event_epoch: int = -1
    events: list[dict[str, Any]] = field(default_factory=list)
    components: Components | None = None
    rewind_point: RewindPoint | None = None

    def state_dict(self) -> dict[str, Any]:
        """Tensors and builtins only: loads with `torch.load(..., weights_only=True)`."""
        return {
            "format": FORMAT,
            "masks": self.masks.state_dict() if self.masks else None,
            "group_of": dict(self.group_of),
            "last_event_epoch": self.last_event_epoch,
            "events": [dict(event) for event in self.events],
            "components": self.components.state_dict() if self.components else None,
            "rewind_point": self.rewind_point.state_dict() if self.rewind_point else None,
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> PruningState:
        """Rebuild from `state_dict()`.

        Raises:
            ValueError: If the format is unknown, a key is missing or unknown, or a part is damaged.
        """
        found = state.get("format", FORMAT) if isinstance(state, Mapping) else FORMAT
        if type(found) is not int or found != FORMAT:
            raise ValueError(
                f"the pruning state has format {found!r:.80}, this version reads {FORMAT}: resume with the "
                f"version of altermoma_pl that saved it, or start a new fit from the weights alone"
            )
        try:
            return cls._from_checked(state)
        except ValueError as error:
            raise ValueError(
                f"the pruning state in the checkpoint is damaged: {error}; resume from another "
                f"checkpoint, or start a new fit from the weights alone"
            ) from error

    @classmethod
    def _from_checked(cls, state: Mapping[str, Any]) -> PruningState:
        expected = cls().state_dict().keys()
        if not isinstance(state, Mapping) or state.keys() != expected:
            found = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
            raise ValueError(f"it must hold {sorted(expected)}, got {found}")
        masks = None if state["masks"] is None else Masks.from_state_dict(state["masks"])
        saved, saved_point = state["components"], state["rewind_point"]
        components = None if saved is None else Components.from_state_dict(saved)
        point = None if saved_point is None else RewindPoint.from_state_dict(saved_point)
        check_groups(state["group_of"], masks)
        check_epoch("last_event_epoch", state["last_event_epoch"], least=-1)
        check_events(state["events"], masks)
        if components is not None:
            check_components(components, masks, state["group_of"])
        events = [dict(event) for event in state["events"]]
        return cls(masks, dict(state["group_of"]), state["last_event_epoch"], events, components, point)

    @property
    def losses(self) -> dict[str, float]:
        """Losses that the latest event measured."""
        return self.events[-1]["losses"] if self.events else {}

    def record(
        self,
        decision: Decision,
        epoch: int,
        step: int,
        keep_components: bool,
        traced: Traced | None = None,
    ) -> None:
        """Take up what an event decided."""
        self.masks = decision.masks
        self.last_event_epoch = epoch
        self.components = decision.components if keep_components else None
        report = SparsityReport.of(decision.masks, self.group_of)
        event = {
            "epoch": epoch,
            "step": step,
            "sparsity": report.sparsity,
            "kept": {name: total.kept for name, total in report.groups.items()},
            "losses": dict(decision.components.losses) if decision.components else {},
        }
        if decision.beta is not None:
            finite = {f"{b:g}": x if math.isfinite(x) else None for b, x in decision.beta_losses.items()}
            event |= {"beta": decision.beta, "beta_losses": finite}
        if decision.num_skipped:
            event["num_skipped"] = decision.num_skipped
        if traced is not None:
            event |= _of_channels(traced, decision.masks)
        self.events.append(event)

    def report(self) -> SparsityReport:
        """What is pruned where.

        Raises:
            ValueError: If there are no masks.
        """
        if self.masks is None:
            raise ValueError("there are no masks to report on: nothing was pruned yet")
        report = SparsityReport.of(self.masks, self.group_of, self.losses)
        event = self.events[-1] if self.events else {}
        if "widths" not in event:
            return report
        shown = tuple(name for name, mask in self.masks.items() if mask.ndim > 1)
        return replace(report, shown=shown, removed={"channels": event["channels"], "FLOPs": event["flops"]})


def _of_channels(traced: Traced, masks: Masks) -> dict[str, Any]:
    """How wide each group of channels is, and the shares that are gone."""
    widths = {name: int(flags.sum()) for name, flags in traced.channels.kept(masks).items()}
    full = {name: group.num_channels for name, group in traced.channels.items()}
    return {
        "widths": {name: [widths[name], full[name]] for name in full},
        "channels": 1 - sum(widths.values()) / sum(full.values()),
        "flops": 1 - traced.flops(widths) / traced.flops.total,
        "declared": {name: dict(sides) for name, sides in traced.declared.items()},
    }
