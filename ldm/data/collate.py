"""Collation of items to a batch: arrays are stacked, texts stay lists."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from ldm.util import UserError

_MOST_CHANNELS = 4
ITEM_NAMES = ("index", "file_path_", "relative_file_path_", "path")  # entries that name an item; two are those of LDM


def collate(items: Mapping[str, Any] | list[Mapping[str, Any]]) -> dict[str, Any]:
    """Collate items; a batch that the data set has already collated is returned as it is.

    Args:
        items: B dicts with the same keys, or a batch (a dict).

    Returns:
        Arrays, tensors and images of Pillow stacked to (B, ...), numbers as (B,), strings and lists (``text``) as lists
        of B entries; torch's own collate function would transpose lists of texts. Nested lists of numbers are arrays.

    Raises:
        UserError: the items are no dicts, or have different keys or image shapes.
    """
    if isinstance(items, Mapping):
        return dict(items)
    for item in items:
        if not isinstance(item, Mapping) or set(item) != set(items[0]):
            first, other = (sorted(x) if isinstance(x, Mapping) else type(x).__name__ for x in (items[0], item))
            raise UserError(f"data set: expected items that are dicts with the same keys, got {first} and {other}")
    return {key: _column(key, [item[key] for item in items], items) for key in items[0]}


def is_channel_first(shape: Sequence[int]) -> bool:
    """Return whether the shape of an image is (C, H, W) rather than (H, W, C): 1 or 3, and two larger sides."""
    return len(shape) == 3 and shape[0] in (1, 3) and min(shape[1:]) > _MOST_CHANNELS


def _column(key: str, values: list[Any], items: Sequence[Mapping[str, Any]]) -> Any:
    arrays = [_array(value) for value in values]
    if isinstance(arrays[0], torch.Tensor):
        shapes = [tuple(array.shape) if isinstance(array, torch.Tensor) else type(array).__name__ for array in arrays]
        odd = next((place for place, shape in enumerate(shapes) if shape != shapes[0]), None)
        if odd is None:
            return torch.stack(arrays)
        if not isinstance(values[0], (list, tuple)):  # the lengths of lists may differ, such as those of boxes
            first, other = (_named(place, items[place]) for place in (0, odd))
            raise UserError(
                f"data set: expected {key!r} of one shape in a batch, got {shapes[0]} of {first} and {shapes[odd]} of "
                f"{other}. Resize or crop them in the data set"
            )
    elif isinstance(values[0], (bool, int, float, np.integer, np.floating)):
        return torch.tensor(values)
    return values


def _array(value: Any) -> Any:
    """Return arrays, images of Pillow and nested lists of numbers as tensors; other values unchanged."""
    if isinstance(value, Image.Image):
        value = np.array(value if value.mode in ("L", "RGB") else value.convert("RGB"))
    elif isinstance(value, (list, tuple)) and value and isinstance(value[0], (list, tuple)):
        with contextlib.suppress(ValueError):  # rows of different lengths
            array = np.asarray(value)
            value = array if array.dtype.kind in "iuf" else value
    if isinstance(value, np.ndarray) and value.dtype.kind not in "OUS":
        return torch.from_numpy(np.asarray(value, order="C"))
    return value


def _named(place: int, item: Mapping[str, Any]) -> str:
    """Return the position of an item in its batch, with its row or file if these are known."""
    known = [f"{key} {item[key]}" for key in ITEM_NAMES if isinstance(item.get(key), (int, str))]
    return f"item {place} of the batch" + (f" ({known[0]})" if known else "")
