"""Detections and ground truth as rows, for the tests of the nuScenes metrics."""

import random

import torch

from altermoma_pl.metrics import NUSCENES_CLASSES, NuScenesDetection

UNKNOWN = (float("nan"), float("nan"))


def detection(x, y, score=0.5, c=0, frame=0, size=(4.0, 2.0, 1.5), yaw=0.0, velocity=(0.0, 0.0), attribute=0):
    return {"box": (x, y, 0.5, *size, yaw, *velocity), "score": score, "c": c, "frame": frame, "a": attribute}


def truth(x, y, c=0, frame=0, points=1, **other):
    return detection(x, y, c=c, frame=frame, **other) | {"points": points}


def column(rows, key, dtype=torch.int64):
    return torch.tensor([row[key] for row in rows], dtype=dtype)


def arguments(found, goals, attributes=True):
    """What `update` takes, by name."""

    def boxes(rows):
        return column(rows, "box", torch.float32).reshape(-1, 9)

    return {
        "boxes": boxes(found),
        "scores": column(found, "score", torch.float32),
        "classes": column(found, "c"),
        "frames": column(found, "frame"),
        "target_boxes": boxes(goals),
        "target_classes": column(goals, "c"),
        "target_frames": column(goals, "frame"),
        "target_points": column(goals, "points"),
        "attributes": column(found, "a") if attributes else None,
        "target_attributes": column(goals, "a") if attributes else None,
    }


def evaluate(found, goals, *classes, attributes=True, **options):
    """A metric that saw one update."""
    metric = NuScenesDetection(classes or NUSCENES_CLASSES, attributes=attributes, **options)
    metric.update(**arguments(found, goals, attributes))
    return metric


def scene(seed, frames=6):
    """All classes and rules: coarse positions and scores for ties, boxes out of range, unknown values.

    Everything is a multiple of 1/64, so that single and double precision agree on every comparison.
    """
    rng = random.Random(seed)

    def coarse(value, steps=8):
        return round(value * steps) / steps

    def goal(c, frame):
        reach = NUSCENES_CLASSES[c].max_range * 0.8
        velocity = UNKNOWN if rng.random() < 0.1 else (coarse(rng.gauss(0, 2)), coarse(rng.gauss(0, 2)))
        return truth(
            coarse(rng.uniform(-reach, reach)),
            coarse(rng.uniform(-reach, reach)),
            c,
            frame,
            points=rng.choice([0, 1, 2, 9, 9, 9]),
            size=tuple(coarse(rng.uniform(0.5, 5)) for _ in range(3)),
            yaw=coarse(rng.uniform(-4, 4), 64),
            velocity=velocity,
            attribute=rng.choice([-1, 0, 1, 2]),
        )

    def guess(row, spread):
        x, y, _, *size, yaw, vx, vy = row["box"]
        velocity = (0.0, 0.0) if vx != vx else (vx + coarse(rng.gauss(0, 1)), vy + coarse(rng.gauss(0, 1)))
        return detection(
            x + coarse(rng.gauss(0, spread)),
            y + coarse(rng.gauss(0, spread)),
            rng.randint(1, 20) / 32,
            row["c"],
            row["frame"],
            size=tuple(coarse(side * rng.uniform(0.8, 1.4)) for side in size),
            yaw=yaw + coarse(rng.gauss(0, 0.7), 64),
            velocity=velocity,
            attribute=rng.choice([-1, 0, 1, 2]),
        )

    numbers = [(c, frame) for frame in range(frames) for c in range(10) for _ in range(rng.randint(0, 6))]
    goals = [goal(c, frame) for c, frame in numbers]
    found = [guess(row, rng.choice([0.2, 0.6, 3])) for row in goals for _ in range(rng.choice([0, 1, 1, 2]))]
    return found, goals
