"""The disentangling loss of DisDiff (Yang et al. 2023), and its CLIP form.

Dimensions: B batch, U units (one per factor or attribute), D width of a unit's code.

One unit s is drawn per sample. Its sub-gradient alone is added to the frozen prediction, the result is looked at by
an encoder, and two classifications are asked for: *which unit came closer to its code?* (variant) and *which unit
changed at all?* (invariant). Both should answer s.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def disentangling_loss(variant: Tensor, invariant: Tensor, unit: Tensor, weight: Tensor) -> Tensor:
    """weight * (CE(variant, unit) + CE(invariant, unit)) per sample.

    Args:
        variant: (B, U) logits, how much each unit approached its code.
        invariant: (B, U) logits, how much each unit changed.
        unit: (B,) int64, the unit whose sub-gradient was added.
        weight: (B,) non-negative, no gradient: the squared change of the prediction, times a constant.

    Returns:
        (B,) loss.
    """
    both = F.cross_entropy(variant, unit, reduction="none") + F.cross_entropy(invariant, unit, reduction="none")
    return weight * both


def disdiff_logits(before: Tensor, after: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
    """DisDiff's logits from an image encoder with U units.

    Args:
        before: (B, U, D) units read from the base prediction.
        after: (B, U, D) units read from the prediction with one sub-gradient added.
        code: (B, U, D) units of the clean image.

    Returns:
        variant and invariant logits, (B, U) each: |before - code| - |after - code| and |before - after|.
    """
    variant = _distance(before, code) - _distance(after, code)
    return variant, _distance(before, after)


def clip_logits_reference(before: Tensor, after: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """The logits the CLIP-DisDiff code computes, kept for parity only.

    Cross entropy then *maximises* the distance of the drawn unit to its text (the minus of DisDiff was lost together
    with the term that has no gradient), and features of different norms are compared.

    Args:
        before: (B, D) image features of the base prediction, as CLIP returns them.
        after: (B, U, D) image features with unit k's sub-gradient added at [:, k].
        text: (B, U, D) unit-norm text features.

    Returns:
        (B, U) logits |after - text| and |before - after|.
    """
    return _distance(after, text), _distance(before.unsqueeze(1), after)


def clip_logits_aligned(before: Tensor, after: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """The intended logits: a unit's edit should bring the image closer to that unit's text.

    Args:
        before: (B, D) image features of the base prediction.
        after: (B, U, D) image features with unit k's sub-gradient added at [:, k].
        text: (B, U, D) unit-norm text features.

    Returns:
        (B, U) logits |before - text| - |after - text| and |before - after|, on unit-norm features.
    """
    before, after = F.normalize(before, dim=-1).unsqueeze(1), F.normalize(after, dim=-1)
    return _distance(before, text) - _distance(after, text), _distance(before, after)


def clip_logits_sampled(before: Tensor, after: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """The aligned logits when only the drawn unit's edit was decoded, at 1/U of the cost.

    Both questions are put to the one edited image: of all texts of the sample, which did it approach, and along which
    text's direction did it move?

    Args:
        before: (B, D) image features of the base prediction.
        after: (B, D) image features with the drawn unit's sub-gradient added.
        text: (B, U, D) unit-norm text features.

    Returns:
        (B, U) logits |before - text_j| - |after - text_j| and |<after - before, text_j>|.
    """
    before, after = F.normalize(before, dim=-1).unsqueeze(1), F.normalize(after, dim=-1).unsqueeze(1)
    moved_along = torch.einsum("bod,bud->bu", after - before, text).abs()
    return _distance(before, text) - _distance(after, text), moved_along


def _distance(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distance over the last axis; its gradient at zero is zero, which a zero-initialised decoder needs."""
    return torch.linalg.vector_norm(a - b, dim=-1)
