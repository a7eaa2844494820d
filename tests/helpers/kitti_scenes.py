"""Small scenes for the tests of KITTI's AP, and the benchmark's rules as plain loops."""

from dataclasses import dataclass, replace

import numpy as np
import torch

from altermoma_pl.metrics import KittiDetections, KittiTargets, kitti_types
from altermoma_pl.metrics.kitti_rules import overlaps

CLASSES = ("Car", "Pedestrian", "Cyclist")
LEVELS = ("easy", "moderate", "hard")
LIMITS = {
    "2d": (0.7, 0.5, 0.5),
    "bev": (0.7, 0.5, 0.5),
    "3d": (0.7, 0.5, 0.5),
    "bev_loose": (0.5, 0.25, 0.25),
    "3d_loose": (0.5, 0.25, 0.25),
}


@dataclass(frozen=True)
class Thing:
    """An object or a detection: 4 m long, standing side by side with others by `x` in metres."""

    x: float = 0.0
    kind: str = "Car"
    frame: int = 0
    pixels: float = 60.0  # height in the image
    truncation: float = 0.0
    occlusion: int = 0
    score: float = 0.5
    z: float = 20.0
    rotation_y: float = 0.0

    @property
    def box(self):
        if self.kind == "DontCare":
            return [-1, -1, -1, -1000, -1000, -1000, -10]
        return [1.5, 2.0, 4.0, self.x, 1.7, self.z, self.rotation_y]

    @property
    def box2d(self):
        left = 20 * self.x
        return [left, 100, left + 80, 100 + self.pixels]


def detections(*things):
    return KittiDetections(
        torch.tensor([thing.box for thing in things], dtype=torch.float64).reshape(-1, 7),
        torch.tensor([thing.box2d for thing in things], dtype=torch.float64).reshape(-1, 4),
        torch.tensor([thing.score for thing in things]),
        kitti_types(thing.kind for thing in things),
        torch.tensor([thing.frame for thing in things], dtype=torch.int64),
    )


def targets(*things):
    boxes, boxes2d, _, types, frames = detections(*things)
    truncation = torch.tensor([thing.truncation for thing in things])
    occlusion = torch.tensor([thing.occlusion for thing in things])
    return KittiTargets(boxes, boxes2d, truncation, occlusion, types, frames)


def random_scene(seed, num_frames=4):
    """Crowded frames in which everything coarse ties: overlaps, scores, limits of the filters."""
    rng = np.random.default_rng(seed)

    def thing(frame):
        kind = rng.choice([*CLASSES, *CLASSES, "Van", "Person_sitting", "Truck", "DontCare"])
        return Thing(
            x=float(rng.integers(0, 3) * 10 + rng.choice([0, 0, 0.25, 0.5, 1, 1.5, 2.5])),
            kind=str(kind),
            frame=frame,
            pixels=float(rng.choice([20, 25, 26, 40, 41, 60])),
            truncation=float(rng.choice([0, 0, 0.15, 0.2, 0.3, 0.5, 0.6])),
            occlusion=int(rng.choice([0, 0, 1, 2, 3])),
            score=float(rng.integers(1, 9) / 8),
            z=20 + float(rng.choice([0, 0, 0.1, 0.4])),
            rotation_y=float(rng.choice([0, 0, 0.05, np.pi])),
        )

    def perturbed(one):
        """A detection of it, which may be shifted, small in the image or of another kind."""
        kind, pixels = thing(0).kind, float(rng.choice([20, 39, 60]))
        return replace(
            one,
            x=one.x + float(rng.choice([0, 0, 0.25, 0.5, 1])),
            kind=kind if rng.random() < 0.15 else one.kind,
            pixels=pixels if rng.random() < 0.2 else one.pixels,
            score=thing(0).score,
        )

    truths = [thing(frame) for frame in range(num_frames) for _ in range(rng.integers(0, 8))]
    found = [perturbed(one) for one in truths for _ in range(rng.choice([0, 1, 1, 1, 2]))]
    found += [thing(frame) for frame in range(num_frames) for _ in range(rng.integers(0, 3))]
    rng.shuffle(found)
    return [one for one in found if one.kind != "DontCare"], truths


# The rules, read from their description line by line. Only the overlaps are the package's own.


