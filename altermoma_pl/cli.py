"""Command line: `altermoma fit | validate | test | report | export | compare`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

import altermoma_pl.report.figures as figures
from altermoma_pl.callback import AlterMOMACallback
from altermoma_pl.callback.checkpoints import load_checkpoint, pruning_states_of
from altermoma_pl.export import SUFFIXES, SlimReport, export
from altermoma_pl.granularity.channels.rebuilding import KEY
from altermoma_pl.report.sparsity import SparsityReport

_DESCRIPTION = (
    "Train and prune a fusion model. `altermoma report CHECKPOINT` shows what a checkpoint of a pruned "
    "model keeps, per layer and per modality (see `altermoma report --help`). `altermoma export` writes a "
    "smaller model (see `altermoma export --help`). `altermoma compare` compares "
    "criteria on a benchmark (see `altermoma compare --help`)."
)
_EXPORT = (
    "Remove the pruned channels of a checkpoint's model and write it, as a checkpoint that Lightning resumes "
    "from (see altermoma_pl.Slimmed), for torch.export or ONNX, with what it costs to run."
)
_COMPARE = (
    "Compare criteria on a benchmark: methods x sparsities x seeds, from the same dense models. Start it "
    "again after a stop or a kill, and it goes on where it was."
)


class AlterMOMACLI(LightningCLI):
    """LightningCLI with the arguments of `AlterMOMACallback` as the group `pruning`.

    Unlike an entry of the list `trainer.callbacks`, the group can be overridden key by key from further
    `--config` files and flags, and a typo in it gives a short error.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("parser_kwargs", {}).setdefault("description", _DESCRIPTION)
        super().__init__(*args, **kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the group `pruning`."""
        parser.add_lightning_class_args(AlterMOMACallback, "pruning")

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The Trainer's methods that make sense for a pruned model, and their arguments to skip."""
        loaders = {"model", "dataloaders", "datamodule"}
        return {
            "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule"},
            "validate": loaders,
            "test": loaders,
        }


def main(args: list[str] | None = None) -> None:
    """Entry point of the console script; `args` are for callers within Python.

    Modules in the current folder can be named by `class_path`, as with `python -m`.
    """
    arguments = sys.argv[1:] if args is None else args
    if arguments[:1] == ["report"]:
        _report(arguments[1:])
        return
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    if arguments[:1] == ["export"]:
        _export(arguments[1:])
        return
    if arguments[:1] == ["compare"]:
        _compare(arguments[1:])
        return
    AlterMOMACLI(args=args)


def _compare(arguments: list[str]) -> None:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog="altermoma compare", description=_COMPARE)
    try:
        from altermoma_pl.compare import compare
    except ModuleNotFoundError as error:
        parser.exit(1, f"altermoma compare needs {error.name}: pip install 'altermoma-pl[compare]'\n")
    parser.add_argument("--config", action="config", help="a YAML file with the options below")
    parser.add_function_arguments(compare, as_positional=False)
    options = parser.parse_args(arguments)
    try:
        options = parser.instantiate(options)
        del options["config"]
        compare(**options)
    except (RuntimeError, ValueError) as error:  # no usage: what was asked for is well formed
        parser.exit(1, f"altermoma compare: error: {error}\n")


def _export(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser("altermoma export", description=_EXPORT)
    parser.add_argument("checkpoint", help="saved by a Trainer with AlterMOMACallback, or of a slim model")
    parser.add_argument(
        "--config", required=True, metavar="YAML", help="with `model:` and, for inputs, `data:`"
    )
    parser.add_argument("--format", choices=tuple(SUFFIXES), default="checkpoint")
    parser.add_argument("--output", metavar="FILE", help="default: the checkpoint's name with another ending")
    parser.add_argument(
        "--recalibrate", type=int, default=0, metavar="N", help="batch norms, on N training batches"
    )
    parser.add_argument(
        "--validate", action="store_true", help="the masked and the slim model, beside their costs"
    )
    parser.add_argument("--opset", type=int, help="of ONNX")
    parser.add_argument("--repeats", type=int, default=20, help="of each latency; 0: measure no costs")
    parser.add_argument("--trust", action="store_true", help="load a checkpoint that holds other objects")
    options = parser.parse_args(arguments)
    try:
        exported = export(**vars(options))
    except (ModuleNotFoundError, OSError, ValueError) as error:
        parser.exit(1, f"altermoma export: error: {error}\n")
    if exported.costs is not None:
        sys.stdout.write(exported.costs.to_text() + "\n")
    for note in exported.notes:
        sys.stdout.write(note + "\n")
    sys.stdout.write(f"Written: {exported.path}\n")


def _report(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser("altermoma report", description="What a pruned checkpoint keeps.")
    parser.add_argument(
        "checkpoint", help="saved by a Trainer with AlterMOMACallback, or written by altermoma export"
    )
    parser.add_argument("--format", choices=("table", "json", "csv"), default="table")
    parser.add_argument("--figures", metavar="FOLDER", help="also write figures there (needs matplotlib)")
    parser.add_argument("--trust", action="store_true", help="load a checkpoint that holds other objects")
    options = parser.parse_args(arguments)
    try:
        saved = load_checkpoint(options.checkpoint, options.trust)
        if KEY in saved:
            _report_slim(SlimReport.of(saved[KEY]), options, parser)
            return
        states = pruning_states_of(saved, options.checkpoint)
        reports = {name: state.report() for name, state in states.items()}
    except (OSError, ValueError) as error:
        parser.error(str(error))
    sys.stdout.write(_FORMATS[options.format](reports).rstrip() + "\n")
    if options.figures:
        _check_figures(parser)
        for name, state in states.items():
            drawn = figures.draw(reports[name], state.events, state.components, state.masks)
            figures.save(drawn, Path(options.figures) / name)


def _report_slim(report: SlimReport, options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    formats = {"table": report.to_text, "json": report.to_json, "csv": report.to_csv}
    sys.stdout.write(formats[options.format]().rstrip() + "\n")
    if options.figures:
        _check_figures(parser)
        figures.save(report.draw(), Path(options.figures))


def _check_figures(parser: argparse.ArgumentParser) -> None:
    if not figures.available():
        parser.error("--figures needs matplotlib: pip install 'altermoma-pl[plot]'")


def _tables(reports: dict[str, SparsityReport]) -> str:
    titles = {name: f"{name}: kept weights" if name else "Kept weights" for name in reports}
    return "\n\n".join(report.to_text(titles[name]) for name, report in reports.items())


def _jsons(reports: dict[str, SparsityReport]) -> str:
    """One object, or with several callbacks one of objects by name."""
    if len(reports) == 1:
        return next(iter(reports.values())).to_json()
    return json.dumps({name: json.loads(report.to_json()) for name, report in reports.items()}, indent=2)


def _csvs(reports: dict[str, SparsityReport]) -> str:
    """One table: no two callbacks prune the same layer."""
    tables = [report.to_csv() for report in reports.values()]
    return tables[0] + "".join(table.partition("\n")[2] for table in tables[1:])


_FORMATS = {"table": _tables, "json": _jsons, "csv": _csvs}
