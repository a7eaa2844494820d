"""The synthetic camera and LiDAR: one ray caster, two ways to read its hits."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from examples.data.geometry import Bools, Floats, Ints
from examples.data.scene import CURB, GROUND_Z, TEXTURE_PERIOD, Scene, SceneOptions, Thing

GROUND, SKY = -1, -2
MAX_RANGE = 50.0

_ELEVATION = np.radians([-24.0, 2.0])
_AZIMUTH = np.radians([-42.0, 42.0])
_DEFAULTS = SceneOptions()


@dataclass(frozen=True)
class Hits:
    """What R rays meet first.

    Attributes:
        distance: (R,) metres along the ray, inf for the sky.
        owner: (R,) index of the thing, or GROUND, or SKY.
        axis: (R,) axis of the face's normal in the thing's frame: 0 ends, 1 sides, 2 top.
        curb: (R,) whether the ray meets the vertical face of a curb.
        alone: (things,) number of rays that would meet each thing if nothing stood before it.
    """

    distance: Floats
    owner: Ints
    axis: Ints
    curb: Bools
    alone: Ints


def cast(origin: Floats, directions: Floats, scene: Scene) -> Hits:
    """Follow rays from `origin` (3,) along unit `directions` (R, 3) to what they meet first."""
    distance, curb = _cast_ground(origin, directions, scene)
    owner = np.where(np.isfinite(distance), GROUND, SKY)
    axis = np.full(len(directions), 2)
    alone = np.zeros(len(scene.things), dtype=np.int64)
    for index, thing in enumerate(scene.things):
        rays = _near(origin, directions, thing)
        entry, face = _cast_thing(origin, directions[rays], thing)
        alone[index] = np.isfinite(entry).sum()
        nearer = entry < distance[rays]
        won = rays[nearer]
        distance[won], owner[won], axis[won], curb[won] = entry[nearer], index, face[nearer], False
    return Hits(distance, owner, axis, curb, alone)


def _cast_ground(origin: Floats, directions: Floats, scene: Scene) -> tuple[Floats, Bools]:
    """The ground is two planes, the road's and the sidewalks', joined by vertical curbs."""
    distance = np.full(len(directions), np.inf, dtype=directions.dtype)
    curb = np.zeros(len(directions), dtype=bool)
    down = np.flatnonzero(directions[:, 2] < -1e-3)
    rays = directions[down]
    low = (GROUND_Z - origin[2]) / rays[:, 2]
    high = (GROUND_Z + CURB - origin[2]) / rays[:, 2]
    road = scene.road
    lateral_low = road.lateral(origin[:2] + low[:, None] * rays[:, :2])
    lateral_high = road.lateral(origin[:2] + high[:, None] * rays[:, :2])
    step_high, step_low = road.raised(lateral_high), road.raised(lateral_low)
    # Over the road at the upper plane but beyond the curb at the lower one: in between, it is hit.
    face = ~step_high & step_low
    travelled = np.abs(lateral_low) - np.abs(lateral_high)
    share = (road.half_width - np.abs(lateral_high)) / np.where(face, travelled, 1.0)
    distance[down] = np.where(step_high, high, np.where(face, high + share * (low - high), low))
    curb[down] = face
    return distance, curb


def _near(origin: Floats, directions: Floats, thing: Thing) -> Ints:
    """Indices of the rays that meet the sphere around a thing."""
    offset = thing.box[:3] - origin
    away = np.linalg.norm(offset)
    radius = np.linalg.norm(thing.box[3:6]) / 2
    if away <= radius:
        return np.arange(len(directions))
    cosine = np.sqrt(1 - (radius / away) ** 2)
    return np.flatnonzero(directions @ (offset / away).astype(directions.dtype) >= cosine)


def _rotation(thing: Thing) -> Floats:
    """(3, 3): from the LiDAR's axes to the thing's, for row vectors."""
    cos, sin = np.cos(thing.box[6]), np.sin(thing.box[6])
    return np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]], dtype=np.float32)


def _cast_thing(origin: Floats, directions: Floats, thing: Thing) -> tuple[Floats, Ints]:
    """Slab test against each part: entry distance (inf for a miss) and the face's normal axis."""
    rotation = _rotation(thing)
    start = ((origin - thing.box[:3]) @ rotation).astype(np.float32)
    local = directions @ rotation
    inverse = 1 / np.where(np.abs(local) < 1e-6, 1e-6, local)
    nearest = np.full(len(local), np.inf, dtype=np.float32)
    axis = np.zeros(len(local), dtype=np.int64)
    for part in thing.parts.astype(np.float32):
        middle = (part[:3] - start) * inverse
        reach = np.abs(part[3:] * inverse)
        entries, leave = middle - reach, (middle + reach).min(axis=1)
        entry = entries.max(axis=1)
        nearer = (entry < leave) & (entry > 0) & (entry < nearest)
        nearest[nearer] = entry[nearer]
        axis[nearer] = entries[nearer].argmax(axis=1)
    return nearest, axis


