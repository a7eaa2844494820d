"""What the user hears of an event: the table, the logged metrics, the figures."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger

import altermoma_pl.figures as figures
from altermoma_pl.callback.state import PruningState
from altermoma_pl.criteria import Components


def announce(trainer: Trainer, state: PruningState, seconds: float) -> None:
    """Print one table and log the event's metrics; nothing in a barebones run."""
    if trainer.barebones:
        return
    report, event = state.report(), state.events[-1]
    beta = f", beta {event['beta']:g}" if "beta" in event else ""
    _print(trainer, report.to_text(f"Pruned before epoch {event['epoch']} in {seconds:.1f} s{beta}"))
    metrics = {"pruning/sparsity": report.sparsity, "pruning/seconds": seconds}
    metrics |= {f"pruning/kept/{name}": share for name, share in event["kept"].items()}
    metrics |= {f"pruning/loss/{name}": loss for name, loss in event["losses"].items()}
    if "beta" in event:
        metrics["pruning/beta"] = event["beta"]
    for logger in trainer.loggers:
        logger.log_metrics(metrics, step=trainer.global_step)


def show_figures(
    trainer: Trainer, state: PruningState, components: Components | None, folder: Path | None
) -> None:
    """Draw the event, to `folder` and to every logger that takes figures as TensorBoard's does.

    Nothing is drawn without matplotlib, or where nobody would see it.
    """
    loggers = [each for each in trainer.loggers if callable(getattr(_experiment(each), "add_figure", None))]
    if state.masks is None or not (folder or loggers) or not figures.available():
        return
    drawn = figures.draw(state.report(), state.events, components, state.masks)
    if folder is not None:
        figures.save(drawn, folder)
    for logger in loggers:
        for name, figure in drawn.items():
            _experiment(logger).add_figure(
                f"pruning/{name}", figure, global_step=trainer.global_step, close=False
            )


def _print(trainer: Trainer, text: str) -> None:
    """As `LightningModule.print`, which fails beside progress bars that derive from the plain class."""
    bar = trainer.progress_bar_callback
    if bar is not None and getattr(bar, "is_enabled", False):
        bar.print(text)
    else:
        sys.stdout.write(text + "\n")


def folder_for(trainer: Trainer, output_dir: str | None) -> Path | None:
    """`output_dir`, or `pruning` in the logger's folder; None where nothing is to be written."""
    if trainer.barebones or getattr(trainer, "fast_dev_run", False):
        return None
    if output_dir is not None:
        return Path(output_dir)
    return Path(trainer.log_dir) / "pruning" if trainer.loggers and trainer.log_dir else None


def _experiment(logger: Logger) -> Any:
    return getattr(logger, "experiment", None)
