"""The fusion model in plain torch, and its Lightning module."""
