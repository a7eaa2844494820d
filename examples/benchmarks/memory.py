"""What pruning costs in memory and in checkpoints, in copies of the parameters.

python examples/benchmarks/memory.py --json memory.json

1. While scoring: peak resident memory of an event of AlterEva less that of a bare loop on the same model,
   once with forward and backward passes alone, once with the steps of Adam that reactivation takes too.
2. While training: resident memory, and tensors counted one by one, beyond a run without pruning.
3. In the checkpoint: its size beyond that of a run without pruning.

Beside ours, for 2 and 3: Lightning's `ModelPruning` in five rounds, as it is by default and without its
copy for lottery tickets, and `torch.nn.utils.prune` in five rounds. The model is two linear towers and
batches are small, so that activations count for little. Each case has a process of its own (Linux only).
"""

import ctypes
import gc
import json
import logging
import os
import subprocess
import sys
import tempfile
import warnings
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelPruning
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import prune
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout, so that `examples` is found

from altermoma_pl import AlterEva, AlterMOMACallback, OneShot
from examples.benchmarks.measuring import Row, options, show
from examples.benchmarks.scoring import backward, calibration_of, event
from examples.benchmarks.step import layers
from examples.benchmarks.workloads import Towers

SPARSITY, ROUNDS = 0.9, 5
WARM_UP = 1e3  # weights
CRITERION = AlterEva(num_probe_batches=2, num_reactivation_steps=2)
Measured = Mapping[str, float]
"""Bytes by name."""


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table; with `--case` measure one case and print its bytes."""
    arguments = options(__doc__, argv, parameters=25e6, case="")
    if arguments.quick:
        arguments.parameters = 1e4
    if arguments.case:
        logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
        print(json.dumps(CASES[arguments.case](arguments.parameters)))
        return
    runs = [{case: measure(case, arguments) for case in CASES} for _ in range(arguments.repeats)]
    rows = [
        *(compare(runs, "event", base, "peak", 3.0) for base in ("forward and backward", "with Adam")),
        *(
            compare(runs, case, "dense", what, 0.26 if case == "ours" else None)
            for what in ("counted", "resident")
            for case in TRAINING
        ),
        *(compare(runs, case, "dense", "checkpoint", TARGETS.get(case)) for case in TRAINING),
    ]
    show("Memory beyond the dense run / parameters", rows, arguments)


def measure(case: str, arguments: Namespace) -> Measured:
    """Run a case in a process of its own."""
    command = [sys.executable, __file__, "--case", case, "--parameters", str(arguments.parameters)]
    # One arena, and large blocks given back when they are freed: resident memory is what is in use.
    heap = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=os.environ | heap, stdout=subprocess.PIPE, text=True, check=True)
    measured: Measured = json.loads(done.stdout.splitlines()[-1])
    return measured


def compare(
    runs: Sequence[Mapping[str, Measured]], case: str, base: str, what: str, at_most: float | None
) -> Row:
    """How much more than the base a case takes, in copies of the parameters."""
    more = [run[case][what] - run[base][what] for run in runs]
    copies = [bytes_ / run[case]["parameters"] for bytes_, run in zip(more, runs, strict=True)]
    label = f"{what}: {case}, beyond {base}"
    return Row(label, copies, at_most, [bytes_ / 1e6 for bytes_ in more], "MB")


def scoring(action: Callable[[Any], object], num_parameters: float) -> Measured:
    """Peak memory of what is done on a calibration."""
    torch.manual_seed(0)
    towers = Towers(num_parameters)
    calibration = calibration_of(towers, towers.batches(2, 1))
    action(calibration_of(Towers(WARM_UP), Towers(WARM_UP).batches(2, 1)))  # whatever is set up on first use
    trim()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew from here
    action(calibration)
    return {"peak": status("VmHWM"), "parameters": parameter_bytes(towers)}


def bare(calibration: Any, adam: bool) -> None:
    """Forward and backward passes, with gradients alive, and steps of Adam."""
    parameters = list(calibration.model.parameters())
    optimizer = torch.optim.Adam(parameters, lr=1e-9, fused=True) if adam else None
    backward(calibration, calibration.probe_batches, optimizer)


class Watch(Callback):
    """Measures after the last batch of the last epoch."""

    measured: dict[str, float]

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: object) -> None:
        """Count, while gradients and the optimizer's state are there."""
        if trainer.current_epoch == trainer.max_epochs - 1:
            trim()
            self.measured = {"resident": status("VmRSS"), "counted": tensor_bytes()}
            with tempfile.TemporaryDirectory() as folder:
                trainer.save_checkpoint(Path(folder) / "last.ckpt")
                self.measured["checkpoint"] = (Path(folder) / "last.ckpt").stat().st_size


