"""Traversals: one unit of an unsupervised method moves over its range, the other units and the noise are fixed.

They work for every model with units (``ldm.models.contracts.HasUnits``).

Dimensions: N images, U units, D width of a unit's code (absent where units are scalars), P points of a path.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ldm.models.contracts import HasUnits
from ldm.pictures.grid import CaptionedGrid

TAIL = 0.02  # share of the images left out at either end of a unit's range
DECODE_BATCH = 128  # images decoded at once: bounds the memory


def unit_path(codes: Tensor, unit: int, points: int) -> Tensor:
    """Return codes of one unit, evenly spaced over its range.

    A scalar unit moves from its 2nd to its 98th percentile, a vector along its first principal axis through the mean.

    Args:
        codes: (N, U) or (N, U, D) of real images.
        unit: index of the unit.
        points: P, at least 2.

    Returns:
        (P,) or (P, D).
    """
    values = codes[:, unit].float()
    shares = torch.tensor([TAIL, 1 - TAIL], device=values.device)
    steps = torch.linspace(0, 1, points, device=values.device)
    if values.ndim == 1:
        low, high = torch.quantile(values, shares)
        return torch.lerp(low, high, steps)
    mean = values.mean(dim=0)
    axis = torch.linalg.svd(values - mean, full_matrices=False).Vh[0]
    axis = axis * torch.where(axis[axis.abs().argmax()] < 0, -1.0, 1.0)  # SVD leaves the sign open
    low, high = torch.quantile((values - mean) @ axis, shares)
    return mean + torch.lerp(low, high, steps).unsqueeze(1) * axis


def traversed_codes(base: Tensor, path: Tensor, unit: int) -> Tensor:
    """Return every base code (N, U[, D]) with one unit at each point of path (P[, D]): (N * P, U[, D]), image-major."""
    codes = base.repeat_interleave(len(path), dim=0)
    codes[:, unit] = path.to(codes.dtype).repeat(len(base), *[1] * (path.ndim - 1))
    return codes


def decode_in_parts(model: HasUnits, codes: Tensor, x_T: Tensor, **options: Any) -> Tensor:
    """Call ``model.decode_units`` on any number of codes, ``DECODE_BATCH`` at a time."""
    parts = zip(codes.split(DECODE_BATCH), x_T.split(DECODE_BATCH))
    return torch.cat([model.decode_units(some, noise, **options) for some, noise in parts])


def unit_captions(model: HasUnits, units: Sequence[int]) -> list[str]:
    """Return ``unit 3``, or ``unit 3: object hue`` for a model whose units are named; counted from 1."""
    names = model.unit_names or [""] * model.latent_unit
    return [f"unit {unit + 1}" + (f": {names[unit].replace('_', ' ')}" if names[unit] else "") for unit in units]


def traversal_grid(
    model: HasUnits,
    codes: Tensor,
    base: Tensor,
    x_T: Tensor,
    units: Sequence[int] | None = None,
    points: int = 7,
    **options: Any,
) -> CaptionedGrid:
    """Return a grid of one image, with one unit over its range in each row.

    Args:
        model: the model, its averaged weights in place.
        codes: (N, U[, D]) of real images, which give the ranges.
        base: (1, U[, D]) code of the image that is changed.
        x_T: (1, C, H, W) noise.
        units: one row each; ``None`` for all.
        points: columns, at least 2.
        **options: of ``decode_units``.
    """
    units = range(model.latent_unit) if units is None else units
    moved = torch.cat([traversed_codes(base, unit_path(codes, unit, points), unit) for unit in units])
    images = decode_in_parts(model, moved, x_T.expand(len(moved), -1, -1, -1), **options)
    columns = ["low", *[""] * (points - 2), "high"]
    return CaptionedGrid(images, unit_captions(model, units), columns, "one unit over its range, all else equal")
