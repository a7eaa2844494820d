"""Running statistics of batch norm, measured anew: those of a pruned model are not those of the dense one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from altermoma_pl.model.contexts import modes_restored


@torch.no_grad()
def recalibrate_(model: nn.Module, batches: Iterable[Any], forward: Callable[[nn.Module, Any], Any]) -> int:
    """Set running means and variances of batch norms to the mean over batches, in place; nothing is trained.

    Args:
        model: All else but its batch norms runs in evaluation mode meanwhile.
        batches: Some training batches; ten were enough elsewhere (openvinotoolkit/nncf#41).
        forward: Runs the model on a batch.

    Returns:
        The number of batches.

    Raises:
        ValueError: If no layer has running statistics, or there is no batch.
    """
    kind = nn.modules.batchnorm._BatchNorm
    norms = [m for m in model.modules() if isinstance(m, kind) and m.running_mean is not None]
    if not norms:
        raise ValueError(f"{type(model).__name__} has no batch norm with running statistics to measure anew")
    momenta = {norm: norm.momentum for norm in norms}
    count = 0
    try:
        with modes_restored(model):
            model.eval()
            for norm in norms:
                norm.train()
                norm.momentum = None  # the mean over all batches, rather than a moving one
            for batch in batches:
                if count == 0:
                    for norm in norms:
                        norm.reset_running_stats()
                forward(model, batch)
                count += 1
    finally:
        for norm, momentum in momenta.items():
            norm.momentum = momentum
    if count == 0:
        raise ValueError("there is no batch to measure running statistics on")
    return count
