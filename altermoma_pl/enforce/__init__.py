"""Keeps pruned weights at zero while training goes on; knows nothing of scores."""
