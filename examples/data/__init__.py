"""Driving data: a synthetic generator and a KITTI reader that yield the same `Batch`."""
