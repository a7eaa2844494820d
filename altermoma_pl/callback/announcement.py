"""What the user hears of an event: the table, the logged metrics, the figures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lightning.pytorch import LightningModule, Trainer

from altermoma_pl import figures
from altermoma_pl.callback.state import PruningState
from altermoma_pl.criteria import Components

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def announce(trainer: Trainer, module: LightningModule, state: PruningState, seconds: float) -> None:
    """Print one table and log the event's metrics; nothing in a barebones run."""
    if trainer.barebones:
        return
    report, event = state.report(), state.events[-1]
    module.print(report.to_text(f"Pruned before epoch {event['epoch']} in {seconds:.1f} s"))
    metrics = {"pruning/sparsity": report.sparsity, "pruning/seconds": seconds}
    metrics |= {f"pruning/kept/{name}": share for name, share in event["kept"].items()}
    metrics |= {f"pruning/loss/{name}": loss for name, loss in event["losses"].items()}
    for logger in trainer.loggers:
        logger.log_metrics(metrics, step=trainer.global_step)


def draw(state: PruningState, components: Components | None) -> dict[str, Figure]:
    """Name -> figure; empty without matplotlib."""
    if not figures.available():
        return {}
    report = state.report()
    drawn = {
        "kept_per_layer": figures.kept_per_layer(report),
        "sparsity_over_epochs": figures.sparsity_over_epochs(state.events),
    }
    if components is not None and state.masks is not None:
        drawn["importance_against_redundancy"] = figures.importance_against_redundancy(
            components, state.masks
        )
    return drawn


def show_figures(trainer: Trainer, drawn: dict[str, Figure], folder: Path | None) -> None:
    """Write figures to `folder`, and to every logger that takes figures as TensorBoard's does."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in drawn.items():
            figure.savefig(folder / f"{name}.png")
    for logger in trainer.loggers:
        if callable(add_figure := getattr(getattr(logger, "experiment", None), "add_figure", None)):
            for name, figure in drawn.items():
                add_figure(f"pruning/{name}", figure, global_step=trainer.global_step, close=False)
