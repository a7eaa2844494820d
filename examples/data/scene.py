"""Random street scenes: the world that both synthetic sensors look at.

Everything is in the LiDAR frame (x forward, y left, z up), in metres. The road bends gently ahead
of the car; things are placed in road coordinates: x along, `lateral` metres to the left of its
centre line.
"""

from dataclasses import dataclass

import numpy as np

from examples.data.geometry import Bools, Floats, wrap_angle
from examples.grid import BEVGrid

GROUND_Z = -1.73
CURB = 0.15
PAINT_WIDTH = 0.3

# Metres per texture cycle. Colours are drawn alike for all kinds, so that only this tells a
# pedestrian from a cyclist, and both from street furniture.
TEXTURE_PERIOD = {"Pedestrian": 1.2, "Cyclist": 0.4, "Car": 0.0, "Misc": 0.0, "Building": 3.0}

# Half of the camera's field of view is about 40.7 degrees: keep centres a little inside.
_VIEW_SLOPE = 0.78
_NEAREST, _SPACING = 6.5, 0.4


# What `SceneOptions.vivid` paints: red, blue.
_VIVID = {"Pedestrian": (220.0, 50.0, 40.0), "Cyclist": (40.0, 70.0, 220.0)}


@dataclass(frozen=True)
class SceneOptions:
    """What differs from one synthetic world to another.

    Args:
        vivid: Whether pedestrians are red, cyclists blue and all other things grey: only the camera
            tells them apart, as by their texture, but small images show it too.
        fault_share: Share of images, and by itself of scans, with a fault, in [0, 1].
        beams: Of the LiDAR.
        columns: Rays of each beam.

    Raises:
        ValueError: An argument is out of range.
    """

    vivid: bool = False
    fault_share: float = 0.1
    beams: int = 48
    columns: int = 224

    def __post_init__(self) -> None:
        if not 0 <= self.fault_share <= 1:
            raise ValueError(f"fault_share must lie in [0, 1], got {self.fault_share}")
        if min(self.beams, self.columns) < 2:
            raise ValueError(f"beams and columns must be 2 or more, got {self.beams} and {self.columns}")


@dataclass(frozen=True)
class Road:
    """A bending road with paint, and a sidewalk or none on either side.

    Attributes:
        offset: Lateral position of the centre line at x = 0.
        slope: Its direction dy/dx at x = 0.
        bend: Its curvature: y = offset + slope x + bend x^2.
        half_width: From the centre line to the edge.
        lines: Lateral positions of painted lines.
        dashed: Whether each line is dashed.
        walks: Width of the left and the right sidewalk, 0 for none.
    """

    offset: float
    slope: float
    bend: float
    half_width: float
    lines: tuple[float, ...]
    dashed: tuple[bool, ...]
    walks: tuple[float, float]

    def lateral(self, xy: Floats) -> Floats:
        """Distance to the left of the centre line of points (..., 2)."""
        x, y = xy[..., 0], xy[..., 1]
        direction = self.slope + 2 * self.bend * x
        centre = self.offset + (self.slope + self.bend * x) * x
        lateral: Floats = (y - centre) / np.sqrt(1 + direction**2)
        return lateral

    def heading(self, x: float) -> float:
        """Direction of the road at x in radians."""
        return float(np.arctan(self.slope + 2 * self.bend * x))

    def point(self, x: float, lateral: float) -> tuple[float, float]:
        """The (x, y) whose `lateral` at x is the one given."""
        scale = 1 / np.cos(self.heading(x))
        return x, self.offset + (self.slope + self.bend * x) * x + lateral * scale

    def raised(self, lateral: Floats) -> Bools:
        """Whether the ground is a curb's height above the road."""
        left, right = self.walks
        return ((lateral > self.half_width) & (left > 0)) | ((lateral < -self.half_width) & (right > 0))

    def on_sidewalk(self, lateral: Floats) -> Bools:
        """Whether a sidewalk is there."""
        beyond = np.abs(lateral) - self.half_width
        return (beyond > 0) & (beyond < np.where(lateral > 0, *self.walks))

    def near_line(self, lateral: Floats, distance: float) -> Bools:
        """Whether a line, painted or in its gap, is within `distance`."""
        near = np.zeros(lateral.shape, dtype=bool)
        for line in self.lines:
            near |= np.abs(lateral - line) <= distance
        return near

    def painted(self, x: Floats, lateral: Floats) -> Bools:
        """Whether there is paint."""
        paint = np.zeros(lateral.shape, dtype=bool)
        for line, dashed in zip(self.lines, self.dashed, strict=True):
            on = np.abs(lateral - line) <= PAINT_WIDTH / 2
            paint |= on & (x % 6 < 3) if dashed else on
        return paint


