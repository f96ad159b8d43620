"""Collation of items to a batch: arrays are stacked, texts stay lists."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def collate(items: Mapping[str, Any] | list[Mapping[str, Any]]) -> dict[str, Any]:
    """Collate items; a batch that the data set has already collated is returned as it is.

    Args:
        items: B dicts with the same keys, or a batch (a dict).

    Returns:
        Arrays and tensors stacked to (B, ...), numbers as (B,), strings and lists (``text``) as lists of B entries;
        torch's own collate function would transpose lists of texts.

    Raises:
        ValueError: the items have different keys or image shapes.
    """
    if isinstance(items, Mapping):
        return dict(items)
    keys = set(items[0])
    for item in items:
        if set(item) != keys:
            raise ValueError(f"collate: expected items with the same keys, got {sorted(keys)} and {sorted(item)}.")
    return {key: _column(key, [item[key] for item in items]) for key in items[0]}


def _column(key: str, values: list[Any]) -> Any:
    if isinstance(values[0], np.ndarray):
        values = [torch.from_numpy(np.asarray(value, order="C")) for value in values]
    if isinstance(values[0], torch.Tensor):
        shapes = {tuple(value.shape) for value in values}
        if len(shapes) > 1:
            raise ValueError(f"collate: expected {key!r} of one shape, got {sorted(shapes)}. Resize them.")
        return torch.stack(values)
    if isinstance(values[0], (bool, int, float, np.integer, np.floating)):
        return torch.tensor(values)
    return values