class TorchPrune(Callback):
    """A round of `torch.nn.utils.prune` before each epoch."""

    def __init__(self, of: Sequence[tuple[nn.Module, str]]) -> None:
        self.of = of

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prune a part of what remains."""
        prune.global_unstructured(self.of, prune.L1Unstructured, amount=amount())


def training(make: Callable[[Towers], list[Callback]], num_parameters: float) -> Measured:
    """Memory of a run of five epochs of two batches, and the size of its checkpoint."""
    if num_parameters > WARM_UP:
        training(make, WARM_UP)  # whatever is set up on first use
    torch.manual_seed(0)
    towers, watch = Towers(num_parameters), Watch()
    batches = DataLoader(towers.batches(2, 1), batch_size=None)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = Trainer(
            max_epochs=ROUNDS,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
            callbacks=[*make(towers), watch],
        )
        trainer.fit(towers, batches)
    return watch.measured | {"parameters": parameter_bytes(towers)}


def ours(_: Towers, store_components: bool) -> list[Callback]:
    """One event, before the first epoch."""
    modalities = {name: list(patterns) for name, patterns in Towers.modalities.items()}
    return [
        AlterMOMACallback(
            modalities,
            SPARSITY,
            CRITERION,
            OneShot(),
            loader="training",
            figures=False,
            store_components=store_components,
        )
    ]


def model_pruning(towers: Towers, lottery: bool) -> list[Callback]:
    """A round after each epoch."""
    return [
        ModelPruning(
            "l1_unstructured", layers(towers), amount=amount(), use_lottery_ticket_hypothesis=lottery
        )
    ]


def amount() -> float:
    """The share of what remains that each round takes."""
    return 1 - (1 - SPARSITY) ** (1 / ROUNDS)


CASES: dict[str, Callable[[float], Measured]] = {
    "forward and backward": partial(scoring, partial(bare, adam=False)),
    "with Adam": partial(scoring, partial(bare, adam=True)),
    "event": partial(scoring, partial(event, CRITERION)),
    "dense": partial(training, lambda _: []),
    "ours": partial(training, partial(ours, store_components=False)),
    "ours, components stored": partial(training, partial(ours, store_components=True)),
    "ModelPruning": partial(training, partial(model_pruning, lottery=True)),
    "ModelPruning, no lottery": partial(training, partial(model_pruning, lottery=False)),
    "torch.nn.utils.prune": partial(training, lambda towers: [TorchPrune(layers(towers))]),
}
TRAINING = list(CASES)[4:]
TARGETS = {"ours": 1 / 32}


def status(field: str) -> float:
    """Bytes of a field of this process's status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * float(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def trim() -> None:
    """Give back to the system what is free."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def tensor_bytes() -> float:
    """Bytes of all tensors that are alive, memory that several share counted once."""
    storages = {}
    for each in gc.get_objects():
        # Some have no memory: those of lazy layers, of meta devices, and those that tracing leaves behind.
        if issubclass(type(each), Tensor) and not is_lazy(each):
            with suppress(RuntimeError):
                storage = each.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return float(sum(storages.values()))


def parameter_bytes(towers: Towers) -> float:
    """Bytes of the weights."""
    return float(sum(p.numel() * p.element_size() for p in towers.parameters()))


if __name__ == "__main__":
    main()
