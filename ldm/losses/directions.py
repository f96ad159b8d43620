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


def noiseclr_loss(chosen: Tensor, others: Tensor, temperature: float, everyone: Tensor | None = None) -> Tensor:
    """Return -log(pos / neg): one direction changes all images alike, other directions change the same image otherwise.

    With D_d^i the unit vector of the change that direction d causes in image i, pos is the mean of
    exp(D_d^i . D_d^i' / temperature) over pairs of images i < i', and neg is the mean of
    exp(D_d^i . D_j^i / temperature) over the M compared directions j and the B images (NoiseCLR, Eq. 5 and 6).

    Args:
        chosen: (B, N) unit changes by the chosen direction d.
        others: (M, B, N) unit changes by the compared directions.
        temperature: positive.
        everyone: (P, B, N) unit changes by d of the images of all P processes, of which this loss contains all pairs;
            None: those of this process alone.

    Returns:
        Scalar. The negatives are those of this process.

    Raises:
        ValueError: there are no pairs of images.
    """
    everyone = chosen if everyone is None else everyone.flatten(0, 1)
    if len(everyone) < 2:
        raise ValueError(f"noiseclr_loss: expected at least 2 images, got {len(everyone)}")
    rows, columns = torch.triu_indices(len(everyone), len(everyone), offset=1, device=everyone.device)
    positives = (everyone @ everyone.T)[rows, columns] / temperature
    negatives = torch.einsum("bn,mbn->mb", chosen, others).flatten() / temperature
    return log_mean_exp(negatives) - log_mean_exp(positives)


def log_mean_exp(values: Tensor) -> Tensor:
    """Return log(mean(exp(values))) of a vector."""
    return values.logsumexp(0) - math.log(len(values))