def camera_rays(lidar_to_image: Floats, image_size: tuple[int, int]) -> tuple[Floats, Floats]:
    """The camera's centre (3,) and a unit ray (H * W, 3) through the centre of each pixel."""
    height, width = image_size
    u, v = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    pixels = np.stack([u, v, np.ones_like(u)], axis=-1).reshape(-1, 3)
    inverse = np.linalg.inv(lidar_to_image[:, :3])
    rays = pixels @ inverse.T
    rays /= np.linalg.norm(rays, axis=1, keepdims=True)
    return -inverse @ lidar_to_image[:, 3], rays.astype(np.float32)


def render(
    scene: Scene,
    lidar_to_image: Floats,
    image_size: tuple[int, int],
    rng: np.random.Generator,
    fault_share: float = _DEFAULTS.fault_share,
) -> tuple[NDArray[np.uint8], Hits]:
    """A photograph (H, W, 3) of the scene, in this frame's weather, and the hits behind it."""
    origin, rays = camera_rays(lidar_to_image, image_size)
    hits = cast(origin, rays, scene)
    colour = np.empty((len(rays), 3), dtype=np.float32)
    sky = hits.owner == SKY
    colour[sky] = scene.sky * (1 - 0.8 * rays[sky, 2:])
    ground = np.flatnonzero(hits.owner == GROUND)
    points = origin + hits.distance[ground, None] * rays[ground]
    colour[ground] = _ground_colour(scene, points, hits.curb[ground], rng)
    sun = rng.normal(size=3)
    sun /= np.linalg.norm(sun)
    for index, thing in enumerate(scene.things):
        seen = np.flatnonzero(hits.owner == index)
        points = origin + hits.distance[seen, None] * rays[seen]
        local = (points - thing.box[:3]) @ _rotation(thing)
        shade = np.array([0.65, 0.8, 1.0]) + 0.15 * np.abs(sun)
        colour[seen] = _texture(thing, local, hits.axis[seen]) * shade[hits.axis[seen], None]
    colour = _weather(colour, hits.distance, rng)
    return _camera_fault(colour.reshape(*image_size, 3), fault_share, rng), hits


def _ground_colour(scene: Scene, points: Floats, curb: Bools, rng: np.random.Generator) -> Floats:
    road = scene.road
    lateral = road.lateral(points[:, :2])
    # Asphalt and sidewalk look alike: only the step between them, and its shade, tells.
    paved = road.on_sidewalk(lateral) | (np.abs(lateral) <= road.half_width)
    grain = rng.standard_normal(len(points), dtype=np.float32) * np.where(paved, 4, 14)
    colour = np.where(paved[:, None], scene.asphalt, scene.verge) + grain[:, None]
    colour[road.painted(points[:, 0], lateral)] += 90
    colour[curb] *= 0.8
    return colour


def _texture(thing: Thing, local: Floats, axis: Ints) -> Floats:
    """(R, 3) colours of points (R, 3) in the thing's frame, on faces with these normals."""
    first, second = thing.colours
    half = thing.box[3:6] / 2
    if thing.kind == "Car":
        tone = np.broadcast_to(first, local.shape).copy()
        up = local[:, 2] / half[2]
        glass = (up > 0.2) & (axis != 2)
        wheels = (up < -0.4) & (np.abs(np.abs(local[:, 0]) - 0.6 * half[0]) < 0.32) & (axis == 1)
        tone[glass | wheels] = (35, 40, 45)
        lamps = (axis == 0) & (np.abs(up + 0.25) < 0.2) & (np.abs(local[:, 1]) > 0.55 * half[1])
        tone[lamps] = np.where(local[lamps, :1] > 0, (240, 240, 225), (190, 25, 25))
        return tone
    period = TEXTURE_PERIOD[thing.kind]
    if not period:
        return np.broadcast_to(first, local.shape)
    band = (local[:, 2] / period + thing.phase) % 1 < 0.5
    striped: Floats = np.where(band[:, None], first, second)
    return striped


