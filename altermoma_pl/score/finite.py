"""Losses and gradients that are infinite or not a number."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from altermoma_pl.model.distributed import local

OnNonFinite = Literal["raise", "skip"]
"""What happens with a batch whose loss or gradient is infinite or not a number."""


class NonFiniteError(ValueError):
    """The loss of a batch, or a gradient of it, is infinite or not a number."""


def check_loss(label: str, loss: Tensor) -> None:
    """Raise a `NonFiniteError` that names the batch if its loss is not finite."""
    if not torch.isfinite(loss):
        raise NonFiniteError(
            f"the loss of {label} is {loss.item()}: check the batch, or lower the learning rate "
            f"of the criterion if it happened after steps of training; on_nonfinite='skip' leaves such "
            f"batches out"
        )


def check_gradients(label: str, gradients: Mapping[str, Tensor]) -> None:
    """Raise a `NonFiniteError` that names batch and parameter if a gradient is not finite."""
    if not gradients:
        return
    # One reading and one transfer; a sum may overflow, hence the second look.
    sums = torch.stack([local(g).detach().sum() for g in gradients.values()])
    if torch.isfinite(sums).all():
        return
    for name, gradient in gradients.items():
        if not torch.isfinite(local(gradient)).all():
            raise NonFiniteError(
                f"the gradient of {name!r} on {label} is not finite; on_nonfinite='skip' leaves such "
                f"batches out"
            )
