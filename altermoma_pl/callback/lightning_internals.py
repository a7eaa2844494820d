"""All that reaches into Lightning beyond its documented interface; read in 2.6.6, and the same in 2.5.0."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import nn, optim

from altermoma_pl.score.calibration import Progress

# The Trainer.


def callbacks_of(trainer: Any) -> list[Callback]:
    """All callbacks of a Trainer: it gets the attribute from elsewhere, so that its type is not known."""
    return list(trainer.callbacks)


def is_trial(trainer: Trainer) -> bool:
    """Whether this is a `fast_dev_run`."""
    return bool(getattr(trainer, "fast_dev_run", False))


# Batches.


def validation_loaders(trainer: Trainer) -> Any:
    """The validation loaders, loaded as before the first validation; None if the Trainer has none."""
    # Asked to load where it does not validate, Lightning leaves DataLoader patched.
    if trainer.val_dataloaders is None and trainer.enable_validation:
        trainer.validating = True
        try:
            trainer.fit_loop.epoch_loop.val_loop.setup_data()
        finally:
            trainer.training = True
    return trainer.val_dataloaders


def to_device(trainer: Trainer, batch: Any) -> Any:
    """What the training loop does to a batch before training_step."""
    batch = trainer.precision_plugin.convert_input(batch)
    datamodule = getattr(trainer, "datamodule", None)
    hook = "on_before_batch_transfer"
    own = datamodule is not None and _is_own(datamodule, hook)
    owner: Any = datamodule if own else trainer.lightning_module
    return trainer.strategy.batch_to_device(owner.on_before_batch_transfer(batch, 0), dataloader_idx=0)


# The module.

_BY_ELEMENT = (
    optim.SGD, optim.Adam, optim.AdamW, optim.Adamax, optim.NAdam, optim.RAdam, optim.Adagrad,
    optim.Adadelta, optim.RMSprop, optim.Rprop, optim.ASGD,
)  # fmt: skip
_GRADIENT_HOOKS = ("on_after_backward", "on_before_optimizer_step")
_NOT_OWN = ("lightning", "pytorch_lightning", "altermoma_pl")


@contextmanager
def log_silenced(module: nn.Module) -> Iterator[None]:
    """Make `log` and `log_dict` of the module and of those inside it do nothing.

    Most hooks refuse `self.log`, and the others would add to the run's metrics what is logged while scoring.
    """
    loggers = [m for m in module.modules() if callable(getattr(m, "log_dict", None))]
    saved: list[dict[str, Any]] = [
        {name: vars(m)[name] for name in ("log", "log_dict") if name in vars(m)} for m in loggers
    ]
    for each in loggers:
        vars(each)["log"] = vars(each)["log_dict"] = lambda *_, **__: None
    try:
        yield
    finally:
        for each, old in zip(loggers, saved, strict=True):
            del vars(each)["log"], vars(each)["log_dict"]
            vars(each).update(old)


def reads_gradients(trainer: Trainer, module: LightningModule) -> bool:
    """Whether gradients of pruned weights must be set to zero after each backward pass.

    A pruned weight is set to zero after the step, whatever its gradient was. The gradient matters only
    to what takes many together: clipping by norm, a hook that measures them, an optimizer that does more
    than each weight for itself (a trust ratio, factored moments). Only where there is none of these a
    pass over all gradients is saved.
    """
    module_hooks = (*_GRADIENT_HOOKS, "configure_gradient_clipping", "optimizer_step")
    return (
        not module.automatic_optimization  # the user's code may do anything between backward and step
        or bool(trainer.gradient_clip_val)
        or any(_is_own(module, hook) for hook in module_hooks)
        or any(_is_own(callback, hook) for callback in callbacks_of(trainer) for hook in _GRADIENT_HOOKS)
        or any(type(optimizer) not in _BY_ELEMENT for optimizer in trainer.optimizers)
    )


def _is_own(owner: Any, name: str) -> bool:
    """Whether a hook is defined outside Lightning (either namespace) and outside this package."""
    definers = [cls for cls in type(owner).__mro__ if name in vars(cls)]
    own = bool(definers) and definers[0].__module__.partition(".")[0] not in _NOT_OWN
    return own or name in vars(owner)


# Signals and checkpoints at the start of an epoch, where events are.

# Lightning only notes the first, the second must stop the event, the third is the loaders'.
_NOT_HELD = {signal.SIGTERM, signal.SIGINT, getattr(signal, "SIGCHLD", None)}


@contextmanager
def signals_held() -> Iterator[None]:
    """Handle signals on exit instead of at once, where Python handles them.

    A handler may save a checkpoint, as Lightning's does on SLURM before it puts the job in the queue
    again; inside an event it would save a model with a modality switched off.
    """
    held: set[int] = set()

    def note(number: int, frame: FrameType | None) -> None:
        held.add(number)

    handlers: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        found = {number: signal.getsignal(number) for number in signal.valid_signals() - _NOT_HELD}
        handlers = {number: handler for number, handler in found.items() if callable(handler)}
    for number in handlers:
        signal.signal(number, note)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number in held:
            signal.raise_signal(number)


def resume_with_first_batch(checkpoint: dict[str, Any]) -> None:
    """Make a checkpoint that is saved at the start of an epoch, as after an error in an event, resume there.

    Until the first batch Lightning's counts say that all batches are done, those of the epoch before, and
    whoever resumes from them skips the epoch.
    """
    if "loops" not in checkpoint:
        return  # weights alone
    loop = checkpoint["loops"]["fit_loop"]
    epochs, batches = loop["epoch_progress"]["current"], loop["epoch_loop.batch_progress"]
    if epochs["started"] < epochs["ready"]:
        batches["current"] = dict.fromkeys(batches["current"], 0)
        batches["is_last_batch"] = False


# Progress bars.


def print_beside_bar(trainer: Trainer, text: str) -> None:
    """As `LightningModule.print`, which fails beside progress bars that derive from the plain class."""
    bar = trainer.progress_bar_callback
    if bar is not None and getattr(bar, "is_enabled", False):
        bar.print(text)
    else:
        sys.stdout.write(text + "\n")


@contextmanager
def scoring_bar(trainer: Trainer) -> Iterator[Progress]:
    """A bar that restarts with each phase; nothing is shown where the Trainer shows no bar.

    Yields:
        A function of the phase, its batches done and their total, if known. It raises `SIGTERMException`
        after a SIGTERM, which Lightning only notes: who sends it does not wait for the end of an event.
    """
    bar = trainer.progress_bar_callback
    begin: Callable[[str, int | None], AbstractContextManager[Callable[[int], object]]] | None = None
    if isinstance(bar, RichProgressBar) and bar.progress is not None:
        begin = partial(_rich_task, bar.progress)
    elif isinstance(bar, TQDMProgressBar) and bar.is_enabled:
        begin = _tqdm_bar
    shown: dict[str, Callable[[int], object]] = {}  # the present phase -> what is told of its batches

    def progress(phase: str, done: int, total: int | None) -> None:
        # One of several processes must not leave the others waiting; Lightning stops them together.
        if trainer.received_sigterm and trainer.world_size == 1:
            raise SIGTERMException
        if begin is None:
            return
        if phase not in shown:
            bars.close()
            shown.clear()
            shown[phase] = bars.enter_context(begin(f"Scoring: {phase}", total))
        shown[phase](done)

    with ExitStack() as bars:
        yield progress


@contextmanager
def _tqdm_bar(text: str, total: int | None) -> Iterator[Callable[[int], object]]:
    with Tqdm(desc=text, total=total, leave=False, file=sys.stdout) as bar:
        yield lambda done: bar.update(done - bar.n)


@contextmanager
def _rich_task(progress: Any, text: str, total: int | None) -> Iterator[Callable[[int], object]]:
    # Lightning's columns need a total; infinity is what it uses for an unknown one.
    task = progress.add_task(text, total=float("inf") if total is None else total)
    try:
        yield lambda done: progress.update(task, completed=done, refresh=True)
    finally:
        progress.remove_task(task)
