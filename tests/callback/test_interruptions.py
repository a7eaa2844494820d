"""Signals, dead workers and full memory while scoring: the model is as it was, and the run can go on."""

import os
import signal
import threading
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from lightning.pytorch.utilities.memory import is_oom_error
from torch import multiprocessing
from torch.utils.data import DataLoader, Dataset, get_worker_info

from altermoma_pl import OneShot
from altermoma_pl.callback.scoring import memory_advice
from altermoma_pl.callback.state import PruningState
from altermoma_pl.score import SNIP, GraSP, ProsPr
from tests.helpers.lightning_models import (
    Fusion,
    assert_same,
    dataset,
    fit,
    loader,
    num_zeros,
    pruner,
    trainer,
)
from tests.helpers.resuming import KEY
from tests.helpers.spying import NUM_CALLS, Busy, Spy

PASSES = {"contribution": 0, "deactivated": 2, "reactivation": 5, "reactivated": 7, "last": NUM_CALLS - 1}
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*was called without a model. The last model of the previous"),
    pytest.mark.filterwarnings("ignore:.*is set, but there is no last checkpoint available"),
]


class Interrupted(Busy):
    """Does something in the given call of its loss while scoring; None for never."""

    def __init__(self, call: int | None, action: Any) -> None:
        super().__init__()
        self.lidar[2].p = 0.0  # Lightning's checkpoints do not hold the state of the global generators
        self.call, self.action, self.calls = call, action, Calls()

    def pruning_loss(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.calls.count += 1
        if self.calls.count - 1 == self.call:
            self.action()
        return super().training_step(batch, batch_idx)


class Calls:
    """A count that scoring does not bring back, as it would a number of the module's own."""

    count = 0


def raises(error: BaseException) -> Any:
    def action() -> None:
        raise error

    return action


def sends(number: signal.Signals) -> Any:
    return lambda: signal.raise_signal(number)


def interrupted(module: Any, error: Any, callback: Any, *more: Callback, **options: Any) -> BaseException:
    """Fit, which raises while scoring before epoch 1 and leaves everything as it was; returns the error."""
    before, after = Spy(1), Spy(1)
    with pytest.raises(error) as caught:
        fit(module, before, callback, after, *more, **options)
    assert callback.events == []
    assert callback.masks.sparsity == 0
    assert len(before.taken) == 2
    assert_same(after.taken, before.taken[:1])
    return caught.value


# Signals.


@pytest.fixture(scope="module")
def whole():
    """What comes out of a run that nothing interrupts."""
    return went_on(None)


def went_on(checkpoint: Any) -> dict[str, Any]:
    """What comes out of a run from the checkpoint, or from the start if None."""
    module, callback = Interrupted(None, None), pruner()
    torch.manual_seed(3)
    ran = trainer(callback)
    ran.fit(module, loader(), loader(seed=1), ckpt_path=checkpoint)
    assert num_zeros(module) == 60
    state = callback.state_dict()
    return {"weights": module.state_dict(), "state": state, "optimizer": ran.optimizers[0].state_dict()}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("call", PASSES.values(), ids=PASSES)
def test_a_signal_in_scoring(call, number, tmp_path, whole):
    module, callback, saving = Interrupted(call, sends(number)), pruner(), OnExceptionCheckpoint(tmp_path)
    interrupted(module, SystemExit, callback, saving, enable_checkpointing=True)
    assert module.calls.count == call + 1  # it does not wait for the end of the event
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)
    checkpoint = torch.load(saving.ckpt_path, weights_only=True)
    assert PruningState.from_state_dict(checkpoint["callbacks"][KEY]).masks.sparsity == 0
    assert_same(went_on(saving.ckpt_path), whole)


def test_a_checkpoint_that_is_saved_by_hand_after_an_interrupt(tmp_path, whole):
    module, callback = Interrupted(5, raises(KeyboardInterrupt())), pruner()
    torch.manual_seed(3)
    ran = trainer(callback)
    with pytest.raises(SystemExit):
        ran.fit(module, loader(), loader(seed=1))
    ran.save_checkpoint(tmp_path / "by_hand.ckpt")
    assert_same(went_on(tmp_path / "by_hand.ckpt"), whole)


@pytest.mark.parametrize("after_record", [False, True])
def test_an_interrupt_between_record_and_mask(after_record, tmp_path, monkeypatch):
    record = PruningState.record

    def interrupts(self: Any, *args: Any) -> None:
        if after_record:
            record(self, *args)
        raise KeyboardInterrupt

    monkeypatch.setattr(PruningState, "record", interrupts)
    saving = OnExceptionCheckpoint(tmp_path)
    with pytest.raises(SystemExit):
        fit(Fusion(), pruner(), saving, enable_checkpointing=True)
    monkeypatch.undo()
    assert_weights_and_masks_agree(saving.ckpt_path, 0)  # the record is taken up as a whole, or not


def test_an_interrupt_between_a_step_and_its_hook(tmp_path):
    def interrupts(optimizer: Any, *_: Any) -> None:
        if module.trainer.current_epoch == 2:
            with torch.no_grad():
                module.head.weight.add_(1.0)  # an optimizer that moves pruned weights
            raise KeyboardInterrupt

    class Hooked(Fusion):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            optimizer.register_step_post_hook(interrupts)
            return optimizer

    module, saving = Hooked("sgd"), OnExceptionCheckpoint(tmp_path)
    with pytest.raises(SystemExit):
        fit(module, pruner(), saving, enable_checkpointing=True)
    assert_weights_and_masks_agree(saving.ckpt_path, 60)