@dataclass(frozen=True)
class Thing:
    """An object, or a building, of one material.

    Attributes:
        kind: A KITTI type, or "Building".
        box: (7,) centre, length, width, height, yaw.
        parts: (P, 6) boxes it is made of, in its own frame: centre, then half sizes.
        colours: (2, 3) RGB in [0, 255]: the two tones of the texture.
        phase: Shift of the texture, in cycles.
        reflectance: What the LiDAR sees of the material, in [0, 1].
        returned: Share of the LiDAR's rays that come back.
    """

    kind: str
    box: Floats
    parts: Floats
    colours: Floats
    phase: float
    reflectance: float
    returned: float


@dataclass(frozen=True)
class Scene:
    """A road, what stands on it, and the colours of the ground and of the sky, (3,) RGB."""

    road: Road
    things: tuple[Thing, ...]
    asphalt: Floats
    verge: Floats
    sky: Floats


def random_scene(rng: np.random.Generator, grid: BEVGrid, vivid: bool = False) -> Scene:
    """A scene with some cars, about as many pedestrians as cyclists, and street furniture.

    Args:
        rng: Of everything random.
        grid: Objects stand on it.
        vivid: As in `SceneOptions`; the rest of the scene does not depend on it.
    """
    road = _random_road(rng)
    asphalt = np.full(3, rng.uniform(70, 130)) + rng.uniform(-8, 8, 3)
    kinds = [
        *["Car"] * rng.integers(2, 7),
        *rng.choice(["Pedestrian", "Cyclist"], rng.integers(2, 6)),
        *["Misc"] * rng.integers(1, 4),
        *["Building"] * rng.integers(1, 4),
    ]
    things: list[Thing] = []
    for kind in kinds:
        for _ in range(10):
            box = _random_box(str(kind), road, rng)
            if _fits(box, [thing.box for thing in things], grid, kind == "Building"):
                things.append(_random_thing(str(kind), box, asphalt, vivid, rng))
                break
    return Scene(road, tuple(things), asphalt, rng.uniform(40, 170, 3), rng.uniform(120, 230, 3))


def _random_road(rng: np.random.Generator) -> Road:
    half_width = rng.uniform(3.5, 7.0)
    lanes = 2 if half_width < 5 else int(rng.integers(2, 5))
    edge = half_width - 0.4
    dividers = np.linspace(-edge, edge, lanes + 1)
    return Road(
        # Traffic keeps right, so the car's road lies to its left.
        offset=half_width * rng.uniform(0.2, 0.7),
        slope=rng.uniform(-0.12, 0.12),
        bend=rng.uniform(-0.005, 0.005),
        half_width=half_width,
        lines=tuple(dividers.tolist()),
        dashed=(False, *[True] * (lanes - 1), False),
        walks=tuple(np.where(rng.random(2) < 0.65, rng.uniform(1.6, 4.0, 2), 0.0).tolist()),
    )


