"""The Lightning callbacks: one scores, masks and keeps zeros zero; one trains on without them."""

from altermoma_pl.callback.callback import AlterMOMACallback
from altermoma_pl.callback.checkpoints import Slimmed

__all__ = ["AlterMOMACallback", "Slimmed"]
