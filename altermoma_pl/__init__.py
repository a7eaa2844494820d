"""Fusion redundancy pruning for multi-sensor models trained with PyTorch Lightning."""
