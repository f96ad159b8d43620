"""Items to batch: images stacked, texts left as lists."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def collate(items: Mapping[str, Any] | list[Mapping[str, Any]]) -> dict[str, Any]:
    """Make a batch; a batch that a data set has made itself passes through.

    Args:
        items: B dicts with the same keys, or a ready batch (a dict).

    Returns:
        dict: arrays and tensors stacked to (B, ...), numbers as (B,), strings and lists (``text``) as a list of
        B entries. torch's own collate would transpose lists of texts.

    Raises:
        ValueError: items whose keys or image shapes differ, named.
    """
    if isinstance(items, Mapping):
        return dict(items)
    keys = set(items[0])
    for item in items:
        if set(item) != keys:
            raise ValueError(f"cannot make a batch of items with different keys: {sorted(keys)}, {sorted(item)}")
    return {key: _column(key, [item[key] for item in items]) for key in items[0]}


def _column(key: str, values: list[Any]) -> Any:
    first = values[0]
    if isinstance(first, np.ndarray):
        values, first = [torch.from_numpy(np.ascontiguousarray(v)) for v in values], torch.as_tensor(first)
    if isinstance(first, torch.Tensor):
        shapes = {tuple(v.shape) for v in values}
        if len(shapes) > 1:
            raise ValueError(
                f"cannot stack {key!r} of different shapes {sorted(shapes)} to one batch; "
                "let the data set resize them alike"
            )
        return torch.stack(values)
    if isinstance(first, (bool, int, float, np.integer, np.floating)):
        return torch.tensor(values)
    return values
