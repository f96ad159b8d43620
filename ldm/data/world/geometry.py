"""Geometry of the embedded world: the corner of a room with one object, ray-cast once for all 480 configurations.

Only scale, shape and orientation (8 x 4 x 15) change the geometry. Each configuration gives four byte maps: the
shares of floor, wall, object and white highlight in each pixel, with shading.

Axes: x and z span the floor, y points up; the object is at the origin, the corner at (-WALL, 0, -WALL). The object is
scaled about the origin; instead, rays are transformed to unit scale: p / scale.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from einops import reduce

SCALES = np.linspace(0.55, 1.15, 8)
ORIENTATIONS = np.linspace(-30.0, 30.0, 15)  # rotation of the camera about the object in degrees, as in 3dshapes
NUM_CONFIGURATIONS = 8 * 4 * 15

GEOMETRY_VERSION = 2  # increase it with every change of the images, so that cached maps are computed again
SAMPLES_PER_SIDE = 4  # rays per pixel side; each of the 16 samples another point of the lamp (soft shadow)

_WALL = 2.7
_AMBIENT, _DIFFUSE, _GLOSS = 0.46, 0.54, 0.32
_LAMP = np.array([0.42, 1.0, 0.85]) / np.linalg.norm([0.42, 1.0, 0.85])
_LAMP_RADIUS = 0.10  # radius of the lamp's disc at unit distance
_FAR = 1e9
_NEAR = 1e-4


@dataclass(frozen=True)
class Solid:
    """Solid at unit scale on the floor; functions of n rays or points."""

    # origins and unit directions (n, 3) -> (n,) nearest positive distance, ``_FAR`` for a miss
    hit: Callable[[np.ndarray, np.ndarray], np.ndarray]
    normal: Callable[[np.ndarray], np.ndarray]  # points on the surface (n, 3) -> (n, 3) unit normals
    outside: Callable[[np.ndarray], np.ndarray]  # points on the floor -> (n,) distance from the area (nearly) touched
    height: float  # height of the centre of the bounding sphere
    radius: float  # radius of the bounding sphere


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.einsum("...i,...i->...", a, b)


def _unit(v: np.ndarray) -> np.ndarray:
    return v / np.sqrt(_dot(v, v))[..., None]


def _away_from_zero(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < 1e-12, 1e-12, x)


def _first_root(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Return the smaller root of a t^2 + 2 b t + c = 0, ``_FAR`` if it is not positive."""
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
    """Return a capsule that lies askew: its image lengthens monotonically as the camera turns from -30 to 30
    degrees, so that a single image determines the orientation."""
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
    """Return the distance (n,) to the solid at ``scale``; only rays through its bounding sphere are tested."""
    o = o / scale
    to_centre = o - np.array([0.0, solid.height, 0.0])
    along = _dot(to_centre, d)
    near = _dot(to_centre, to_centre) - along**2 <= solid.radius**2
    t = np.full(len(o), _FAR)
    found = solid.hit(o[near], d[near])
    t[near] = np.where(found < _FAR, found * scale, _FAR)
    return t