def _random_box(kind: str, road: Road, rng: np.random.Generator) -> Floats:
    """A box on the ground. Pedestrians and cyclists are drawn alike."""
    side = rng.choice([-1.0, 1.0])
    x = rng.uniform(_NEAREST, 38.0)
    turn = rng.normal(0, 0.05)
    if kind == "Car":
        size = rng.normal([4.2, 1.75, 1.5], [0.35, 0.1, 0.1])
        parked = rng.random() < 0.4
        lateral = road.half_width - 1.1 if parked else road.half_width * rng.uniform(0.3, 0.6)
        turn += np.pi if side > 0 else 0.0
        if rng.random() < 0.15:
            turn += rng.uniform(-1.2, 1.2)
    elif kind == "Building":
        size = rng.uniform([5, 3, 4], [14, 8, 9])
        x = rng.uniform(6, 45)
        lateral = road.half_width + 4.5 + rng.uniform(0, 6) + size[1] / 2
    elif kind == "Misc" and rng.random() < 0.3:
        size = rng.uniform([2.5, 1.4, 1.2], [4.5, 2.0, 2.0])
        lateral = road.half_width + rng.uniform(1, 4)
    else:
        size = rng.uniform([0.6, 0.5, 1.5], [1.2, 0.7, 1.9])
        lateral = rng.uniform(0.2, 1.0) * (road.half_width + 3)
        turn = rng.uniform(-np.pi, np.pi)
    x, y = road.point(x, side * lateral)
    ground = GROUND_Z + CURB * bool(road.raised(np.array(side * lateral)))
    yaw = float(wrap_angle(np.array(road.heading(x) + turn)))
    return np.array([x, y, ground + size[2] / 2, *size, yaw])


def _fits(box: Floats, others: list[Floats], grid: BEVGrid, building: bool) -> bool:
    x, y = box[:2]
    seen = grid.x_min <= x < grid.x_max and grid.y_min <= y < grid.y_max
    seen = seen and abs(y) < _VIEW_SLOPE * x
    extent = _extent(box)
    apart = all(np.any(np.abs(box[:2] - other[:2]) > extent + _extent(other) + _SPACING) for other in others)
    return apart and (building or seen)


def _extent(box: Floats) -> Floats:
    """(2,): half of the box's extent along x and y."""
    cos, sin = abs(np.cos(box[6])), abs(np.sin(box[6]))
    return np.array([cos * box[3] + sin * box[4], sin * box[3] + cos * box[4]]) / 2


def _random_thing(kind: str, box: Floats, asphalt: Floats, vivid: bool, rng: np.random.Generator) -> Thing:
    colours = rng.uniform(30, 220, (2, 3))
    reflectance, returned = rng.uniform(0.1, 0.8), 1.0
    if kind == "Car":
        paint = rng.choice(["plain", "asphalt", "dark"], p=[0.6, 0.2, 0.2])
        if paint == "asphalt":  # hidden from the camera
            colours[0] = asphalt
        elif paint == "dark":  # hidden from the LiDAR
            colours[0], reflectance, returned = rng.uniform(10, 40, 3), 0.03, 0.2
    elif kind in ("Pedestrian", "Cyclist"):
        # Two tones far enough apart for the texture to show.
        colours[1] = np.where(colours[0] < 125, colours[0] + 90, colours[0] - 90)
    if vivid:
        colours = _vivid(kind, colours)
    return Thing(kind, box, _parts(kind, box), colours, rng.random(), reflectance, returned)


def _vivid(kind: str, colours: Floats) -> Floats:
    """The two tones (2, 3) as grey, or as a lighter and a darker tone of the kind's colour."""
    if kind in _VIVID:
        return np.outer([1.0, 0.6], _VIVID[kind])
    return np.repeat(colours.mean(axis=1, keepdims=True), 3, axis=1)


def _parts(kind: str, box: Floats) -> Floats:
    length, width, height = box[3:6]
    if kind != "Car":
        return np.array([[0, 0, 0, length / 2, width / 2, height / 2]])
    # A body, and a cabin set back: its place tells where the front is.
    body, cabin = 0.55 * height, 0.45 * height
    return np.array(
        [
            [0, 0, (body - height) / 2, length / 2, width / 2, body / 2],
            [-0.12 * length, 0, (height - cabin) / 2, 0.28 * length, 0.46 * width, cabin / 2],
        ]
    )
