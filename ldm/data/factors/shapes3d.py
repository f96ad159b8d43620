"""3dshapes from its published file, with texts; and that file written from the embedded world.

Layout of ``3dshapes.h5``: ``images`` (480000, 64, 64, 3) uint8 and ``labels`` (480000, 6) float64, in the order
floor hue, wall hue, object hue (0 to 0.9), scale (0.75 to 1.25), shape (0 to 3), orientation (-30 to 30).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ldm.data.factors import FactorSpace, factor_space
from ldm.data.factors.stored import StoredFactors
from ldm.data.formats.h5_files import write_h5
from ldm.data.formats.image_sources import H5_SUFFIXES, ImageArray, h5_array
from ldm.data.places import find_source
from ldm.data.rows import npz_blocks, read_h5_rows
from ldm.data.vocabulary import world_vocabulary
from ldm.data.world import World3D
from ldm.util import UserError

IMAGE_SHAPE = (64, 64, 3)
LABEL_VALUES = (
    np.arange(10) / 10,
    np.arange(10) / 10,
    np.arange(10) / 10,
    np.linspace(0.75, 1.25, 8),
    np.arange(4.0),
    np.linspace(-30.0, 30.0, 15),
)
_PLACES = (
    "3dshapes.npy",
    "shapes3d/3dshapes.npy",
    "3dshapes.h5",
    "shapes3d/3dshapes.h5",
    "3dshapes.npz",
    "shapes3d/3dshapes.npz",
)
_NEXT_STEP = (
    "download it (github.com/google-deepmind/3d-shapes), write a stand-in with "
    "'python scripts/dataset.py world', or use target: ldm.data.world.World3D"
)
_WORLD_BLOCK = 960


def labels_of(rows: np.ndarray) -> np.ndarray:
    """Label values of rows as the published file holds them: (n,) int -> (n, 6) float64."""
    factors = factor_space("shapes3d").factors_of(rows)
    return np.stack([values[factors[:, k]] for k, values in enumerate(LABEL_VALUES)], axis=1)


def open_source(path: str | os.PathLike | None = None) -> tuple[ImageArray, dict[str, list[int]] | None]:
    """The images of a 3dshapes file, and which values of the factors it holds; None for all.

    Raises:
        UserError: file missing, damaged, of another layout or in another order.
    """
    found = find_source("3dshapes", path, _PLACES, _NEXT_STEP)
    source = ImageArray(found)
    space = factor_space("shapes3d")
    is_whole = source.count == space.size
    rows = np.linspace(0, space.size - 1, 16).astype(np.int64) if is_whole else np.arange(source.count)
    labels = _labels(found, source.count, rows)
    if is_whole:
        if labels is not None:
            _check_labels(found, rows, labels, labels_of(rows))
        return source, None
    if labels is None:
        raise UserError(
            f"{found} holds {source.count} images, expected {space.size}: a part of 3dshapes needs "
            f"'labels' that tell which. Otherwise {_NEXT_STEP}"
        )
    return source, _values_of(found, space, labels)


def _labels(path: Path, count: int, rows: np.ndarray) -> np.ndarray | None:
    """Labels of rows, (n, 6) float64; None for a file that has none and needs none."""
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
            f"{path}: 'labels' is {array.shape} {array.dtype}, expected {wanted} float64. Otherwise {_NEXT_STEP}"
        )


def _values_of(path: Path, space: FactorSpace, labels: np.ndarray) -> dict[str, list[int]]:
    """Which values of each factor the labels (n, 6) of a part of 3dshapes show."""
    values = {}
    for name, known, column in zip(space.all_names, LABEL_VALUES, labels.T):
        shown = np.unique(column)
        nearest = np.abs(known[:, None] - shown).argmin(axis=0)
        if np.abs(known[nearest] - shown).max() > 1e-3 or len(set(nearest.tolist())) < len(shown):
            raise UserError(
                f"{path}: labels give {name} the values {shown.tolist()[:20]}, expected some of "
                f"{known.round(4).tolist()}"
            )
        values[name] = nearest.tolist()
    part = space.restrict(values)
    if part.space.size != len(labels):
        sizes = " x ".join(map(str, part.space.all_sizes))
        raise UserError(
            f"{path} holds {len(labels)} images, but the values in its labels make {part.space.size} "
            f"({sizes}): each combination has to be there once. Otherwise {_NEXT_STEP}"
        )
    _check_labels(path, part.rows, labels, labels_of(part.rows))
    return values


def _check_labels(path: Path, rows: np.ndarray, found: np.ndarray, expected: np.ndarray) -> None:
    if not np.allclose(found, expected, atol=1e-3):
        i = np.abs(found - expected).max(1).argmax()
        raise UserError(
            f"{path}: labels of image {rows[i]} are {found[i].tolist()}, expected {expected[i].tolist()}; "
            "the images are not in the order of 3dshapes"
        )


class Shapes3D(StoredFactors):
    """3dshapes (see ``FactorDataset`` for what an item holds and for the other options).

    A stand-in for ``World3D`` by one config line: same factors, words, splits and options. The published file is
    chunked across images; the first use unpacks such a file once to a cache. A file may hold some values of the
    factors only, if all combinations of these are there and its labels say so.

    Args:
        path: the .h5, .npz or .npy file or its folder; None takes the folder in the variable ``DATA_ROOT``.
        size: side of the images in pixels: 64, or 32 (means of 2 x 2 pixels).

    Raises:
        UserError: file missing, damaged, or of another layout.
    """

    def __init__(self, path: str | os.PathLike | None = None, size: int = 64, **options: Any) -> None:
        source, self.available = open_source(path)
        super().__init__(
            space=factor_space("shapes3d"), vocabulary=world_vocabulary(), source=source, size=size, **options
        )


def write_shapes3d(
    path: str | os.PathLike,
    keep: Mapping[str, int | Sequence[int]] | None = None,
    on_progress: Callable[[int], None] = lambda done: None,
) -> int:
    """Write the embedded world in the layout of ``3dshapes.h5``; the file appears only when it is whole.

    Args:
        path: of the file.
        keep: write only some values of the factors, in all combinations (``FactorSpace.restrict``).
        on_progress: called with the number of images written so far.

    Returns:
        The number of images written.

    Raises:
        ConfigError: an unknown factor in ``keep``.
        UserError: the file cannot be written.
    """
    world = World3D(size=64, keep=keep)
    parts = np.split(world.rows, range(_WORLD_BLOCK, len(world), _WORLD_BLOCK))
    write_h5(
        path,
        (len(world), *IMAGE_SHAPE),
        (world.images(rows) for rows in parts),
        lambda: {"labels": labels_of(world.rows)},
        on_progress=on_progress,
    )
    return len(world)
