"""All that a criterion may look at: the model to prune and the batches on which its weights are judged."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar, get_args

import torch
from torch import Tensor, nn

from altermoma_pl.mask.masks import Masks
from altermoma_pl.model.distributed import all_agree, check_division, is_sharded, num_processes, reshard_
from altermoma_pl.model.modality import Modalities, check_prunable, group_of, prunable
from altermoma_pl.score.finite import NonFiniteError, OnNonFinite, check_gradients, check_loss

LossFunction = Callable[[nn.Module, Any], Tensor]
"""`loss_fn(model, batch)` returns a scalar that depends on the model's parameters."""


T = TypeVar("T")


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

    def __post_init__(self) -> None:
        if self.on_nonfinite not in get_args(OnNonFinite):
            raise ValueError(
                f"on_nonfinite must be one of {list(get_args(OnNonFinite))}, got {self.on_nonfinite!r}"
            )
        reshard_(self.model)  # so that parameters are what optimizers know
        self._leaves = list(self.model.parameters())
        if not isinstance(self.modalities, Modalities):
            self.modalities = Modalities(self.modalities)
        check_prunable(self.groups, self.masked)
        check_division(self.model.parameters())
        if self.sharded:
            whole = [name for name, weight in self.masked.items() if not is_sharded([weight])]
            if whole:
                raise ValueError(
                    f"{whole} are not sharded while others are: apply fully_shard to their module"
                )
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
    def masked(self) -> Mapping[str, nn.Parameter]:
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

    def probes(self, count: int, phase: str, skip: int = 0) -> Iterator[tuple[str, Any]]:
        """Up to `count` probe batches, each with a label for messages, after the first `skip`.

        With several processes each takes its share of the count, rounded up.
        """
        count, skip = (-(-number // num_processes()) for number in (count, skip))
        return self._take(self.probe_batches, "probe", count, phase, skip, self.lockstep)

    def trainings(self, count: int, phase: str) -> Iterator[tuple[str, Any]]:
        """Up to `count` training batches, each with a label for messages.

        With several processes one step of training takes a batch of each.
        """
        return self._take(self.training_batches, "training", count, phase, 0, num_processes() > 1)

    def finite(
        self,
        batches: Iterable[tuple[str, Any]],
        measure: Callable[[str, Any], T],
        lockstep: bool | None = None,
    ) -> Iterator[T]:
        """What `measure` gives for each labelled batch; one that is not finite is an error or left out.

        Raises:
            NonFiniteError: If `measure` raises it and `on_nonfinite` is "raise".
        """
        lockstep = self.lockstep if lockstep is None else lockstep
        for label, batch in batches:
            result, error = None, None
            try:
                result = measure(label, batch)
            except NonFiniteError as found:
                error = found
            if all_agree(error is None) if lockstep else error is None:
                yield result  # type: ignore[misc]
            elif self.on_nonfinite == "skip":
                self.num_skipped += 1
            else:
                raise error or NonFiniteError(f"{label} of another process is not finite: see its message")

    def loss(self, label: str, batch: Any) -> Tensor:
        """The loss on a batch, a scalar, checked.

        Raises:
            TypeError: If the loss function returns no tensor.
            ValueError: If the loss is not a scalar.
            NonFiniteError: If the loss is not finite.
        """
        loss = self._scalar(label, batch)
        check_loss(label, loss)
        return loss

    def gradients(
        self, label: str, batch: Any, of: Mapping[str, nn.Parameter], create_graph: bool = False
    ) -> tuple[float, dict[str, Tensor]]:
        """The loss on a batch and its gradients; parameters that it does not reach are left out.

        `.grad` is not touched and no hook on gradient accumulation fires, unless parameters are sharded:
        then gradients are those of the mean loss over all processes. With `create_graph` the gradients
        can be differentiated.

        Raises:
            TypeError: As `loss`.
            ValueError: If the loss is not a scalar or has no gradient.
            NonFiniteError: If the loss or a gradient is not finite.
        """
        loss = self._scalar(label, batch)
        if not self.lockstep:  # else only after the backward pass, in which all processes take part
            check_loss(label, loss)
        if not loss.requires_grad:
            raise ValueError(
                f"the loss of {label} has no gradient: it is detached, computed without gradients, "
                f"or depends on no trainable parameter"
            )
        if self.sharded:
            found = self._backward(loss, list(of.values()))
        else:
            found = torch.autograd.grad(loss, list(of.values()), create_graph=create_graph, allow_unused=True)
        gradients = {name: g for name, g in zip(of, found, strict=True) if g is not None}
        del found
        check_loss(label, loss)
        check_gradients(label, gradients)
        return float(loss.detach()), gradients

    def derivatives(
        self, label: str, batch: Any, of: Mapping[str, nn.Parameter]
    ) -> tuple[float, dict[str, Tensor]]:
        """The loss on a batch and its derivatives by what is scored, `weights` or some of them."""
        return self.gradients(label, batch, of)

    def _scalar(self, label: str, batch: Any) -> Tensor:
        loss = self.loss_fn(self.model, batch)
        if not torch.is_grad_enabled():
            reshard_(self.model)
        if not isinstance(loss, Tensor):
            raise TypeError(f"the loss of {label} must be a tensor, got {type(loss).__name__}")
        if loss.numel() != 1:
            raise ValueError(f"the loss of {label} must be a scalar, got shape {tuple(loss.shape)}")
        return loss.reshape(())

    def _backward(self, loss: Tensor, of: list[nn.Parameter]) -> tuple[Tensor | None, ...]:
        """Gradients as `fully_shard` makes them: in the backward pass itself, the mean over processes."""
        saved = [(parameter, parameter.grad) for parameter in self._leaves]
        for parameter, _ in saved:
            parameter.grad = None
        try:
            loss.backward()  # type: ignore[no-untyped-call]
            return tuple(parameter.grad for parameter in of)
        finally:
            for parameter, gradient in saved:
                parameter.grad = gradient

    def _take(
        self, batches: Iterable[Any], kind: str, count: int, phase: str, skip: int, lockstep: bool
    ) -> Iterator[tuple[str, Any]]:
        length = known_length(batches)
        total = None if length is None else min(count, max(0, length - skip))
        done, own = 0, enumerate(itertools.islice(batches, skip, skip + count), start=skip)
        while True:
            index, batch = next(own, (-1, None))
            if not (all_agree(index >= 0) if lockstep else index >= 0):
                break
            self.progress(phase, done, total)
            yield f"{kind} batch {index}", batch
            done += 1
        self.progress(phase, done, done)
        if done == 0 and (lockstep or num_processes() == 1):
            after = f" after the first {skip}" if skip else ""
            raise ValueError(
                f"the {kind} loader gives no batch{after}: at least one is needed to score weights"
            )
        if done < count:
            warnings.warn(
                f"{count} {kind} batches were asked for, the loader has {done}: scoring with those",
                stacklevel=2,
            )
