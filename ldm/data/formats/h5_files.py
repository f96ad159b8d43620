"""Writing HDF5 files that are read image by image."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ldm.data.rows import explained_writing


def write_h5(
    path: str | os.PathLike,
    shape: tuple[int, ...],
    blocks: Iterable[np.ndarray],
    arrays: Callable[[], Mapping[str, np.ndarray]] = dict,
    attributes: Mapping[str, Any] | None = None,
    on_progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Write ``images`` and further arrays; the file appears under its name only when it is whole.

    Each image is a compressed chunk of its own, so that random ones read quickly.

    Args:
        path: of the file.
        shape: (count, H, W, C) of the images.
        blocks: the images in order, (n, H, W, C) uint8 each.
        arrays: gives further arrays by name (strings as objects), asked when all images are written.
        attributes: of the file.
        on_progress: called with the number of images written so far.

    Raises:
        UserError: the file cannot be written.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    with explained_writing(target, int(np.prod(shape))):
        try:
            with h5py.File(temporary, "w") as file:
                images = file.create_dataset(
                    "images", shape, np.uint8, compression="gzip", compression_opts=1, chunks=(1, *shape[1:])
                )
                _fill(images, blocks, on_progress)
                for name, array in arrays().items():
                    file.create_dataset(name, data=array, dtype=h5py.string_dtype() if array.dtype == object else None)
                file.attrs.update(attributes or {})
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)


def _fill(images: h5py.Dataset, blocks: Iterable[np.ndarray], on_progress: Callable[[int], None]) -> None:
    done = 0
    for block in blocks:
        images[done : done + len(block)] = block
        done += len(block)
        on_progress(done)
