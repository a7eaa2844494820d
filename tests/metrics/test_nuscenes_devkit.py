"""The nuScenes metrics are those of nuscenes-devkit 1.2.0.

The devkit needs numpy < 2 and is therefore no dependency of the tests; its results on three scenes
stand below, and where it is installed the comparison is made on many.
"""

import math
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from altermoma_pl.metrics import NUSCENES_CLASSES
from tests.helpers.nuscenes_scenes import evaluate, scene

ERRORS = {
    "ate": "trans_err",
    "ase": "scale_err",
    "aoe": "orient_err",
    "ave": "vel_err",
    "aae": "attr_err",
}
OFFICIAL = {  # seed: nds, map, ate, ase, aoe, ave, aae
    0: (0.2678424, 0.1956364, 0.5898948, 0.3632413, 0.5217092, 1.2391306, 0.8249129),
    1: (0.2949227, 0.2774249, 0.6204385, 0.3490487, 0.6114352, 1.1863624, 0.8569750),
    2: (0.3189825, 0.2871979, 0.6144251, 0.3265888, 0.5927201, 1.2866762, 0.7124307),
}


def devkit_boxes(rows, box_type, container, attribute_names):
    """EvalBoxes of rows; the origin is the vehicle."""
    boxes = container()
    for token in map(str, range(6)):
        boxes.add_boxes(token, [])
    for row in rows:
        x, y, z, *size, yaw, vx, vy = row["box"]
        box = box_type(
            sample_token=str(row["frame"]),
            translation=(x, y, z),
            size=tuple(size),
            rotation=(math.cos(yaw / 2), 0.0, 0.0, math.sin(yaw / 2)),
            velocity=(vx, vy),
            ego_translation=(x, y, z),
            num_pts=row.get("points", -1),
            detection_name=NUSCENES_CLASSES[row["c"]].name,
            detection_score=row["score"],
            attribute_name="" if row["a"] < 0 else attribute_names[row["a"]],
        )
        boxes.add_boxes(box.sample_token, [box])
    return boxes


def devkit_metrics(found, goals):
    """Filter and evaluate as `nuscenes.eval.detection.evaluate.DetectionEval` does, without its tables."""
    pytest.importorskip("nuscenes", reason="needs nuscenes-devkit: pip install 'altermoma-pl[nuscenes]'")
    from nuscenes.eval.common.data_classes import EvalBoxes
    from nuscenes.eval.common.loaders import filter_eval_boxes
    from nuscenes.eval.detection.algo import accumulate, calc_ap, calc_tp
    from nuscenes.eval.detection.config import config_factory
    from nuscenes.eval.detection.constants import ATTRIBUTE_NAMES
    from nuscenes.eval.detection.data_classes import DetectionBox, DetectionMetrics

    config = config_factory("detection_cvpr_2019")
    no_racks = SimpleNamespace(get=lambda table, token: {"anns": []})
    guesses, truths = (
        filter_eval_boxes(
            no_racks, devkit_boxes(rows, DetectionBox, EvalBoxes, ATTRIBUTE_NAMES), config.class_range
        )
        for rows in (found, goals)
    )
    metrics = DetectionMetrics(config)
    for name in config.class_names:
        for limit in config.dist_ths:
            data = accumulate(truths, guesses, name, config.dist_fcn_callable, limit)
            metrics.add_label_ap(name, limit, calc_ap(data, config.min_recall, config.min_precision))
            if limit == config.dist_th_tp:
                at_error_distance = data
        for error in ERRORS.values():
            still = name in ("traffic_cone", "barrier") and error in ("vel_err", "attr_err")
            unturned = name == "traffic_cone" and error == "orient_err"
            value = math.nan if still or unturned else calc_tp(at_error_distance, config.min_recall, error)
            metrics.add_label_tp(name, error, value)
    return metrics


@pytest.mark.parametrize("seed", OFFICIAL)
def test_equals_the_stored_results_of_the_devkit(seed):
    values = torch.stack(list(evaluate(*scene(seed)).compute().values()))
    assert_close(values, torch.tensor(OFFICIAL[seed]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("seed", range(20))
def test_equals_the_devkit(seed):
    found, goals = scene(seed)
    official = devkit_metrics(found, goals)
    metric = evaluate(found, goals)

    expected = {"nds": official.nd_score, "map": official.mean_ap}
    expected |= {ours: official.tp_errors[theirs] for ours, theirs in ERRORS.items()}
    expected = {name: torch.tensor(value, dtype=torch.float32) for name, value in expected.items()}
    assert_close(metric.compute(), expected, atol=1e-6, rtol=0)

    names = [entry.name for entry in NUSCENES_CLASSES]
    classes = {"ap": [official.mean_dist_aps[name] for name in names]}
    classes |= {
        ours: [official.get_label_tp(name, theirs) for name in names] for ours, theirs in ERRORS.items()
    }
    classes = {name: torch.tensor(values, dtype=torch.float32) for name, values in classes.items()}
    assert_close(metric.per_class(), classes, atol=1e-6, rtol=0, equal_nan=True)
