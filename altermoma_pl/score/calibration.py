"""All that a criterion may look at: the model to prune and the batches on which its weights are judged."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from torch import Tensor, nn

from altermoma_pl.mask.masks import Masks
from altermoma_pl.model.distributed import check_division, is_sharded, num_processes, reshard_
from altermoma_pl.model.modality import Modalities, check_prunable, group_of, prunable
from altermoma_pl.model.options import check_type

LossFunction = Callable[[nn.Module, Any], Tensor]
"""`loss_fn(model, batch)` returns a scalar that depends on the model's parameters."""

Weights = Mapping[str, nn.Parameter]
Gradients = dict[str, Tensor]
LossAndGradients = tuple[float, Gradients]

OnNonFinite = Literal["raise", "skip"]
"""What happens with a batch whose loss or gradient is infinite or not a number."""

Progress = Callable[[str, int, int | None], None]
"""Called with a phase, the number of its batches done and their total if known."""


def known_length(batches: Iterable[Any]) -> int | None:
    """Their number, if known: loaders of iterable datasets have `len`, and it raises."""
    try:
        return len(batches) if isinstance(batches, Sized) else None
    except (TypeError, NotImplementedError):
        return None


def no_progress(phase: str, done: int, total: int | None) -> None:
    """Nobody watches."""


@dataclass
class Calibration:
    """The model to prune and the batches on which its weights are judged.

    Where several processes of `torch.distributed` run, each has batches of its own, all of them score, and
    what is measured is the mean over the batches of all.

    Args:
        model: The model; a criterion leaves it as it was, bit for bit.
        loss_fn: Loss of the model on a batch, a scalar.
        probe_batches: Held-out batches, in the same order each time they are iterated.
        training_batches: Batches to train on during reactivation; likewise.
        modalities: The branches of the model.
        prunable: Patterns that add to, or with `!` remove from, the weights that may be pruned by
            default (see `altermoma_pl.model.modality.prunable`).
        masks: What is pruned already; the model's pruned weights are zero.
        seed: For criteria and loaders that draw random numbers.
        progress: Called with a phase, the number of its batches done and their total if known.
        on_nonfinite: Whether a batch whose loss or gradient is not finite is an error, "raise", or left out
            and counted, "skip".

    Raises:
        ValueError: If a pattern matches nothing, modalities overlap, a modality has no weight to prune,
            the masks are not those of the prunable weights, or some weights are sharded over processes
            and others are not.
    """

    model: nn.Module
    loss_fn: LossFunction
    probe_batches: Iterable[Any]
    training_batches: Iterable[Any]
    modalities: Modalities | Mapping[str, Sequence[str]]
    prunable: Sequence[str] = ()
    masks: Masks | None = None
    seed: int = 0
    progress: Progress = field(default=no_progress, repr=False)
    on_nonfinite: OnNonFinite = "raise"
    num_skipped: int = field(default=0, init=False)
    """Batches that were left out so far."""
    leaves: list[nn.Parameter] = field(init=False, repr=False)
    """All parameters as optimizers know them; within a pass, sharded models hold others."""

    def __post_init__(self) -> None:
        check_type("on_nonfinite", self.on_nonfinite, OnNonFinite)
        reshard_(self.model)  # so that parameters are what optimizers know
        self.leaves = list(self.model.parameters())
        if not isinstance(self.modalities, Modalities):
            self.modalities = Modalities(self.modalities)
        check_prunable(self.groups, self.masked)
        check_division(self.model.parameters())
        whole = [name for name, weight in self.masked.items() if self.sharded and not is_sharded([weight])]
        if whole:
            raise ValueError(f"{whole} are not sharded while others are: apply fully_shard to their module")
        if self.masks is not None:
            self.masks.check_fits(self.model)
            if self.masks.keys() != self.masked.keys():
                difference = sorted(self.masks.keys() ^ self.masked.keys())
                raise ValueError(
                    f"masks and prunable weights differ in {difference}: continue with the model, "
                    f"modalities, prunable patterns and granularity that the masks were made for"
                )

    @cached_property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """Modality, or "shared", -> names of all its parameters."""
        return Modalities(self.modalities).resolve(self.model)

    @cached_property
    def weights(self) -> dict[str, nn.Parameter]:
        """The prunable parameters by name, in the model's order."""
        parameters = dict(self.model.named_parameters())
        return {name: parameters[name] for name in prunable(self.model, self.prunable)}

    @property
    def masked(self) -> Weights:
        """The parameters that masks cover: here those that are scored."""
        return self.weights

    @property
    def alive(self) -> Masks | None:
        """What is left of all that is scored, by the names of `weights`; None before anything is pruned."""
        return self.masks

    @cached_property
    def group_of(self) -> dict[str, str]:
        """Name in `weights` -> its modality or "shared"."""
        return self.owner_of

    @cached_property
    def owner_of(self) -> dict[str, str]:
        """Masked parameter name -> its modality or "shared"."""
        groups = group_of(self.groups)
        return {name: groups[name] for name in self.masked}

    @cached_property
    def sharded(self) -> bool:
        """Whether each process holds only some rows of every parameter."""
        return is_sharded(self.model.parameters())

    @property
    def lockstep(self) -> bool:
        """Whether processes wait for each other within a pass, so that all must take the same passes."""
        synchronised = (m.training for m in self.model.modules() if isinstance(m, nn.SyncBatchNorm))
        return num_processes() > 1 and (self.sharded or any(synchronised))

    def derivatives(
        self, gradients_of: Callable[[Weights], LossAndGradients], scored: Weights
    ) -> LossAndGradients:
        """The loss on a batch and its derivatives by what is scored, which here are parameters themselves."""
        return gradients_of(scored)
