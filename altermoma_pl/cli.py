"""Command line: `altermoma fit | validate | test | report | export | compare`."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_type_hints

from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from altermoma_pl import __version__
from altermoma_pl.callback import AlterMOMACallback
from altermoma_pl.callback.checkpoints import load_checkpoint, pruning_states_of
from altermoma_pl.granularity.channels.resizing import KEY
from altermoma_pl.report import figures as drawing
from altermoma_pl.report.tables import to_json

_ERRORS = (ModuleNotFoundError, OSError, ValueError)
_DESCRIPTION = "Train and prune a fusion model, see what is left of it, export it, compare ways to prune."


class _Parser(LightningArgumentParser):
    """Keeps its subcommands, so that more can be added than the Trainer's."""

    def add_subcommands(self, *args: Any, **kwargs: Any) -> Any:
        self.commands = super().add_subcommands(*args, **kwargs)
        return self.commands


class AlterMOMACLI(LightningCLI):
    """LightningCLI with the arguments of `AlterMOMACallback` as the group `pruning`.

    Unlike an entry of the list `trainer.callbacks`, the group can be overridden key by key from further
    `--config` files and flags, and a typo in it gives a short error.
    """

    parser: _Parser

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("parser_class", _Parser)
        face = {"prog": "altermoma", "version": __version__, "description": _DESCRIPTION}
        kwargs["parser_kwargs"] = face | kwargs.get("parser_kwargs", {})
        super().__init__(*args, **kwargs)

    def setup_parser(self, add_subcommands: bool, *args: Any, **kwargs: Any) -> None:
        """List the commands that are not the Trainer's, too; `main` runs these."""
        super().setup_parser(add_subcommands, *args, **kwargs)
        for name, command in COMMANDS.items() if add_subcommands else ():
            self.parser.commands.add_subcommand(name, _Parser(), help=command.__doc__)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Refuse a command that `main` did not see, behind an option."""
        super().parse_arguments(parser, args)
        name = self.config.get("subcommand")
        if name in COMMANDS:
            parser.error(f"give {name} as the first argument, and its options after it")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the group `pruning`."""
        parser.add_lightning_class_args(AlterMOMACallback, "pruning")

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The Trainer's methods that make sense for a pruned model, and their arguments to skip."""
        return {name: LightningCLI.subcommands()[name] for name in ("fit", "validate", "test")}


def main(args: list[str] | None = None) -> None:
    """Entry point of the console script; `args` are for callers within Python.

    Modules in the current folder can be named by `class_path`, as with `python -m`.
    """
    if any(importlib.util.find_spec(name) is None for name in ("jsonargparse", "docstring_parser")):
        sys.stderr.write("altermoma needs jsonargparse[signatures]: pip install 'altermoma-pl[cli]'\n")
        sys.exit(1)
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    name, *rest = (sys.argv[1:] if args is None else args) or [""]
    if name in COMMANDS:
        COMMANDS[name](rest)
    else:
        AlterMOMACLI(args=args)


def report(
    checkpoint: str,
    format: Literal["table", "json", "csv"] = "table",
    figures: str | None = None,
    trust: bool = False,
) -> str:
    """What a checkpoint keeps.

    Args:
        checkpoint: Saved by a Trainer with AlterMOMACallback, or written by `altermoma export`.
        format: Of what is printed.
        figures: A folder; figures are also written there (needs matplotlib).
        trust: Load a checkpoint that holds other objects than tensors and builtins, which can run code.
    """
    from altermoma_pl.export import SlimReport

    if figures and not drawing.available():
        raise ModuleNotFoundError("--figures needs matplotlib: pip install 'altermoma-pl[plot]'")
    saved = load_checkpoint(checkpoint, trust)
    reports: dict[str, Any]  # of callbacks by name, most often of one without a name
    if KEY in saved:
        reports = {"": SlimReport.of(saved[KEY])}
        drawn = {"": reports[""].draw()} if figures else {}
    else:
        states = pruning_states_of(saved, checkpoint)
        reports = {name: state.report() for name, state in states.items()}
        drawn = {
            name: drawing.draw_pruning(reports[name], state.events, state.components, state.masks)
            for name, state in states.items()
            if figures
        }
    for name, each in drawn.items():
        drawing.save(each, Path(figures or "") / name)
    if format == "table":
        titles = {name: [f"{name}: kept weights"] if name else [] for name in reports}
        return "\n\n".join(each.to_text(*titles[name]) for name, each in reports.items())
    if format == "csv":  # one table below one header: no two callbacks prune the same layer
        lines = (line for each in reports.values() for line in each.to_csv().splitlines())
        return "\n".join(dict.fromkeys(lines))
    contents = {name: json.loads(each.to_json()) for name, each in reports.items()}
    return to_json(contents if len(contents) > 1 else contents.popitem()[1])


def _report(arguments: list[str]) -> None:
    """Show what a checkpoint keeps, per layer and per modality."""
    sys.stdout.write(_called("report", report, arguments, code=2).rstrip() + "\n")


def _export(arguments: list[str]) -> None:
    """Write the model of a checkpoint, smaller where channels are pruned."""
    from altermoma_pl.export import export

    exported = _called("export", export, arguments)
    costs = [exported.costs.to_text()] if exported.costs else []
    sys.stdout.write("\n".join([*costs, *exported.notes, f"Written: {exported.path}\n"]))


def _compare(arguments: list[str]) -> None:
    """Compare criteria on a benchmark. Start it again after a stop or a kill, and it goes on where it was."""
    try:
        from altermoma_pl.compare import compare
    except ModuleNotFoundError as error:
        sys.stderr.write(f"altermoma compare needs {error.name}: pip install 'altermoma-pl[compare]'\n")
        sys.exit(1)
    _called("compare", compare, arguments, errors=(OSError, RuntimeError, ValueError))


COMMANDS: dict[str, Callable[[list[str]], None]] = {"report": _report, "export": _export, "compare": _compare}
"""What is not a method of the Trainer: name -> what runs it; the docstring is its help."""


def _called(
    name: str, function: Callable[..., Any], arguments: list[str], code: int = 1, errors: Any = _ERRORS
) -> Any:
    """What a command's function returns. Its parameters are the options, its docstring is their help.

    The errors end it with this code and without usage: what was asked for is well formed.
    """
    from docstring_parser import parse
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog=f"altermoma {name}", description=COMMANDS[name].__doc__)
    helps = {each.arg_name: each.description for each in parse(function.__doc__ or "").params}
    if "checkpoint" in helps:
        parser.add_argument("checkpoint", help=helps["checkpoint"])
    else:
        parser.add_argument("--config", action="config", help="a YAML file with the options below")
    # jsonargparse by itself wants `--trust true`.
    flags = [option for option, kind in get_type_hints(function).items() if kind is bool]
    parser.add_function_arguments(function, skip={"checkpoint", *flags})
    for option in flags:
        parser.add_argument(f"--{option}", action="store_true", help=helps[option])
    options = parser.parse_args(arguments)
    try:
        options = parser.instantiate(options)
        if "checkpoint" not in helps:
            del options["config"]
        return function(**options)
    except errors as error:
        parser.exit(code, f"{parser.prog}: error: {error}\n")
