"""Disentangling loss of DisDiff (Yang et al. 2023) and its variants on CLIP features.

Legend: B batch, U units (one per factor or attribute), D width of a unit's code.

One unit s is drawn per sample. Only its sub-gradient is added to the frozen prediction, and an encoder maps the result
to codes. Two classifications are trained to predict s: the unit that moved towards its code (variant) and the unit that
changed (invariant).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def disentangling_loss(variant: Tensor, invariant: Tensor, unit: Tensor, weight: Tensor) -> Tensor:
    """Return weight * (CE(variant, unit) + CE(invariant, unit)) of each sample.

    Args:
        variant: (B, U) logits: the approach of each unit to its code.
        invariant: (B, U) logits: the change of each unit.
        unit: (B,) int64, the unit whose sub-gradient was added.
        weight: (B,) non-negative, detached: the squared change of the prediction, times a constant.

    Returns:
        (B,) loss.
    """
    both = F.cross_entropy(variant, unit, reduction="none") + F.cross_entropy(invariant, unit, reduction="none")
    return weight * both


def disdiff_logits(before: Tensor, after: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits of DisDiff from an image encoder with U units.

    Args:
        before: (B, U, D) units of the base prediction.
        after: (B, U, D) units of the prediction with one sub-gradient added.
        code: (B, U, D) units of the clean image.

    Returns:
        Variant and invariant logits, (B, U) each: |before - code| - |after - code| and |before - after|.
    """
    variant = _distance(before, code) - _distance(after, code)
    return variant, _distance(before, after)


def clip_logits_reference(before: Tensor, after: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits of the CLIP-DisDiff reference code, for parity only.

    With these logits, cross-entropy *maximizes* the distance of the drawn unit to its text, because the sign of DisDiff
    was lost together with the term without gradient; and features of different norms are compared.

    Args:
        before: (B, D) image features of the base prediction, as CLIP returns them.
        after: (B, U, D) image features; the sub-gradient of unit k is added in [:, k].
        text: (B, U, D) unit-norm text features.

    Returns:
        (B, U) logits |after - text| and |before - after|.
    """
    return _distance(after, text), _distance(before.unsqueeze(1), after)


def clip_logits_aligned(before: Tensor, after: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """Return the intended logits: the edit of a unit should move the image towards the text of the unit.

    Args:
        before: (B, D) image features of the base prediction.
        after: (B, U, D) image features; the sub-gradient of unit k is added in [:, k].
        text: (B, U, D) unit-norm text features.

    Returns:
        (B, U) logits |before - text| - |after - text| and |before - after|, on unit-norm features.
    """
    before, after = F.normalize(before, dim=-1).unsqueeze(1), F.normalize(after, dim=-1)
    return _distance(before, text) - _distance(after, text), _distance(before, after)


def clip_logits_sampled(before: Tensor, after: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """Return the aligned logits if only the edit of the drawn unit is decoded, at 1/U of the cost.

    Both classifications use the one edited image: the text of the sample that it approached, and the text along whose
    direction it moved.

    Args:
        before: (B, D) image features of the base prediction.
        after: (B, D) image features with the sub-gradient of the drawn unit added.
        text: (B, U, D) unit-norm text features.

    Returns:
        (B, U) logits |before - text_j| - |after - text_j| and |<after - before, text_j>|.
    """
    before, after = F.normalize(before, dim=-1).unsqueeze(1), F.normalize(after, dim=-1).unsqueeze(1)
    moved_along = torch.einsum("bod,bud->bu", after - before, text).abs()
    return _distance(before, text) - _distance(after, text), moved_along


def _distance(a: Tensor, b: Tensor) -> Tensor:
    """Return the Euclidean distance over the last axis; its gradient at 0 is 0, not NaN."""
    return torch.linalg.vector_norm(a - b, dim=-1)
