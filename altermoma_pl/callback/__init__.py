"""The Lightning callback: decides when to score and mask, and keeps zeros zero."""

from altermoma_pl.callback.callback import AlterMOMACallback

__all__ = ["AlterMOMACallback"]
