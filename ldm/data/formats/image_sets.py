"""Sets of images in batches, from a folder of pictures or a file of arrays."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from ldm.data.formats.picture_files import decode_picture, find_pictures, to_array
from ldm.errors import reason_of
from ldm.util import UserError

KEYS = ("arr_0", "images", "data", "samples")  # names of the images' array in an npz, in order of preference


def image_batches(path: str | Path, batch_size: int = 50, is_unit_range: bool = False) -> Iterator[Tensor]:
    """Yield all images of a set in order, (B, 3, H, W), uint8 or float in [-1, 1].

    Args:
        path: a folder with pictures of one size, subfolders included, or an .npy or .npz file of (n, H, W, 3) or
            (n, 3, H, W), uint8 or float.
        batch_size: images at once.
        is_unit_range: floats are in [0, 1] instead of [-1, 1].

    Raises:
        UserError: the set is missing, empty, damaged, of several sizes, or not of images.
    """
    path = Path(path)
    if path.is_dir():
        yield from _pictures(path, batch_size)
        return
    images = read_array(path)
    if images.ndim != 4 or 3 not in (images.shape[1], images.shape[3]) or not len(images):
        raise UserError(f"{path}: expected images of shape (n, H, W, 3) or (n, 3, H, W), got {images.shape}")
    for start in range(0, len(images), batch_size):
        batch = torch.from_numpy(np.array(images[start : start + batch_size]))
        batch = batch if images.shape[1] == 3 else rearrange(batch, "b h w c -> b c h w")
        if batch.dtype != torch.uint8:
            batch = batch.float() * 2 - 1 if is_unit_range else batch.float()
        yield batch


def read_array(path: Path, keys: tuple[str, ...] = KEYS) -> np.ndarray:
    """Return the array of an .npy file, or the first of ``keys`` in an .npz.

    Raises:
        UserError: the file is missing or damaged, or has no such array.
    """
    try:
        content = np.load(path, mmap_mode="r" if path.suffix == ".npy" else None)
        if isinstance(content, np.ndarray):
            return content
        with content:
            key = next((key for key in keys if key in content.files), None)
            if key is None:
                raise UserError(f"{path}: expected an array {' or '.join(keys)}, got {', '.join(content.files)}")
            return content[key]
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path}: expected a folder of pictures, an .npy or an .npz file, got: {reason_of(error)}"
        ) from error


def _pictures(folder: Path, batch_size: int) -> Iterator[Tensor]:
    names = find_pictures(folder)
    if not names:
        raise UserError(f"{folder}: expected pictures, got none. Pass the folder that contains them.")
    shape: tuple[int, ...] | None = None
    for start in range(0, len(names), batch_size):
        arrays = []
        for name in names[start : start + batch_size]:
            array = to_array(decode_picture(folder / name, name))
            shape = shape or array.shape
            if array.shape != shape:
                raise UserError(
                    f"{folder / name}: expected {shape[1]} x {shape[0]} pixels, as {names[0]}, got {array.shape[1]} x "
                    f"{array.shape[0]}. Resize all pictures to one size."
                )
            arrays.append(array)
        yield rearrange(torch.from_numpy(np.stack(arrays)), "b h w c -> b c h w")
