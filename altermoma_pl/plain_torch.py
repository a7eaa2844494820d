"""The algorithm without Lightning: `prune` says what stays, `hold` keeps the rest at zero while you train."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.optim import Optimizer

from altermoma_pl.enforce.enforcement import Enforcement
from altermoma_pl.granularity import Granularity, Ranking, Sparsity, parse_granularity
from altermoma_pl.granularity.base import make_calibration
from altermoma_pl.mask.masks import Masks
from altermoma_pl.mask.top_k import Scope
from altermoma_pl.model.contexts import generators_restored, seed_generators
from altermoma_pl.model.distributed import of_first
from altermoma_pl.score import AlterEva, Criterion, LossFunction
from altermoma_pl.score.decision import decide


def prune(
    model: nn.Module,
    loss_fn: LossFunction,
    probe_batches: Iterable[Any],
    training_batches: Iterable[Any],
    modalities: Mapping[str, str | Sequence[str]],
    sparsity: Sparsity = 0.9,
    criterion: Criterion = AlterEva(),
    granularity: str | Granularity = "weight",
    scope: Scope = "global",
    min_density: float = 0.01,
    prunable: Sequence[str] = (),
    masks: Masks | None = None,
    seed: int = 0,
) -> Masks:
    """Score a trained model and say which of its weights stay; the model is left as it was, bit for bit.

    Train on inside `hold(model, masks, optimizer)`, or set the others to zero once: `masks.apply_(model)`.
    To prune gradually, prune again inside `hold`, with the earlier masks and a higher sparsity.

    Args:
        model: The model, trained.
        loss_fn: `loss_fn(model, batch)` -> a scalar tensor.
        probe_batches: Held-out batches to score on: a list or a loader, in the same order each time.
        training_batches: Batches to train on while a modality is deactivated; likewise.
        modalities: Modality -> patterns over module paths, for at least two (see `Modalities`).
        sparsity: Share of zeros among prunable weights, or of channels or FLOPs that are gone, in [0, 1); or
            one for each modality and "shared", with the scope "modality".
        criterion: Scores what may be pruned.
        granularity: What goes as one piece: a "weight", "2:4", a "channel", or an object with options.
        scope: Over what scores compete: "global", each "modality", "layer", or output "row" of a layer.
        min_density: Share of each tensor, or group of channels, that stays whatever its scores.
        prunable: Patterns over parameter names that add to, or with `!` remove from, what may be pruned.
        masks: What is pruned already; masks only shrink.
        seed: For random numbers drawn while scoring.

    Returns:
        Masks on the device of the model; with channels they cover all parameters that are coupled.

    Raises:
        TypeError: If patterns are not strings, a loss is no tensor, or batches can be read only once.
        ValueError: If options do not go together, there is no batch, a loss or gradient is not finite, no
            channel can be removed, or the sparsity cannot be reached.
    """
    grain = parse_granularity(granularity)
    grain.check(criterion, sparsity, scope, min_density)
    if isinstance(probe_batches, Iterator) or isinstance(training_batches, Iterator):
        raise TypeError("batches are read several times, a generator only once: give a list or a loader")
    with generators_restored():
        seed_generators(seed)
        traced = of_first(grain.trace(model, loss_fn, probe_batches, prunable))
        calibration = make_calibration(
            traced, model=model, loss_fn=loss_fn, probe_batches=probe_batches,
            training_batches=training_batches, modalities=modalities, prunable=prunable, masks=masks,
            seed=seed,
        )  # fmt: skip
        ranking = Ranking.of(calibration, scope, min_density, traced)
        return decide(criterion, calibration, lambda scores: grain.masks(scores, sparsity, ranking)).masks


@contextmanager
def hold(model: nn.Module, masks: Masks, *optimizers: Optimizer) -> Iterator[None]:
    """Keep the pruned weights of `model` at zero inside, after every step of these optimizers.

    On entry the weights, and the optimizers' moments of them, are set to zero. On exit the weights are zero
    once more, and the optimizers as free as before.

    Args:
        model: The model.
        masks: What stays, as `prune` returns it.
        *optimizers: All that train the model.

    Raises:
        ValueError: If the masks are not those of this model.
    """
    masks.check_fits(model)
    enforcement = Enforcement(model, masks.to(model), optimizers)
    try:
        yield
    finally:
        enforcement.hold_()
        enforcement.release()
