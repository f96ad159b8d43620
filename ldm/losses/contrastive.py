"""Contrastive loss for captions that match several images.

Legend: B images, C captions, U attributes.

A caption that names some attributes only ("red floor, small object") matches every image that has them. The one-to-one
loss of CLIP counts these pairs as negatives and would train the towers to separate images with equal captions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.data.vocabulary import UNKNOWN


def caption_matches(image_labels: Tensor, caption_labels: Tensor, caption_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return which captions match which images, and which contradict which.

    A pair is neither if the image's value of an attribute that the caption names is unknown and the others agree, or if
    the caption names no attribute.

    Args:
        image_labels: (B, U) int, word of each attribute of each image, or ``UNKNOWN``.
        caption_labels: (C, U) int, words of the image that each caption was written for.
        caption_mask: (C, U) bool, attributes that the caption names.

    Returns:
        (B, C) bool, True where all named attributes agree; (B, C) bool, True where a named and known one does not.
    """
    agree = image_labels[:, None] == caption_labels  # (B, C, U)
    matches = (agree | ~caption_mask).all(dim=-1) & caption_mask.any(dim=-1)
    return matches, (~agree & caption_mask & (image_labels != UNKNOWN)[:, None]).any(dim=-1)


def multi_positive_loss(logits: Tensor, matches: Tensor, contradictions: Tensor | None = None) -> Tensor:
    """Return the symmetric InfoNCE loss in which every true pair competes with the false pairs of its row or column.

    It extends CLIP's loss (Radford et al. 2021, figure 3) to several true pairs: for each true pair p of a row with the
    false entries N,  -log( e^z_p / (e^z_p + sum_{n in N} e^z_n) ),  averaged over the true pairs of the row, then over
    rows. Unlike cross-entropy with a uniform target, it does not separate true pairs, and its minimum is 0. With one
    true pair per row it equals CLIP's loss. Rows and columns without a true pair are ignored.

    Args:
        logits: (B, C) scaled similarities.
        matches: (B, C) bool, the true pairs.
        contradictions: (B, C) bool, the false pairs; None: all that are not true. Other pairs are ignored.

    Returns:
        Scalar.
    """
    false = ~matches if contradictions is None else contradictions
    return (_info_nce(logits, matches, false) + _info_nce(logits.T, matches.T, false.T)) / 2


def _info_nce(logits: Tensor, matches: Tensor, false: Tensor) -> Tensor:
    """Return the loss of one direction: the mean over rows with a true entry, (n, m) to ()."""
    lowest = torch.finfo(logits.dtype).min
    false_mass = torch.logsumexp(logits.masked_fill(~false, lowest), dim=1, keepdim=True)  # (n, 1)
    per_pair = F.softplus(false_mass - logits)  # -log(e^z / (e^z + e^false_mass))
    num_true = matches.sum(dim=1)
    per_row = torch.where(matches, per_pair, 0.0).sum(dim=1) / num_true.clamp(min=1)
    return per_row.sum() / (num_true > 0).sum().clamp(min=1)
