"""From a calibration to masks: what a scoring event decides, and how much redundancy should count."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field

from altermoma_pl.mask.masks import Masks
from altermoma_pl.model.contexts import noise_free, restored
from altermoma_pl.model.distributed import check_same, is_sharded, num_processes, sum_, sums
from altermoma_pl.score.altereva import AlterEva
from altermoma_pl.score.calibration import Calibration
from altermoma_pl.score.combination import Components
from altermoma_pl.score.criterion import Criterion, Scores
from altermoma_pl.score.passes import NonFiniteError, mean_loss

MakeMasks = Callable[[Scores], Masks]
"""From scores to what stays, for example `top_k` with a sparsity."""

# A discount keeps the order where there is no redundancy and stands a large beta; a subtraction
# lowers important weights too, and the paper's ablation ends at 2.
CANDIDATES = {"discount": (0.0, 1.0, 2.0, 3.0, 4.0), "subtract": (0.0, 0.25, 0.5, 1.0, 2.0)}


@dataclass(frozen=True)
class Decision:
    """What an event decides.

    Args:
        masks: What stays.
        components: DeCI and ReRI, where the criterion has them.
        beta: The beta that was chosen, where the criterion's is "auto".
        beta_losses: Loss of the pruned model for each candidate, as `choose_beta` returns them.
        num_skipped: Batches of all processes that were left out because they were not finite.
    """

    masks: Masks
    components: Components | None = None
    beta: float | None = None
    beta_losses: dict[float, float] = field(default_factory=dict)
    num_skipped: int = 0


def decide(criterion: Criterion, calibration: Calibration, make_masks: MakeMasks) -> Decision:
    """Score and rank; the model is left as it was. Different masks in different processes are an error."""
    components, beta = None, None
    losses: dict[float, float] = {}
    if isinstance(criterion, AlterEva):
        components = criterion.components(calibration)
        if criterion.beta == "auto":
            criterion, losses = choose_beta(criterion, components, calibration, make_masks)
            beta = float(criterion.beta)
        scores = criterion.combine(components, calibration.alive)
    else:
        scores = criterion.score(calibration)
        if num_processes() > 1 and not is_sharded(scores.values()):
            # A criterion that knows nothing of processes gives the scores of its own batches.
            scores = {name: sum_(s.detach().clone()).div_(num_processes()) for name, s in scores.items()}
    masks = make_masks(scores)
    if num_processes() > 1:
        check_same(masks.digest, "the masks")
    return Decision(masks, components, beta, losses, num_skipped=sums([calibration.num_skipped])[0])


def choose_beta(
    criterion: AlterEva, components: Components, calibration: Calibration, make_masks: MakeMasks
) -> tuple[AlterEva, dict[float, float]]:
    """The criterion with the beta whose masks leave the lowest loss, before any fine-tuning.

    Nothing is scored again: each candidate is combined from the same components, its masks are applied to
    the model, and the loss is averaged over the `criterion.num_probe_batches` probe batches. Never worse
    on that loss than beta = 0, which is always a candidate; the smallest of equally good ones is taken.
    The model is left as it was, bit for bit, also after an exception.

    Args:
        criterion: Combines the components; its own beta does not matter.
        components: What `criterion.components(calibration)` measured.
        calibration: The model, its earlier masks and the probe batches.
        make_masks: From the scores of a candidate to masks on the device of the model.

    Returns:
        The criterion with the beta chosen, and the mean loss of each candidate, infinite where the loss
        of a batch is not finite; such a candidate is never chosen over one with a finite loss.
    """
    model, losses = calibration.model, {}
    # The state to come back to has the layers quiet already, hence this order.
    with noise_free(model) if criterion.noise == "suppressed" else nullcontext(), restored(model) as reset:
        for beta in CANDIDATES[criterion.combination]:
            candidate = dataclasses.replace(criterion, beta=beta)
            make_masks(candidate.combine(components, calibration.alive)).apply_(model)
            try:
                losses[beta] = mean_loss(calibration, criterion.num_probe_batches, f"beta {beta:g}")
            except NonFiniteError:
                losses[beta] = math.inf
            reset()
    if not any(map(math.isfinite, losses.values())):
        warnings.warn(
            "the loss of the pruned model is not finite for any beta: taking 0; a lower sparsity or a "
            "higher min_density may help",
            stacklevel=2,
        )
    best = min(losses, key=losses.__getitem__)  # of equals the first, which is the smallest
    return dataclasses.replace(criterion, beta=best), losses
