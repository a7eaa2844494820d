"""From a calibration to masks: what a scoring event decides."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from altermoma_pl.mask.masks import Masks
from altermoma_pl.model.distributed import check_same, is_sharded, num_processes, sum_, sums
from altermoma_pl.score.altereva import AlterEva
from altermoma_pl.score.beta import MakeMasks, choose_beta
from altermoma_pl.score.calibration import Calibration
from altermoma_pl.score.components import Components
from altermoma_pl.score.criterion import Criterion, Scores


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
    """Score and rank; the model is left as it was.

    Raises:
        RuntimeError: If processes come to different masks.
    """
    decision = _decide(criterion, calibration, make_masks)
    if num_processes() > 1:
        check_same(decision.masks.digest, "the masks")
    return replace(decision, num_skipped=int(sums([calibration.num_skipped])[0]))


def _decide(criterion: Criterion, calibration: Calibration, make_masks: MakeMasks) -> Decision:
    if not isinstance(criterion, AlterEva):
        return Decision(make_masks(_mean_over_processes(criterion.score(calibration))))
    components = criterion.components(calibration)
    if criterion.beta != "auto":
        return Decision(make_masks(criterion.combine(components, calibration.alive)), components)
    chosen, losses = choose_beta(criterion, components, calibration, make_masks)
    masks = make_masks(chosen.combine(components, calibration.alive))
    return Decision(masks, components, float(chosen.beta), losses)


def _mean_over_processes(scores: Scores) -> Scores:
    """The scores of a criterion that knows nothing of processes are those of its own batches."""
    if num_processes() == 1 or is_sharded(scores.values()):
        return scores
    return {name: sum_(score.detach().clone()).div_(num_processes()) for name, score in scores.items()}