def _weather(colour: Floats, distance: Floats, rng: np.random.Generator) -> Floats:
    kind = rng.choice(["day", "night", "overexposed", "fog"], p=[0.8, 0.08, 0.06, 0.06])
    noise = rng.uniform(1, 4)
    if kind == "night":
        colour, noise = colour * rng.uniform(0.04, 0.15), 6.0
    elif kind == "overexposed":
        colour = colour * rng.uniform(2.0, 3.0) + 60
    elif kind == "fog":
        clear = np.exp(-distance / rng.uniform(5, 12))[:, None]
        colour = clear * colour + (1 - clear) * rng.uniform(150, 210)
    else:
        colour = colour * rng.uniform(0.6, 1.1)
    return colour + noise * rng.standard_normal((len(colour), 1), dtype=np.float32)


def _camera_fault(colour: Floats, share: float, rng: np.random.Generator) -> NDArray[np.uint8]:
    """The finished image; a share of them is blurred, noisy or has dirt on the lens."""
    fault = rng.choice(
        ["none", "blur", "noise", "dirt"], p=[1 - share, 0.4 * share, 0.3 * share, 0.3 * share]
    )
    width = colour.shape[1]
    if fault == "noise":
        colour = colour + 70 * rng.standard_normal(colour.shape, dtype=np.float32)
    elif fault == "dirt":
        left = rng.integers(0, width // 2)
        colour[:, left : left + width // 2] = rng.uniform(20, 120)
    image = colour.clip(0, 255).astype(np.uint8)
    if fault == "blur":
        blurred = Image.fromarray(image).filter(ImageFilter.GaussianBlur(width / 100))
        image = np.array(blurred)
    return image


def scan(
    scene: Scene, rng: np.random.Generator, options: SceneOptions = _DEFAULTS
) -> tuple[NDArray[np.float32], Ints]:
    """Points (N, 4) of the scene and whose they are (N,), as in `Hits.owner`."""
    turn = rng.uniform(0, 0.005)  # columns do not fall on the same azimuths in every scan
    elevation, azimuth = np.meshgrid(
        np.linspace(*_ELEVATION, options.beams), np.linspace(*_AZIMUTH, options.columns) + turn, indexing="ij"
    )
    level = np.cos(elevation)
    rays = np.stack([level * np.cos(azimuth), level * np.sin(azimuth), np.sin(elevation)], axis=-1)
    rays = rays.reshape(-1, 3).astype(np.float32)
    hits = cast(np.zeros(3), rays, scene)
    kept = np.flatnonzero(_returned(scene, hits, rng) & _lidar_alive(options, rng).ravel())
    owner = hits.owner[kept]
    distance = hits.distance[kept] + rng.normal(0, 0.02, len(kept))
    xyz = rays[kept] * distance[:, None]
    lateral = scene.road.lateral(xyz[:, :2])
    paved = (np.abs(lateral) <= scene.road.half_width) | scene.road.on_sidewalk(lateral)
    verge = (owner == GROUND) & ~paved
    xyz[verge, 2] += rng.uniform(0, 0.12, verge.sum())
    materials = np.array([thing.reflectance for thing in scene.things] + [0.0, 0.25])
    # The last entry is the ground's: GROUND is -1. Paint reflects as asphalt does, on purpose.
    reflectance = np.where(verge, 0.4, materials[owner]) + rng.normal(0, 0.04, len(kept))
    points = np.concatenate([xyz, reflectance.clip(0, 1)[:, None]], axis=1)
    return points.astype(np.float32), owner


def _returned(scene: Scene, hits: Hits, rng: np.random.Generator) -> Bools:
    """Which rays come back: fewer from afar and from dark paint."""
    share = np.array([thing.returned for thing in scene.things] + [0.0, 1.0])[hits.owner]
    share = share * (0.97 - 0.15 * np.minimum(hits.distance, MAX_RANGE) / MAX_RANGE)
    return (hits.distance < MAX_RANGE) & (rng.random(len(share)) < share)


def _lidar_alive(options: SceneOptions, rng: np.random.Generator) -> Bools:
    """(beams, columns); a share of the scans has lost most beams, or a sector."""
    beams, columns, share = options.beams, options.columns, options.fault_share
    alive = np.ones((beams, columns), dtype=bool)
    fault = rng.choice(["none", "beams", "sector"], p=[1 - share, share / 2, share / 2])
    if fault == "beams":
        alive[rng.random(beams) < 0.8] = False
    elif fault == "sector":
        left = rng.integers(0, columns // 2)
        alive[:, left : left + columns // 2] = False
    return alive
