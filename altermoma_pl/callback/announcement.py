"""What the user hears of an event: the table, the logged metrics, the figures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer

import altermoma_pl.report.figures as figures
from altermoma_pl.callback.lightning_internals import is_trial, print_beside_bar
from altermoma_pl.score import Components

if TYPE_CHECKING:
    from altermoma_pl.callback.callback import AlterMOMACallback


def announce(
    callback: AlterMOMACallback, trainer: Trainer, components: Components | None, seconds: float
) -> None:
    """Print one table of the callback's latest event, log its metrics and draw it, with its components.

    Nothing is printed and logged in a barebones run; only the first process does any of it.
    """
    report, event, masks, name = callback.report(), callback.events[-1], callback.masks, callback.name
    folder = _folder(trainer, callback.output_dir, name)  # asks all processes: before any of them returns
    if not trainer.is_global_zero:
        return
    prefix = "pruning" if name is None else f"pruning/{name}"
    if not trainer.barebones:
        who = "" if name is None else f"{name}: "
        beta = f", beta {event['beta']:g}" if "beta" in event else ""
        skipped = f", {event['num_skipped']} batches were not finite" if "num_skipped" in event else ""
        title = f"{who}Pruned before epoch {event['epoch']} in {seconds:.1f} s{beta}{skipped}"
        print_beside_bar(trainer, report.to_text(title))
        metrics = {"sparsity": event["sparsity"], "seconds": seconds}
        metrics |= {f"kept/{group}": share for group, share in event["kept"].items()}
        metrics |= {f"loss/{which}": loss for which, loss in event["losses"].items()}
        metrics |= {key: event[key] for key in ("num_skipped", "beta", "channels", "flops") if key in event}
        for logger in trainer.loggers:
            logger.log_metrics({f"{prefix}/{k}": v for k, v in metrics.items()}, step=trainer.global_step)
    if callback.figures and masks is not None and figures.available():
        # Each process has only some rows of what is sharded, and only this one draws.
        shown = None if masks.sharded else components
        experiments: list[Any] = [getattr(logger, "experiment", None) for logger in trainer.loggers]
        boards = [each for each in experiments if hasattr(each, "add_figure")]  # as TensorBoard's does
        drawn = figures.draw_pruning(report, callback.events, shown, masks) if folder or boards else {}
        if folder is not None:
            figures.save(drawn, folder)
        for board in boards:
            for title, figure in drawn.items():
                board.add_figure(f"{prefix}/{title}", figure, global_step=trainer.global_step, close=False)


def _folder(trainer: Trainer, output_dir: str | None, name: str | None) -> Path | None:
    """`output_dir`, or `pruning` in the logger's folder; None where nothing is to be written."""
    if trainer.barebones or is_trial(trainer):
        return None
    if output_dir is not None:
        return Path(output_dir)
    log_dir = trainer.log_dir
    return Path(log_dir) / "pruning" / (name or "") if trainer.loggers and log_dir else None
