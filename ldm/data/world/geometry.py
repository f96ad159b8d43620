"""Geometry of the embedded world: a room corner with one object, ray-cast once for all 480 configurations.

Only scale, shape and orientation (8 x 4 x 15) change the geometry. Each configuration becomes four byte maps
(how much floor, wall, object and white highlight a pixel shows, shading included), so that any of the 480,000
images is the product of those maps with three hues and white (``ldm.data.world.dataset``).

Axes: x and z span the floor, y points up; the object stands at the origin, the room corner at (-WALL, 0, -WALL).
The object is scaled about the origin, so rays are brought to unit scale instead: p / scale.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

SCALES = np.linspace(0.55, 1.15, 8)
ORIENTATIONS = np.linspace(-30.0, 30.0, 15)  # degrees the camera turns about the object, as in 3dshapes
NUM_CONFIGURATIONS = 8 * 4 * 15

GEOMETRY_VERSION = 2  # raise it whenever a change here changes a picture: cached maps are then made anew
SAMPLES_PER_SIDE = 4  # rays per pixel side; each of the 16 also sees its own point of the lamp (soft shadow)

_WALL = 2.7
_AMBIENT, _DIFFUSE, _GLOSS = 0.46, 0.54, 0.32
_LAMP = np.array([0.42, 1.0, 0.85]) / np.linalg.norm([0.42, 1.0, 0.85])
_LAMP_RADIUS = 0.10  # radius of the lamp's disc at unit distance
_FAR = 1e9
_NEAR = 1e-4


@dataclass(frozen=True)
class Solid:
    """A solid at unit scale, standing on the floor.

    Attributes:
        hit: (origins (n, 3), unit directions (n, 3)) -> (n,) nearest positive distance, ``_FAR`` where missed.
        normal: (points on the surface (n, 3)) -> (n, 3) unit normals.
        outside: (points on the floor (n, 3)) -> (n,) distance from where the solid touches or nearly touches it.
        height: of the centre of the bounding sphere.
        radius: of the bounding sphere.
    """

    hit: Callable[[np.ndarray, np.ndarray], np.ndarray]
    normal: Callable[[np.ndarray], np.ndarray]
    outside: Callable[[np.ndarray], np.ndarray]
    height: float
    radius: float


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.einsum("...i,...i->...", a, b)


def _unit(v: np.ndarray) -> np.ndarray:
    return v / np.sqrt(_dot(v, v))[..., None]


def _away_from_zero(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < 1e-12, 1e-12, x)


def _first_root(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Smaller root of a t^2 + 2 b t + c = 0, ``_FAR`` where there is none ahead."""
    disc = b * b - a * c
    t = (-b - np.sqrt(np.maximum(disc, 0.0))) / _away_from_zero(a)
    return np.where((disc > 0) & (t > _NEAR), t, _FAR)


def _sphere_hit(o: np.ndarray, d: np.ndarray, centre: np.ndarray, radius: float) -> np.ndarray:
    oc = o - centre
    return _first_root(np.ones(len(o)), _dot(oc, d), _dot(oc, oc) - radius**2)


def _beyond(offset: np.ndarray, radius: float) -> np.ndarray:
    return np.maximum(np.linalg.norm(offset, axis=-1) - radius, 0)


def _cube() -> Solid:
    half = 0.82
    centre = np.array([0.0, half, 0.0])

    def hit(o: np.ndarray, d: np.ndarray) -> np.ndarray:
        inverse = 1.0 / _away_from_zero(d)
        low, high = (-half - (o - centre)) * inverse, (half - (o - centre)) * inverse
        enter, leave = np.minimum(low, high).max(-1), np.maximum(low, high).min(-1)
        return np.where((enter <= leave) & (enter > _NEAR), enter, _FAR)

    def normal(p: np.ndarray) -> np.ndarray:
        q = p - centre
        face = np.abs(q) == np.abs(q).max(-1, keepdims=True)
        return _unit(np.sign(q) * face)

    def outside(p: np.ndarray) -> np.ndarray:
        return np.linalg.norm(np.maximum(np.abs(p[:, ::2]) - half, 0), axis=-1)

    return Solid(hit, normal, outside, half, half * np.sqrt(3))


