"""Out of memory while scoring: what the user can do about it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_TEXTS = ("out of memory", "defaultcpuallocator", "not enough memory", "cublas_status_alloc_failed")


@contextmanager
def memory_advice() -> Iterator[None]:
    """Add to an error of the allocator that it came while scoring, and what helps.

    Raises:
        torch.OutOfMemoryError, MemoryError, RuntimeError: The kind of the original, which is the cause, with
            its text within, so that tools which look for it (Lightning's `is_oom_error`) still do.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        kind = next(k for k in (torch.OutOfMemoryError, MemoryError, RuntimeError) if isinstance(error, k))
        raise kind(
            f"out of memory while scoring weights; the model is as it was before. Score on smaller batches: "
            f"define `calibration_dataloader()` on the datamodule or the LightningModule with a smaller "
            f"batch_size; or choose a criterion that needs fewer copies of the weights, such as Taylor() or "
            f"Magnitude(). The original error: {str(error) or type(error).__name__}"
        ) from error


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return any(text in str(error).lower() for text in _TEXTS)
