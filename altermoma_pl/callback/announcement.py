"""What the user hears of an event: the table, the logged metrics, the figures."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger

import altermoma_pl.report.figures as figures
from altermoma_pl.callback.state import PruningState
from altermoma_pl.report.sparsity import SparsityReport
from altermoma_pl.score import Components


def announce(
    trainer: Trainer,
    state: PruningState,
    components: Components | None,
    seconds: float,
    name: str | None,
    output_dir: str | None,
    with_figures: bool,
) -> None:
    """Print one table, log the event's metrics and draw it.

    Nothing is printed and logged in a barebones run; only the first process does any of it.

    Args:
        trainer: The Trainer.
        state: After the event.
        components: What it measured, where the criterion has them.
        seconds: How long it took.
        name: Of the callback.
        output_dir: Where figures go; None for the logger's folder.
        with_figures: Whether to draw.
    """
    report = state.report()
    folder = _folder(trainer, output_dir, name)  # asks all processes: before any of them returns
    if not trainer.is_global_zero:
        return
    prefix = "pruning" if name is None else f"pruning/{name}"
    if not trainer.barebones:
        _tell(trainer, state, report, seconds, name)
        _log(trainer, state, report, seconds, prefix)
    if with_figures:
        _draw(trainer, state, report, components, folder, prefix)


def _tell(
    trainer: Trainer, state: PruningState, report: SparsityReport, seconds: float, name: str | None
) -> None:
    event = state.events[-1]
    who = "" if name is None else f"{name}: "
    beta = f", beta {event['beta']:g}" if "beta" in event else ""
    skipped = f", {event['num_skipped']} batches were not finite" if "num_skipped" in event else ""
    title = f"{who}Pruned before epoch {event['epoch']} in {seconds:.1f} s{beta}{skipped}"
    _print(trainer, report.to_text(title))


def _log(trainer: Trainer, state: PruningState, report: SparsityReport, seconds: float, prefix: str) -> None:
    event = state.events[-1]
    metrics = {"sparsity": report.sparsity, "seconds": seconds}
    metrics |= {f"kept/{group}": share for group, share in event["kept"].items()}
    metrics |= {f"loss/{which}": loss for which, loss in event["losses"].items()}
    if "num_skipped" in event:
        metrics["num_skipped"] = event["num_skipped"]
    metrics |= {key: event[key] for key in ("beta", "channels", "flops") if key in event}
    for logger in trainer.loggers:
        logger.log_metrics({f"{prefix}/{k}": v for k, v in metrics.items()}, step=trainer.global_step)


def _draw(
    trainer: Trainer,
    state: PruningState,
    report: SparsityReport,
    components: Components | None,
    folder: Path | None,
    prefix: str,
) -> None:
    """To `folder` and to every logger that takes figures as TensorBoard's does.

    Nothing is drawn without matplotlib, or where nobody would see it.
    """
    loggers = [each for each in trainer.loggers if callable(getattr(_experiment(each), "add_figure", None))]
    if state.masks is None or not (folder or loggers) or not figures.available():
        return
    # Each process has only some rows of what is sharded, and only this one draws.
    drawn = figures.draw_pruning(
        report, state.events, None if state.masks.sharded else components, state.masks
    )
    if folder is not None:
        figures.save(drawn, folder)
    for logger in loggers:
        for name, figure in drawn.items():
            _experiment(logger).add_figure(
                f"{prefix}/{name}", figure, global_step=trainer.global_step, close=False
            )


def _print(trainer: Trainer, text: str) -> None:
    """As `LightningModule.print`, which fails beside progress bars that derive from the plain class."""
    bar = trainer.progress_bar_callback
    if bar is not None and getattr(bar, "is_enabled", False):
        bar.print(text)
    else:
        sys.stdout.write(text + "\n")


def _folder(trainer: Trainer, output_dir: str | None, name: str | None) -> Path | None:
    """`output_dir`, or `pruning` in the logger's folder; None where nothing is to be written."""
    if trainer.barebones or getattr(trainer, "fast_dev_run", False):
        return None
    if output_dir is not None:
        return Path(output_dir)
    log_dir = trainer.log_dir
    return Path(log_dir) / "pruning" / (name or "") if trainer.loggers and log_dir else None


def _experiment(logger: Logger) -> Any:
    return getattr(logger, "experiment", None)