def _cylinder() -> Solid:
    radius, height = 0.74, 1.9

    def hit(o: np.ndarray, d: np.ndarray) -> np.ndarray:
        flat_o, flat_d = o[:, ::2], d[:, ::2]
        side = _first_root(_dot(flat_d, flat_d), _dot(flat_o, flat_d), _dot(flat_o, flat_o) - radius**2)
        y = o[:, 1] + side * d[:, 1]
        side = np.where((y >= 0) & (y <= height), side, _FAR)
        lid = (height - o[:, 1]) / _away_from_zero(d[:, 1])
        at_lid = flat_o + lid[:, None] * flat_d
        lid = np.where((lid > _NEAR) & (_dot(at_lid, at_lid) <= radius**2), lid, _FAR)
        return np.minimum(side, lid)

    def normal(p: np.ndarray) -> np.ndarray:
        outward = p * np.array([1.0, 0.0, 1.0])
        on_lid = p[:, 1] > height - 1e-6
        return np.where(on_lid[:, None], np.array([0.0, 1.0, 0.0]), _unit(outward + 1e-12))

    return Solid(hit, normal, lambda p: _beyond(p[:, ::2], radius), height / 2, float(np.hypot(radius, height / 2)))


def _sphere() -> Solid:
    centre = np.array([0.0, 1.0, 0.0])
    return Solid(
        lambda o, d: _sphere_hit(o, d, centre, 1.0),
        lambda p: _unit(p - centre),
        lambda p: _beyond(p[:, ::2], 0.45),
        1.0,
        1.0,
    )


def _capsule() -> Solid:
    """Lies askew: as the camera turns from -30 to 30 degrees its picture only ever lengthens, so that one
    picture tells the orientation."""
    radius, half = 0.60, 0.92
    angle = np.radians(5.0)
    axis = np.array([np.cos(angle), 0.0, -np.sin(angle)])
    centre = np.array([0.0, radius, 0.0])

    def hit(o: np.ndarray, d: np.ndarray) -> np.ndarray:
        ends = [_sphere_hit(o, d, centre + side * half * axis, radius) for side in (-1.0, 1.0)]
        oc = o - centre
        along_d, along_o = d @ axis, oc @ axis
        across_d, across_o = d - along_d[:, None] * axis, oc - along_o[:, None] * axis
        side = _first_root(_dot(across_d, across_d), _dot(across_d, across_o), _dot(across_o, across_o) - radius**2)
        side = np.where(np.abs(along_o + side * along_d) <= half, side, _FAR)
        return np.minimum(side, np.minimum(*ends))

    def normal(p: np.ndarray) -> np.ndarray:
        q = p - centre
        return _unit(q - np.clip(q @ axis, -half, half)[:, None] * axis)

    def outside(p: np.ndarray) -> np.ndarray:
        return _beyond(p - np.clip(p @ axis, -half, half)[:, None] * axis, 0.25)

    return Solid(hit, normal, outside, radius, radius + half)


SOLIDS = (_cube(), _cylinder(), _sphere(), _capsule())


def _hit_scaled(solid: Solid, scale: float, o: np.ndarray, d: np.ndarray) -> np.ndarray:
    """Distance (n,) to the solid at ``scale``; rays that miss its bounding sphere are not tested further."""
    o = o / scale
    to_centre = o - np.array([0.0, solid.height, 0.0])
    along = _dot(to_centre, d)
    near = _dot(to_centre, to_centre) - along**2 <= solid.radius**2
    t = np.full(len(o), _FAR)
    found = solid.hit(o[near], d[near])
    t[near] = np.where(found < _FAR, found * scale, _FAR)
    return t


def camera_rays(degrees: float, pixels: int) -> tuple[np.ndarray, np.ndarray]:
    """Eye (3,) and unit ray directions (pixels^2, 3), row-major from the upper left."""
    angle = np.radians(45.0 + degrees)
    eye = np.array([6.2 * np.cos(angle), 2.7, 6.2 * np.sin(angle)])
    forward = _unit(np.array([0.0, 0.87, 0.0]) - eye)
    right = _unit(np.cross(forward, [0.0, 1.0, 0.0]))
    up = np.cross(right, forward)
    grid = ((np.arange(pixels) + 0.5) / pixels * 2 - 1) * np.tan(np.radians(16.8))
    x, y = np.meshgrid(grid, -grid)
    return eye, _unit(forward + x.reshape(-1, 1) * right + y.reshape(-1, 1) * up)


def _lamp_directions(pixels: int) -> np.ndarray:
    """Direction to the lamp for every ray (pixels^2, 3): the rays of one pixel share out the lamp's disc.

    A sunflower pattern visited in steps of 7 (coprime to 16), so that neighbours look at distant points.
    """
    rays = SAMPLES_PER_SIDE**2
    k = np.arange(rays) * 7 % rays
    radius, turn = np.sqrt((k + 0.5) / rays) * _LAMP_RADIUS, k * np.pi * (3 - np.sqrt(5))
    side = _unit(np.cross(_LAMP, [0.0, 1.0, 0.0]))
    other = np.cross(side, _LAMP)
    disc = (radius * np.cos(turn))[:, None] * side + (radius * np.sin(turn))[:, None] * other
    tile = _unit(_LAMP + disc).reshape(SAMPLES_PER_SIDE, SAMPLES_PER_SIDE, 3)
    repeats = pixels // SAMPLES_PER_SIDE
    return np.tile(tile, (repeats, repeats, 1)).reshape(-1, 3)


