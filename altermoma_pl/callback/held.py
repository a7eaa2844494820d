"""What the callback holds: the state of pruning, and during fit what keeps weights at zero."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.optim import Optimizer

from altermoma_pl.callback.state import PruningState
from altermoma_pl.enforce.enforcement import Enforcement, hold_everywhere_
from altermoma_pl.granularity import Ranking, Traced
from altermoma_pl.mask.top_k import Scope


@dataclass
class Held:
    """The state of pruning; during fit what enforces its masks, and what was found in the model."""

    state: PruningState = field(default_factory=PruningState)
    enforcement: Enforcement | None = None  # outside of fit
    traced: Traced | None = None  # until training starts, and where no channels are pruned
    input_dims: dict[str, int] = field(default_factory=dict)

    @property
    def enforces_state(self) -> bool:
        """Whether the masks that are enforced are those of the state."""
        return self.enforcement is not None and self.enforcement.masks is self.state.masks

    def ranking(self, state: PruningState, scope: Scope, min_density: float) -> Ranking:
        """What the scores of the next event are ranked within.

        Raises:
            ValueError: If there are no masks.
        """
        if state.masks is None:
            raise ValueError("there are no masks to rank within: nothing was found to prune yet")
        within, dims = self.traced, self.input_dims
        return Ranking(state.masks, state.group_of, scope, min_density, None, within, dims)

    def load(self, saved: dict[str, Any]) -> None:
        """Take up a saved state; nothing is changed if it is damaged."""
        state = PruningState.from_state_dict(saved)
        if self.enforcement is not None and state.masks is not None:  # during fit: by a tuner
            state.masks = state.masks.to(self.enforcement.model)
        self.state = state

    def take_up(self, state: PruningState, module: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        """Go over to another state, and enforce its masks from now on."""
        assert state.masks is not None  # noqa: S101 (whoever calls has made them)
        self.release()
        self.state, self.enforcement = state, Enforcement(module, state.masks, optimizers)

    def hold_(
        self, callbacks: Iterable[object], module: nn.Module, saved: Mapping[str, Any] | None = None
    ) -> None:
        """Bring the weights, and copies of them, in line with the state's masks; only during fit."""
        if self.enforcement is None or self.state.masks is None:
            return
        if not self.enforces_state:
            self.enforcement.masks = self.state.masks
        hold_everywhere_(callbacks, module, self.state.masks, saved)

    def release(self) -> None:
        """Let go of the optimizers."""
        if self.enforcement is not None:
            self.enforcement.release()
        self.enforcement = None