def camera_rays(degrees: float, pixels: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the eye (3,) and unit ray directions (pixels^2, 3), row-major from the upper left."""
    angle = np.radians(45.0 + degrees)
    eye = np.array([6.2 * np.cos(angle), 2.7, 6.2 * np.sin(angle)])
    forward = _unit(np.array([0.0, 0.87, 0.0]) - eye)
    right = _unit(np.cross(forward, [0.0, 1.0, 0.0]))
    up = np.cross(right, forward)
    grid = ((np.arange(pixels) + 0.5) / pixels * 2 - 1) * np.tan(np.radians(16.8))
    x, y = np.meshgrid(grid, -grid)
    return eye, _unit(forward + x.reshape(-1, 1) * right + y.reshape(-1, 1) * up)


def _lamp_directions(pixels: int) -> np.ndarray:
    """Return the direction to the lamp for every ray (pixels^2, 3); the rays of a pixel sample the lamp's disc.

    The points form a sunflower pattern in steps of 7 (coprime to 16), so that neighbours sample distant points.
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
class _View:
    """View of the empty room, per ray: distance, point, floor mask, light from lamp and sky."""

    eye: np.ndarray
    rays: np.ndarray
    distance: np.ndarray
    points: np.ndarray
    is_floor: np.ndarray
    ambient: np.ndarray
    diffuse: np.ndarray


def _empty_view(degrees: float, pixels: int) -> _View:
    eye, rays = camera_rays(degrees, pixels)
    planes = (np.array([-_WALL, 0.0, -_WALL]) - eye) / _away_from_zero(rays)
    planes = np.where(planes > 0, planes, _FAR)
    surface = planes.argmin(-1)  # 0: wall x = -WALL, 1: floor, 2: wall z = -WALL
    distance = planes.min(-1)
    points = eye + distance[:, None] * rays
    is_floor = surface == 1
    gap = points + np.array([_WALL, 0.0, _WALL])
    gap[np.arange(len(gap)), surface] = _FAR  # only the other surfaces form an edge
    corner_shade = 1 - 0.30 * np.exp(-gap / 0.32).sum(-1)
    falloff = 1.06 - 0.022 * _dot(points, points)  # a lamp above the object rather than the sun
    diffuse = _DIFFUSE * _LAMP[surface] * corner_shade * np.clip(falloff, 0.55, 1.1)
    return _View(eye, rays, distance, points, is_floor, _AMBIENT * corner_shade, diffuse)


def _object_light(solid: Solid, scale: float, points: np.ndarray, rays: np.ndarray) -> tuple:
    """Return coloured light (n,) and white highlight (n,) of points on the object."""
    normal = solid.normal(points / scale)
    sky = 0.72 + 0.28 * normal[:, 1]  # undersides face the floor, not the sky
    contact = 1 - 0.45 * np.exp(-points[:, 1] / (0.16 * scale))
    light = _AMBIENT * sky * contact + _DIFFUSE * np.clip(normal @ _LAMP, 0, 1)
    halfway = _unit(_LAMP - rays)
    return light, _GLOSS * np.clip(_dot(normal, halfway), 0, 1) ** 32


def _configuration(view: _View, lamp: np.ndarray, solid: Solid, scale: float, size: int) -> np.ndarray:
    """Return the byte maps (size, size, 4) of one object in one view: floor, wall, object, highlight."""
    maps = np.zeros((len(view.rays), 4))
    t = _hit_scaled(solid, scale, np.broadcast_to(view.eye, view.rays.shape), view.rays)
    on_object = t < view.distance
    points = view.eye + t[on_object, None] * view.rays[on_object]
    maps[on_object, 2], maps[on_object, 3] = _object_light(solid, scale, points, view.rays[on_object])
    behind = ~on_object
    lit = _hit_scaled(solid, scale, view.points[behind], lamp[behind]) >= _FAR
    gap = solid.outside(view.points[behind] / scale)
    contact = 1 - 0.42 * np.exp(-gap / 0.22) * view.is_floor[behind]
    light = (view.ambient[behind] + view.diffuse[behind] * lit) * contact
    maps[behind, 0] = light * view.is_floor[behind]
    maps[behind, 1] = light * ~view.is_floor[behind]
    return _as_bytes(reduce(maps, "(h p w q) maps -> h w maps", "mean", h=size, w=size, p=SAMPLES_PER_SIDE))


def _as_bytes(pixels: np.ndarray) -> np.ndarray:
    """Convert maps (..., 4) in [0, 1] to uint8 whose sum is at most 255, so that no colour can overflow."""
    maps = np.clip(np.rint(pixels * 255), 0, 255).astype(np.int64)
    maps[..., 3] = np.clip(255 - maps[..., :3].sum(-1), 0, maps[..., 3])
    return maps.astype(np.uint8)


def render_maps(size: int) -> np.ndarray:
    """Return the maps of all configurations by ray-casting.

    Args:
        size: side of the image in pixels.

    Returns:
        (480, size, size, 4) uint8: shares of floor, wall, object colour and white, where 255 is all; configurations in
        the order scale, shape, orientation (the last varies fastest).
    """
    pixels = size * SAMPLES_PER_SIDE
    lamp = _lamp_directions(pixels)
    out = np.empty((len(SCALES), len(SOLIDS), len(ORIENTATIONS), size, size, 4), np.uint8)
    for k, degrees in enumerate(ORIENTATIONS):
        view = _empty_view(degrees, pixels)
        for i, scale in enumerate(SCALES):
            for j, solid in enumerate(SOLIDS):
                out[i, j, k] = _configuration(view, lamp, solid, scale, size)
    return out.reshape(NUM_CONFIGURATIONS, size, size, 4)
