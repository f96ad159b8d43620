"""The embedded world: 480,000 images of a room with one object, in the order of 3dshapes, made in memory.

An image is the product of four byte maps (``ldm.data.world.geometry``), which are cached, with three hues and white.
"""

from __future__ import annotations

import functools
import logging
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from ldm.data.dataset import FactorDataset
from ldm.data.factors import factor_space
from ldm.data.options import require_choice
from ldm.data.paths import cache_folder
from ldm.data.world import geometry
from ldm.data.world.vocabulary import world_vocabulary
from ldm.ranges import Size
from ldm.util import atomic_write

logger = logging.getLogger(__name__)

SIZES = (32, 64)

# sRGB colours in the order of ``vocabulary.HUES``. They also differ in lightness (mint is pale, blue is dark), because
# shading changes the brightness of each.
_COLOURS = "e21c24 f58010 fae028 3cb830 78f0b0 14d4e0 4096fa 242cce 8224be fa64b8"
PALETTE = np.frombuffer(bytes.fromhex(_COLOURS), np.uint8).reshape(10, 3)

_CHUNK = 64  # images composed at once: their maps fit in the processor's cache


@functools.cache
def world_maps(size: int) -> np.ndarray:
    """Return the maps of all 480 configurations, (480, size * size, 4) float32 integers 0 to 255.

    They are read from the cache, or computed (seconds) if it is missing or damaged.
    """
    shape = (geometry.NUM_CONFIGURATIONS, size, size, 4)
    path = cache_folder() / f"world3d-v{geometry.GEOMETRY_VERSION}-{size}px.npz"
    maps = _read_cache(path, shape)
    if maps is None:
        logger.info("computing the %d configurations of the embedded world at %d px (once)", shape[0], size)
        maps = geometry.render_maps(size)
        _write_cache(path, maps)
    return maps.reshape(shape[0], size * size, 4).astype(np.float32)


def _read_cache(path: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    try:
        with np.load(path) as archive:  # a zip: its checksums reveal a damaged file
            maps = archive["maps"]
        if maps.shape != shape or maps.dtype != np.uint8:
            raise ValueError(f"expected {shape} uint8, got {maps.shape} {maps.dtype}")
        return maps
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        logger.warning("the cache %s could not be read (%s); computing it again", path, error)
        return None


def _write_cache(path: Path, maps: np.ndarray) -> None:
    try:
        with atomic_write(path, "wb") as stream:
            np.savez_compressed(stream, maps=maps)
    except OSError as error:
        logger.warning("the geometry could not be cached in %s (%s); the next run computes it again", path, error)


def compose(maps: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """Return the coloured maps.

    Args:
        maps: (480, pixels, 4) float32 integers 0 to 255, as returned by ``world_maps``.
        factors: (n, 6) int.

    Returns:
        (n, pixels, 3) uint8. All sums are integers below 2^24, so float32 is exact, and the bytes do not depend on the
        machine or the batch size.
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
    """The embedded world (see ``FactorDataset`` for items and further options).

    Factors in the order of 3dshapes: floor_hue 10, wall_hue 10, object_hue 10, scale 8, shape 4, orientation 15.

    Args:
        size: side of the images in pixels, 32 or 64.

    Example:
        >>> world = World3D(size=32, text="attributes", phrasing="canonical")
        >>> world[0]["text"]
        ['red floor', 'red wall', 'red object', 'tiny object', 'cube', 'seen from the far left']
    """

    in_memory = True

    def __init__(self, size: Size = 32, **options: Any) -> None:
        require_choice("size", size, SIZES)
        super().__init__(factor_space("shapes3d").named("world3d"), world_vocabulary(), **options)
        self.size = size
        world_maps(size)  # computed here, so that worker processes share them

    def images(self, rows: np.ndarray) -> np.ndarray:
        """Return images of rows of the whole world: (n,) int -> (n, size, size, 3) uint8."""
        rows = np.asarray(rows, dtype=np.int64)
        pixels = compose(world_maps(self.size), self.space.factors_of(rows))
        return pixels.reshape(len(rows), self.size, self.size, 3)
