"""Contrastive loss for captions that fit several images.

Dims: B images, C captions, U attributes.

A caption that names only some attributes ("red floor, small object") fits every image that has them. Counting those
pairs as negatives, as CLIP's one-to-one loss does, would teach the towers to tell apart what the words do not.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def caption_matches(image_labels: Tensor, caption_labels: Tensor, caption_mask: Tensor) -> Tensor:
    """Which captions are true of which images.

    Args:
        image_labels: (B, U) int, word of each attribute of each image.
        caption_labels: (C, U) int, words of the image each caption was written for.
        caption_mask: (C, U) bool, the attributes the caption names.

    Returns:
        bool (B, C): all named attributes agree.
    """
    agree = image_labels[:, None] == caption_labels[None]  # (B, C, U)
    return (agree | ~caption_mask[None]).all(dim=-1)


def multi_positive_loss(logits: Tensor, matches: Tensor) -> Tensor:
    """Symmetric InfoNCE in which every true pair competes with the false pairs of its row or column only.

    CLIP's loss (Radford et al. 2021, figure 3) for several truths: for each true pair p of a row with the false
    entries N,  -log( e^z_p / (e^z_p + sum_{n in N} e^z_n) ),  averaged over the row's true pairs, then over rows.
    Unlike a cross-entropy against a uniform target it does not push true pairs apart, and reaches 0. With one
    truth per row it is CLIP's loss. Rows or columns without any true pair teach nothing and are left out.

    Args:
        logits: (B, C) scaled similarities.
        matches: (B, C) bool.

    Returns:
        Scalar.
    """
    return (_info_nce(logits, matches) + _info_nce(logits.T, matches.T)) / 2


def _info_nce(logits: Tensor, matches: Tensor) -> Tensor:
    """One direction: the mean over rows with a true entry, (n, m) -> ()."""
    lowest = torch.finfo(logits.dtype).min
    false_mass = torch.logsumexp(logits.masked_fill(matches, lowest), dim=1, keepdim=True)  # (n, 1)
    per_pair = F.softplus(false_mass - logits)  # -log(e^z / (e^z + e^false_mass))
    num_true = matches.sum(dim=1)
    per_row = torch.where(matches, per_pair, 0.0).sum(dim=1) / num_true.clamp(min=1)
    return per_row.sum() / (num_true > 0).sum().clamp(min=1)
