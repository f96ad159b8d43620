"""3dshapes from its published file, with texts; and a writer of such a file from the embedded world.

Layout of ``3dshapes.h5``: ``images`` (480000, 64, 64, 3) uint8 and ``labels`` (480000, 6) float64, in the order
floor hue, wall hue, object hue (0 to 0.9), scale (0.75 to 1.25), shape (0 to 3), orientation (-30 to 30).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ldm.data.factors import FactorSpace, factor_space
from ldm.data.factors.stored import StoredFactors
from ldm.data.formats.image_sources import H5_SUFFIXES, ImageArray
from ldm.data.paths import AnyPath, array_names, find_source
from ldm.data.rows import h5_array, npz_blocks, read_h5_rows, write_h5
from ldm.data.world import World3D, world_vocabulary
from ldm.ranges import Size
from ldm.util import UserError

_HUES = np.arange(10) / 10
LABEL_VALUES = (_HUES, _HUES, _HUES, np.linspace(0.75, 1.25, 8), np.arange(4.0), np.linspace(-30.0, 30.0, 15))
_FILES = array_names(["3dshapes"], ["", "shapes3d/"])
_NEXT_STEP = (
    "download it (github.com/google-deepmind/3d-shapes), write a stand-in with "
    "'python scripts/dataset.py world', or use target: ldm.data.world.World3D"
)
_WORLD_BLOCK = 960


def labels_of(rows: np.ndarray) -> np.ndarray:
    """Return the label values of rows as in the published file: (n,) int -> (n, 6) float64."""
    factors = factor_space("shapes3d").factors_of(rows)
    return np.stack([values[factors[:, k]] for k, values in enumerate(LABEL_VALUES)], axis=1)


def open_source(path: AnyPath | None = None) -> tuple[ImageArray, dict[str, list[int]] | None]:
    """Return the images of a 3dshapes file and the values of the factors in it; None if it contains all."""
    found = find_source("3dshapes", path, _FILES, _NEXT_STEP)
    source = ImageArray(found)
    space = factor_space("shapes3d")
    if source.count == space.size:
        rows = np.linspace(0, space.size - 1, 16).astype(np.int64)
        _check_labels(found, rows, _labels(found, source.count, rows))
        return source, None
    labels = _labels(found, source.count, np.arange(source.count))
    if labels is None:
        raise UserError(
            f"{found}: expected {space.size} images, or 'labels' of a part of 3dshapes; got {source.count} images "
            f"without labels. To get the whole set, {_NEXT_STEP}."
        )
    return source, _values_of(found, space, labels)


def _labels(path: Path, count: int, rows: np.ndarray) -> np.ndarray | None:
    """Return the labels of rows, (n, 6) float64; None if the file has none."""
    if path.suffix in H5_SUFFIXES:
        array = h5_array(path, "labels")
        with array.file:
            _check_label_array(path, count, array)
            return array[:] if len(rows) == count else read_h5_rows(array, rows)
    if path.suffix == ".npz":
        with np.load(path) as archive:
            if "labels" in archive.files:
                array = np.concatenate([*npz_blocks(path, "labels")])
                _check_label_array(path, count, array)
                return array[rows]
    return None


def _check_label_array(path: Path, count: int, array: np.ndarray | h5py.Dataset) -> None:
    wanted = (count, len(LABEL_VALUES))
    if array.shape != wanted or array.dtype.kind != "f":
        raise UserError(
            f"{path}: expected 'labels' of shape {wanted} float64, got {array.shape} {array.dtype}. To replace the "
            f"file, {_NEXT_STEP}."
        )


def _values_of(path: Path, space: FactorSpace, labels: np.ndarray) -> dict[str, list[int]]:
    """Return the values of each factor in the labels (n, 6) of a part of 3dshapes."""
    values = {}
    for name, known, column in zip(space.all_names, LABEL_VALUES, labels.T):
        shown = np.unique(column)
        nearest = np.abs(known[:, None] - shown).argmin(axis=0)
        if np.abs(known[nearest] - shown).max() > 1e-3 or len(set(nearest.tolist())) < len(shown):
            raise UserError(
                f"{path}: expected labels of {name} among {known.round(4).tolist()}, got {shown.tolist()[:20]}."
            )
        values[name] = nearest.tolist()
    part = space.restrict(values)
    if part.space.size != len(labels):
        sizes = " x ".join(map(str, part.space.all_sizes))
        raise UserError(
            f"{path}: expected each combination of the values in its labels once, {part.space.size} images ({sizes}); "
            f"got {len(labels)}. To replace the file, {_NEXT_STEP}."
        )
    _check_labels(path, part.rows, labels)
    return values


def _check_labels(path: Path, rows: np.ndarray, found: np.ndarray | None) -> None:
    expected = labels_of(rows)
    if found is not None and not np.allclose(found, expected, atol=1e-3):
        i = np.abs(found - expected).max(1).argmax()
        raise UserError(
            f"{path}: expected labels {expected[i].tolist()} of image {rows[i]} in the order of 3dshapes, got "
            f"{found[i].tolist()}."
        )


class Shapes3D(StoredFactors):
    """3dshapes (see ``FactorDataset`` for items and further options).

    It replaces ``World3D`` by one config line: factors, words, splits and options are the same. The published file is
    chunked across images; it is unpacked once to a cache. A file may contain only some values of the factors, if it
    has all combinations of these and labels.

    Args:
        path: the .h5, .npz or .npy file or its folder; None takes ``DATA_ROOT``.
        size: side of the images in pixels: 64, or 32 (means of 2 x 2 pixels).

    Raises:
        UserError: the file is missing or damaged, or its layout is wrong.
    """

    def __init__(self, path: AnyPath | None = None, size: Size = 64, **options: Any) -> None:
        source, self.available = open_source(path)
        super().__init__(
            space=factor_space("shapes3d"), vocabulary=world_vocabulary(), source=source, size=size, **options
        )


def write_shapes3d(
    path: AnyPath,
    keep: Mapping[str, int | Sequence[int]] | None = None,
    on_progress: Callable[[int], None] = lambda done: None,
) -> int:
    """Write the embedded world in the layout of ``3dshapes.h5``, atomically.

    Args:
        path: file to write.
        keep: values of the factors to write, in all combinations (``FactorSpace.restrict``).
        on_progress: called with the number of images written so far.

    Returns:
        The number of images written.

    Raises:
        ConfigError: a factor in ``keep`` is unknown.
        UserError: the file cannot be written.
    """
    world = World3D(size=64, keep=keep)
    parts = np.split(world.rows, range(_WORLD_BLOCK, len(world), _WORLD_BLOCK))
    images = (world.images(rows) for rows in parts)
    labels = {"labels": labels_of(world.rows)}
    write_h5(path, (len(world), 64, 64, 3), images, lambda: labels, on_progress=on_progress)
    return len(world)