@dataclass(frozen=True)
class _Room:
    """What the camera sees of the empty room, per ray: distance, place, floor mask, light from lamp and sky."""

    eye: np.ndarray
    rays: np.ndarray
    distance: np.ndarray
    points: np.ndarray
    is_floor: np.ndarray
    ambient: np.ndarray
    diffuse: np.ndarray


def _empty_room(degrees: float, pixels: int) -> _Room:
    eye, rays = camera_rays(degrees, pixels)
    planes = (np.array([-_WALL, 0.0, -_WALL]) - eye) / _away_from_zero(rays)
    planes = np.where(planes > 0, planes, _FAR)
    surface = planes.argmin(-1)  # 0: wall x = -WALL, 1: floor, 2: wall z = -WALL
    distance = planes.min(-1)
    points = eye + distance[:, None] * rays
    is_floor = surface == 1
    gap = points + np.array([_WALL, 0.0, _WALL])
    gap[np.arange(len(gap)), surface] = _FAR  # the surface itself is no edge to it
    corner_shade = 1 - 0.30 * np.exp(-gap / 0.32).sum(-1)
    falloff = 1.06 - 0.022 * _dot(points, points)  # a lamp above the object rather than the sun
    return _Room(
        eye,
        rays,
        distance,
        points,
        is_floor,
        _AMBIENT * corner_shade,
        _DIFFUSE * _LAMP[surface] * corner_shade * np.clip(falloff, 0.55, 1.1),
    )


def _object_light(solid: Solid, scale: float, points: np.ndarray, rays: np.ndarray) -> tuple:
    """Coloured light (n,) and white highlight (n,) of points on the object."""
    normal = solid.normal(points / scale)
    sky = 0.72 + 0.28 * normal[:, 1]  # undersides see the floor, not the sky
    contact = 1 - 0.45 * np.exp(-points[:, 1] / (0.16 * scale))
    light = _AMBIENT * sky * contact + _DIFFUSE * np.clip(normal @ _LAMP, 0, 1)
    halfway = _unit(_LAMP - rays)
    return light, _GLOSS * np.clip(_dot(normal, halfway), 0, 1) ** 32


def _configuration(room: _Room, lamp: np.ndarray, solid: Solid, scale: float, size: int) -> np.ndarray:
    """Byte maps (size, size, 4) of one object in one room: floor, wall, object, highlight."""
    maps = np.zeros((len(room.rays), 4))
    t = _hit_scaled(solid, scale, np.broadcast_to(room.eye, room.rays.shape), room.rays)
    on_object = t < room.distance
    points = room.eye + t[on_object, None] * room.rays[on_object]
    maps[on_object, 2], maps[on_object, 3] = _object_light(solid, scale, points, room.rays[on_object])
    behind = ~on_object
    lit = _hit_scaled(solid, scale, room.points[behind], lamp[behind]) >= _FAR
    gap = solid.outside(room.points[behind] / scale)
    contact = 1 - 0.42 * np.exp(-gap / 0.22) * room.is_floor[behind]
    light = (room.ambient[behind] + room.diffuse[behind] * lit) * contact
    maps[behind, 0] = light * room.is_floor[behind]
    maps[behind, 1] = light * ~room.is_floor[behind]
    s = SAMPLES_PER_SIDE
    pixels = maps.reshape(size, s, size, s, 4).mean((1, 3))
    return _as_bytes(pixels)


def _as_bytes(pixels: np.ndarray) -> np.ndarray:
    """(…, 4) in [0, 1] -> uint8 whose sum over the maps stays within 255, so that no colour can overflow."""
    maps = np.clip(np.rint(pixels * 255), 0, 255).astype(np.int64)
    maps[..., 3] = np.clip(255 - maps[..., :3].sum(-1), 0, maps[..., 3])
    return maps.astype(np.uint8)


def render_maps(size: int) -> np.ndarray:
    """Ray-cast all configurations.

    Args:
        size: side of the image in pixels.

    Returns:
        (480, size, size, 4) uint8: share of floor, wall, object colour and white, 255 = all; configurations in
        the order scale, shape, orientation (the last turns fastest).
    """
    pixels = size * SAMPLES_PER_SIDE
    lamp = _lamp_directions(pixels)
    out = np.empty((len(SCALES), len(SOLIDS), len(ORIENTATIONS), size, size, 4), np.uint8)
    for k, degrees in enumerate(ORIENTATIONS):
        room = _empty_room(degrees, pixels)
        for i, scale in enumerate(SCALES):
            for j, solid in enumerate(SOLIDS):
                out[i, j, k] = _configuration(room, lamp, solid, scale, size)
    return out.reshape(NUM_CONFIGURATIONS, size, size, 4)
