"""Contrastive loss of latent directions (NoiseCLR, Dalva & Yanardag 2024).

Legend: B images, M compared directions, N = C h w values of a latent.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_NORM_EPS = 1e-20  # added to norms in the reference code


def unit_changes(changes: Tensor) -> Tensor:
    """Return changes of the predicted noise, (..., C, h, w), as vectors of length 1, (..., N) float32."""
    flat = changes.flatten(-3).float()
    return flat / (flat.norm(dim=-1, keepdim=True) + _NORM_EPS)


def noiseclr_loss(chosen: Tensor, similarities: Tensor, temperature: float) -> Tensor:
    """Return -log(pos / neg): one direction changes all images alike, other directions change the same image otherwise.

    With D_d^i the unit vector of the change that direction d causes in image i, pos is the mean of
    exp(D_d^i . D_d^i' / temperature) over pairs of images i < i', and neg is the mean of
    exp(D_d^i . D_j^i / temperature) over the M compared directions j and the B images (NoiseCLR, Eq. 5 and 6).

    Args:
        chosen: (B, N) unit changes D_d^i by the chosen direction d.
        similarities: (..., M, B) products D_d^i . D_j^i.
        temperature: positive.

    Returns:
        Scalar.

    Raises:
        ValueError: there are no pairs of images.
    """
    if len(chosen) < 2:
        raise ValueError(f"noiseclr_loss: expected at least 2 images, got {len(chosen)}")
    rows, columns = torch.triu_indices(len(chosen), len(chosen), offset=1, device=chosen.device)
    positives = (chosen @ chosen.T)[rows, columns]
    return log_mean_exp(similarities.flatten() / temperature) - log_mean_exp(positives / temperature)


def log_mean_exp(values: Tensor) -> Tensor:
    """Return log(mean(exp(values))) of a vector."""
    return values.logsumexp(0) - math.log(len(values))
