"""What a criterion is, and all that it may look at."""

from __future__ import annotations

import itertools
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from altermoma_pl.masks import Masks
from altermoma_pl.modality import Modalities, check_prunable, group_of, prunable

Scores = dict[str, Tensor]
"""Parameter name -> score of each weight, higher is kept."""

LossFunction = Callable[[nn.Module, Any], Tensor]
"""`loss_fn(model, batch)` returns a scalar that depends on the model's parameters."""


class NonFiniteLossError(ValueError):
    """The loss of a batch is infinite or not a number."""


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

    Args:
        model: The model; a criterion leaves it as it was, bit for bit.
        loss_fn: Loss of the model on a batch, a scalar.
        probe_batches: Held-out batches, in the same order each time they are iterated.
        training_batches: Batches to train on during reactivation; likewise.
        modalities: The branches of the model.
        prunable: Patterns that add to, or with `!` remove from, the weights that may be pruned by
            default (see `altermoma_pl.modality.prunable`).
        masks: What is pruned already; the model's pruned weights are zero.
        seed: For criteria and loaders that draw random numbers.
        progress: Called with a phase, the number of its batches done and their total if known.

    Raises:
        ValueError: If a pattern matches nothing, modalities overlap, a modality has no weight to prune,
            or the masks are not those of the prunable weights.
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

    def __post_init__(self) -> None:
        if not isinstance(self.modalities, Modalities):
            self.modalities = Modalities(self.modalities)
        check_prunable(self.groups, self.weights)
        if self.masks is not None:
            self.masks.check_fits(self.model)
            if self.masks.keys() != self.weights.keys():
                difference = sorted(self.masks.keys() ^ self.weights.keys())
                raise ValueError(
                    f"masks and prunable weights differ in {difference}: continue with the model, "
                    f"modalities and prunable patterns that the masks were made for"
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

    @cached_property
    def group_of(self) -> dict[str, str]:
        """Prunable parameter name -> its modality or "shared"."""
        groups = group_of(self.groups)
        return {name: groups[name] for name in self.weights}

    def probes(self, count: int, phase: str, skip: int = 0) -> Iterator[tuple[str, Any]]:
        """Up to `count` probe batches, each with a label for messages, after the first `skip`."""
        return self._take(self.probe_batches, "probe", count, phase, skip)

    def trainings(self, count: int, phase: str) -> Iterator[tuple[str, Any]]:
        """Up to `count` training batches, each with a label for messages."""
        return self._take(self.training_batches, "training", count, phase, 0)

    def loss(self, label: str, batch: Any) -> Tensor:
        """The loss on a batch, a scalar, checked.

        Raises:
            TypeError: If the loss function returns no tensor.
            ValueError: If the loss is not a scalar.
            NonFiniteLossError: If the loss is not finite.
        """
        loss = self.loss_fn(self.model, batch)
        if not isinstance(loss, Tensor):
            raise TypeError(f"the loss of {label} must be a tensor, got {type(loss).__name__}")
        if loss.numel() != 1:
            raise ValueError(f"the loss of {label} must be a scalar, got shape {tuple(loss.shape)}")
        if not torch.isfinite(loss).all():
            raise NonFiniteLossError(
                f"the loss of {label} is {loss.item()}: check the batch, or lower the learning rate "
                f"of the criterion if it happened after steps of training"
            )
        return loss.reshape(())

    def gradients(
        self, label: str, batch: Any, of: Mapping[str, nn.Parameter], create_graph: bool = False
    ) -> tuple[float, dict[str, Tensor]]:
        """The loss on a batch and its gradients; parameters that it does not reach are left out.

        `.grad` is not touched and no hook on gradient accumulation fires. With `create_graph` the
        gradients can be differentiated.

        Raises:
            TypeError, ValueError: As `loss`, and if the loss has no gradient or one is not finite.
        """
        loss = self.loss(label, batch)
        if not loss.requires_grad:
            raise ValueError(
                f"the loss of {label} has no gradient: it is detached, computed without gradients, "
                f"or depends on no trainable parameter"
            )
        found = torch.autograd.grad(loss, list(of.values()), create_graph=create_graph, allow_unused=True)
        gradients = {name: g for name, g in zip(of, found, strict=True) if g is not None}
        for name, gradient in gradients.items():
            if not torch.isfinite(gradient).all():
                raise ValueError(f"the gradient of {name!r} on {label} is not finite")
        return float(loss.detach()), gradients

    def _take(
        self, batches: Iterable[Any], kind: str, count: int, phase: str, skip: int
    ) -> Iterator[tuple[str, Any]]:
        length = known_length(batches)
        total = None if length is None else min(count, max(0, length - skip))
        done = 0
        for index, batch in enumerate(itertools.islice(batches, skip, skip + count), start=skip):
            self.progress(phase, done, total)
            yield f"{kind} batch {index}", batch
            done += 1
        self.progress(phase, done, done)
        if done == 0:
            after = f" after the first {skip}" if skip else ""
            raise ValueError(
                f"the {kind} loader gives no batch{after}: at least one is needed to score weights"
            )
        if done < count:
            warnings.warn(
                f"{count} {kind} batches were asked for, the loader has {done}: scoring with those",
                stacklevel=2,
            )


class Criterion(ABC):
    """Scores weights: which matter, knowing nothing of how many will stay.

    A criterion of your own derives from this class and is named in YAML by its `class_path`. It must
    leave the model as it was, for example by working inside `restored(calibration.model)`.
    """

    uses_batches = True  # no annotation: it is no option, and jsonargparse cannot resolve ClassVar
    """Whether scores depend on batches; if not, no held-out loader is needed."""

    @abstractmethod
    def score(self, calibration: Calibration) -> Scores:
        """Parameter name -> score of each weight in `calibration.weights`, higher is kept.

        Scores of weights that `calibration.masks` prunes are ignored.
        """
