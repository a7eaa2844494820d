"""Metrics with list states on several processes, of which one may have no data."""

import pytest
from torch.testing import assert_close

from altermoma_pl.metrics import CentreDistanceAP, NuScenesDetection
from tests.helpers.nuscenes_scenes import arguments, scene

METRICS = {CentreDistanceAP: lambda: CentreDistanceAP(10), NuScenesDetection: NuScenesDetection}


def fed(kind, seed):
    values = arguments(*scene(seed))
    if kind is CentreDistanceAP:
        sides = ("boxes", "scores", "classes", "frames", "target_boxes", "target_classes", "target_frames")
        renamed = {"boxes": "centres", "target_boxes": "target_centres"}
        values = {renamed.get(name, name): values[name] for name in sides}
    metric = METRICS[kind]()
    metric.update(**values)
    return metric


def table(metric):
    """Values per class of the states as they are, without synchronising again."""
    return metric._ap() if isinstance(metric, CentreDistanceAP) else metric._table()


def gathered(metrics):
    """The first metric after torchmetrics synchronised it with the others, as if they were processes."""
    sent = [[] for _ in metrics]
    for metric, own in zip(metrics, sent, strict=True):
        metric.sync(
            dist_sync_fn=lambda tensor, group, own=own: own.append(tensor) or [tensor],
            distributed_available=lambda: True,
        )
        metric.unsync()
    rounds = list(zip(*sent, strict=True))
    for tensors in rounds:  # what a communication backend needs
        assert len({(tensor.dtype, tensor.ndim) for tensor in tensors}) == 1
    answers = iter(rounds)
    metrics[0].sync(
        dist_sync_fn=lambda tensor, group: list(next(answers)), distributed_available=lambda: True
    )
    return metrics[0]


@pytest.mark.parametrize("kind", METRICS)
def test_a_process_without_updates_changes_nothing(kind):
    together = gathered([fed(kind, 0), METRICS[kind]()])
    assert_close(table(together), table(fed(kind, 0)), equal_nan=True)


@pytest.mark.parametrize("kind", METRICS)
def test_two_processes_are_one(kind):
    both = fed(kind, 0)
    both.merge_state(fed(kind, 1))
    assert_close(table(gathered([fed(kind, 1), fed(kind, 0)])), table(both), equal_nan=True)


@pytest.mark.parametrize("kind", METRICS)
def test_no_process_has_data(kind):
    together = gathered([METRICS[kind](), METRICS[kind]()])
    assert_close(table(together), table(METRICS[kind]()), equal_nan=True)
