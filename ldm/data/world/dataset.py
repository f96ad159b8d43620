"""The embedded default world: 480,000 pictures of a room with one object, in 3dshapes' order, made in memory.

Nothing is downloaded and nothing but a small cache of the geometry is stored: an image is the product of four
byte maps (``ldm.data.world.geometry``) with the hues of floor, wall and object, and white.
"""

from __future__ import annotations

import functools
import logging
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from ldm.data.cache import cache_folder
from ldm.data.dataset import FactorDataset
from ldm.data.factors import factor_space
from ldm.data.vocabulary import world_vocabulary
from ldm.data.world import geometry as world_geometry
from ldm.util import ConfigError, atomic_write

logger = logging.getLogger(__name__)

SIZES = (32, 64)

# sRGB bytes of the ten hues, in the order of ``vocabulary.HUES``. Lightness helps where hue alone would not
# (mint is pale, blue is dark), because shading changes the brightness of each.
PALETTE = np.array(
    [
        (226, 28, 36),
        (245, 128, 16),
        (250, 224, 40),
        (60, 184, 48),
        (120, 240, 176),
        (20, 212, 224),
        (64, 150, 250),
        (36, 44, 206),
        (130, 36, 190),
        (250, 100, 184),
    ],
    dtype=np.uint8,
)

_CHUNK = 64  # images composed at once: their maps stay in the processor's cache


@functools.cache
def world_maps(size: int) -> np.ndarray:
    """Maps of all 480 configurations, float32 whole numbers 0..255, (480, size * size, 4).

    Read from the cache where they lie, made anew (seconds) where they do not, or do not read.
    """
    shape = (world_geometry.NUM_CONFIGURATIONS, size, size, 4)
    path = cache_folder() / f"world3d-v{world_geometry.GEOMETRY_VERSION}-{size}px.npz"
    maps = _read_cache(path, shape)
    if maps is None:
        logger.info("ray-casting the world's %d configurations at %d px (once)", shape[0], size)
        maps = world_geometry.render_maps(size)
        _write_cache(path, maps)
    return maps.reshape(shape[0], size * size, 4).astype(np.float32)


def _read_cache(path: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    try:
        with np.load(path) as archive:  # a zip: its checksums tell a damaged file
            maps = archive["maps"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as err:
        logger.warning("the cache %s cannot be read (%s); making it anew", path, err)
        return None
    if maps.shape != shape or maps.dtype != np.uint8:
        logger.warning(
            "the cache %s holds %s %s, expected %s uint8; making it anew", path, maps.shape, maps.dtype, shape
        )
        return None
    return maps


def _write_cache(path: Path, maps: np.ndarray) -> None:
    try:
        with atomic_write(path, "wb") as stream:
            np.savez_compressed(stream, maps=maps)
    except OSError as err:
        logger.warning("the world's geometry could not be cached in %s (%s); the next run makes it again", path, err)


def compose(maps: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """Colour the maps.

    Args:
        maps: (480, pixels, 4) float32 whole numbers 0..255, as from ``world_maps``.
        factors: (n, 6) int.

    Returns:
        (n, pixels, 3) uint8. All sums are whole numbers below 2^24, so float32 is exact and every machine and
        every batch size gives the same bytes.
    """
    configuration = (factors[:, 3] * 4 + factors[:, 4]) * 15 + factors[:, 5]
    colours = np.full((len(factors), 4, 3), 255, np.float32)
    colours[:, :3] = PALETTE[factors[:, :3]]
    out = np.empty((len(factors), maps.shape[1], 3), np.uint8)
    for start in range(0, len(factors), _CHUNK):
        part = slice(start, start + _CHUNK)
        light = maps[configuration[part]] @ colours[part]
        light += 127.0
        light *= np.float32(1 / 255)
        out[part] = light
    return out


class World3D(FactorDataset):
    """The embedded world (see ``FactorDataset`` for the other options and for what an item holds).

    Factors in 3dshapes' order: floor_hue 10, wall_hue 10, object_hue 10, scale 8, shape 4, orientation 15.

    Args:
        size: side of the images in pixels, 32 or 64.

    Example:
        >>> world = World3D(size=32, text="attributes", phrasing="canonical")
        >>> world[0]["text"]
        ['red floor', 'red wall', 'red object', 'tiny object', 'cube', 'seen from the far left']
    """

    in_memory = True

    def __init__(self, size: int = 32, **options: Any) -> None:
        if size not in SIZES:
            raise ConfigError(f"World3D: size must be 32 or 64 pixels, found {size!r}")
        super().__init__(factor_space("shapes3d"), world_vocabulary(), **options)
        self.size = size
        world_maps(size)  # made now, before worker processes would each make them

    def images(self, rows: np.ndarray) -> np.ndarray:
        """Images of rows of the whole world: (n,) int -> (n, size, size, 3) uint8."""
        rows = np.asarray(rows, dtype=np.int64)
        pixels = compose(world_maps(self.size), self.space.factors_of(rows))
        return pixels.reshape(len(rows), self.size, self.size, 3)