def assert_weights_and_masks_agree(path: str, zeros: int) -> None:
    checkpoint = torch.load(path, weights_only=True)
    plain = Fusion()
    plain.load_state_dict(checkpoint["state_dict"], strict=False)
    masks = PruningState.from_state_dict(checkpoint["callbacks"][KEY]).masks
    assert num_zeros(plain) == zeros
    assert all(torch.equal(plain.get_parameter(name) != 0, mask) for name, mask in masks.items())


def test_a_signal_whose_handler_saves_waits_for_the_end_of_the_event(tmp_path, whole):
    """As Lightning's does on SLURM before it puts the job in the queue again."""
    path, ran = tmp_path / "hpc.ckpt", []
    previous = signal.signal(signal.SIGUSR1, lambda *_: ran[0].save_checkpoint(path))
    module, callback = Interrupted(5, sends(signal.SIGUSR1)), pruner()
    try:
        torch.manual_seed(3)
        ran.append(trainer(callback))
        ran[0].fit(module, loader(), loader(seed=1))
        handler = signal.getsignal(signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, previous)
    assert handler.__name__ == "<lambda>"
    assert_weights_and_masks_agree(path, 60)
    assert_same(went_on(path), whole)


def test_a_fit_in_a_thread_holds_no_signals():
    callback = pruner()
    thread = threading.Thread(target=fit, args=(Fusion(), callback))
    thread.start()
    thread.join()
    assert callback.masks.num_kept == 60


# Workers.


class Mortal(Dataset[Any]):
    """Ends the worker process that reads its second batch, once `doomed` is set."""

    def __init__(self, seed: int) -> None:
        self.data, self.doomed = dataset(seed=seed), multiprocessing.Value("b", 0)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        if self.doomed.value and index == 9 and get_worker_info() is not None:
            os._exit(1)
        return self.data[index]


@pytest.mark.parametrize("which", ["probe", "training"])
def test_a_worker_dies_while_scoring(which):
    train, val = Mortal(0), Mortal(1)
    dies = {"probe": val, "training": train}[which]
    module, callback = Interrupted(0, lambda: setattr(dies.doomed, "value", 1)), pruner()
    loaders = {"train": DataLoader(train, 8, num_workers=1), "val": loader(seed=1)}
    loaders[{"probe": "val", "training": "train"}[which]] = DataLoader(dies, 8, num_workers=1)
    error = interrupted(module, RuntimeError, callback, **loaders)
    assert "DataLoader worker" in str(error)
    assert 1 < module.calls.count < NUM_CALLS
    dies.doomed.value = 0
    module.train()
    fit(module, callback, **loaders)
    assert [event["epoch"] for event in callback.events] == [1]
    assert num_zeros(module) == 60


# Memory.

CPU = "[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"
FULL = {
    "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "cpu": RuntimeError(CPU),
    "cpu_windows": RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
    "python": MemoryError(),
}


@pytest.mark.parametrize("error", FULL.values(), ids=FULL)
@pytest.mark.parametrize("call", PASSES.values(), ids=PASSES)
def test_out_of_memory_in_scoring(call, error):
    raised = interrupted(Interrupted(call, raises(error)), type(error), pruner())
    assert type(raised) is type(error)
    assert raised.__cause__ is error
    assert str(raised).startswith("out of memory while scoring weights; the model is as it was before. Score")
    assert "define `calibration_dataloader()`" in str(raised)
    assert "choose a criterion that needs fewer copies" in str(raised)
    assert str(raised).endswith(str(error) or "MemoryError")
    assert is_oom_error(raised) == is_oom_error(error)


@pytest.mark.parametrize("criterion", [SNIP(), GraSP(num_probe_batches=2), ProsPr(num_probe_batches=2)])
@pytest.mark.filterwarnings("ignore:64 probe batches were asked for")
def test_out_of_memory_with_other_criteria(criterion):
    module = Interrupted(1, raises(FULL["cuda"]))
    interrupted(module, torch.OutOfMemoryError, pruner(criterion=criterion))


def test_after_out_of_memory_a_smaller_batch_helps():
    class Hungry(Fusion):
        def pruning_loss(self, batch: Any, batch_idx: int) -> torch.Tensor:
            if len(batch[0]) > 8:
                torch.empty(2**60)
            return self.loss(batch)

    module, callback = Hungry(), pruner(schedule=OneShot(0))
    with pytest.raises(RuntimeError, match="out of memory while scoring weights"):
        fit(module, callback, val=loader(batch_size=16))
    module.calibration_dataloader = lambda: loader(batch_size=8)
    fit(module, callback, val=loader(batch_size=16))
    assert num_zeros(module) == 60


@pytest.mark.parametrize("error", [RuntimeError("in the step"), RuntimeError(3), KeyError("memory")])
def test_other_errors_are_left_alone(error):
    with pytest.raises(type(error)) as caught, memory_advice():
        raise error
    assert caught.value is error
    assert caught.value.__cause__ is None