def truth_flag(thing, kind, level):
    neighbours = {("Van", "Car"), ("Person_sitting", "Pedestrian")}
    if thing.kind == kind:
        small = thing.pixels <= (40, 25, 25)[level]
        cut = thing.truncation > (0.15, 0.30, 0.50)[level]
        hidden = thing.occlusion > (0, 1, 2)[level]
        return 1 if small or cut or hidden else 0
    return 1 if (thing.kind, kind) in neighbours else -1


def found_flag(thing, kind, level):
    if thing.pixels < (40, 25, 25)[level]:
        return 1
    return 0 if thing.kind == kind else -1


def in_dont_care(thing, truths, limit):
    left, top, right, bottom = thing.box2d
    for other in truths:
        if other.kind == "DontCare":
            a, b, c, d = other.box2d
            common = max(0, min(right, c) - max(left, a)) * max(0, min(bottom, d) - max(top, b))
            if common / ((right - left) * (bottom - top)) > limit:
                return True
    return False


def pass_a(frame, limit):
    """Scores of the true positives, and no more."""
    found, _, flags, truth_flags, overlap = frame
    assigned, scores = set(), []
    for i, flag in enumerate(truth_flags):
        best = None
        if flag == -1:
            continue
        for j, one in enumerate(found):
            if (
                flags[j] != -1
                and j not in assigned
                and overlap[i][j] > limit
                and (best is None or one.score > found[best].score)
            ):
                best = j
        if best is not None:
            assigned.add(best)
            if flag == 0 and flags[best] == 0:
                scores.append(found[best].score)
    return scores


def pass_b(frame, limit, threshold, measure):
    """True and false positives at a threshold."""
    found, truths, flags, truth_flags, overlap = frame
    alive = [j for j, one in enumerate(found) if one.score >= threshold and flags[j] != -1]
    assigned, tp = set(), 0
    for i, flag in enumerate(truth_flags):
        if flag == -1:
            continue
        free = [j for j in alive if j not in assigned and overlap[i][j] > limit]
        good = [j for j in free if flags[j] == 0]
        if good:
            best = max(good, key=lambda j: (overlap[i][j], -j))
        elif free:
            best = free[0]
        else:
            continue
        assigned.add(best)
        tp += flag == 0 and flags[best] == 0
    wrong = [j for j in alive if flags[j] == 0 and j not in assigned]
    if measure == "2d":
        wrong = [j for j in wrong if not in_dont_care(found[j], truths, limit)]
    return tp, len(wrong)


def get_thresholds(scores, num_valid):
    scores, current, kept = sorted(scores, reverse=True), 0.0, []
    for i, score in enumerate(scores):
        left = (i + 1) / num_valid
        right = (i + 2) / num_valid if i < len(scores) - 1 else left
        if right - current < current - left and i < len(scores) - 1:
            continue
        kept.append(score)
        current += 1 / 40
    return kept


def reference(found, truths):
    """All values of `KittiAP().compute()`."""
    values = {}
    names = sorted({thing.frame for thing in (*found, *truths)})
    frames = [([d for d in found if d.frame == f], [t for t in truths if t.frame == f]) for f in names]
    matrices = [overlaps(list(LIMITS), targets(*t), detections(*d)).tolist() for d, t in frames]
    for c, kind in enumerate(CLASSES):
        for m, (measure, limits) in enumerate(LIMITS.items()):
            for level, name in enumerate(LEVELS):
                with_flags = [
                    (
                        d,
                        t,
                        [found_flag(one, kind, level) for one in d],
                        [truth_flag(one, kind, level) for one in t],
                        matrix[m],
                    )
                    for (d, t), matrix in zip(frames, matrices, strict=True)
                ]
                num_valid = sum(flags.count(0) for *_, flags, _ in with_flags)
                scores = [score for frame in with_flags for score in pass_a(frame, limits[c])]
                precision = [0.0] * 41
                for i, threshold in enumerate(get_thresholds(scores, num_valid)):
                    counts = [pass_b(frame, limits[c], threshold, measure) for frame in with_flags]
                    tp, fp = (sum(column) for column in zip(*counts, strict=True))
                    precision[i] = tp / (tp + fp) if tp + fp else 0.0
                best = [max(precision[i:]) for i in range(41)]
                key = f"{kind.lower()}_{measure}"
                values[f"{key}_r11_{name}"] = sum(best[::4]) / 11
                values[f"{key}_r40_{name}"] = sum(best[1:]) / 40
    return values
