"""A module that a step changes in every way, and all of it copied while it trains."""

import copy
import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback
from torchmetrics import MeanMetric

from tests.helpers.lightning_models import Fusion

# Losses of an event of `pruner`: probes; for each modality probes, reactivation steps, probes.
NUM_CALLS = 2 + 2 * (2 + 2 + 2)


class Busy(Fusion):
    """Has everything that a step could change: a metric, counters, lists, buffers, a frozen norm."""

    def __init__(self, optimizer: str = "adamw") -> None:
        super().__init__(optimizer)
        self.mean = MeanMetric()
        self.register_buffer("seen", torch.zeros(()))
        self.losses: list[float] = []
        self.counters = {"steps": 0}
        self.count = 0
        self.camera[3].bias.requires_grad_(False)

    def on_train_epoch_start(self) -> None:
        self.camera[1].eval()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.mean.update(loss.detach())
        self.log("mean", self.mean)
        self.log_dict({"again": loss}, prog_bar=True)
        self.seen += 1
        self.losses.append(loss.item())
        self.counters["steps"] += 1
        self.count += 1
        np.random.rand()
        random.random()
        self.lidar.eval()
        self.lidar.train()
        return loss


def snapshot(ran: Any, module: Any) -> dict[str, Any]:
    """All that scoring could have touched, copied."""
    return copy.deepcopy(
        {
            "parameters": {n: p.detach() for n, p in module.named_parameters()},
            "requires_grad": [p.requires_grad for p in module.parameters()],
            "gradients": {n: p.grad for n, p in module.named_parameters() if p.grad is not None},
            "buffers": dict(module.named_buffers()),
            "training": {n: m.training for n, m in module.named_modules()},
            "metric": [module.mean.metric_state, module.mean.update_count],
            "own": [module.losses, module.counters, module.count],
            "attributes": {n: sorted(vars(m)) for n, m in module.named_modules()},
            "optimizer": ran.optimizers[0].state_dict(),
            "loops": ran.fit_loop.state_dict(),
            "counts": [ran.global_step, ran.current_epoch, ran.training, ran.validating],
            "torch": torch.get_rng_state(),
            "numpy": list(np.random.get_state()),
            "random": random.getstate(),
            "logged": [dict(ran.callback_metrics), dict(ran.logged_metrics), dict(ran.progress_bar_metrics)],
            "modes": [torch.is_grad_enabled(), torch.is_inference_mode_enabled()],
        }
    )


class Spy(Callback):
    """Takes a snapshot when its hooks run: before the pruner's if it comes first."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.taken: list[dict[str, Any]] = []

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == self.epoch:
            self.taken.append(snapshot(trainer, pl_module))

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.taken.append(snapshot(trainer, pl_module))
