"""Treatments of the gap between CLIP's embeddings of images and of texts (Liang et al. 2022).

A model that is conditioned on image embeddings in training and on text embeddings in sampling meets vectors of another
region of the joint space. These functions make both kinds of vectors more alike.

Dimensions: N, M vectors, D width of the joint space.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def add_noise(embeddings: Tensor, std: float) -> Tensor:
    """Return normalize(h + std eps / |eps|) for vectors h (N, D) of length 1 (LAFITE_G, Zhou et al. 2022, Eq. 5)."""
    return F.normalize(embeddings + std * F.normalize(torch.randn_like(embeddings), dim=-1), dim=-1)


def remove_mean(embeddings: Tensor, mean: Tensor) -> Tensor:
    """Return normalize(h - mean) for vectors h (N, D) of length 1 and the mean (D,) of their modality."""
    return F.normalize(embeddings - mean, dim=-1)


def add_gap_noise(embeddings: Tensor, mean: Tensor, root: Tensor, std: float) -> Tensor:
    """Return normalize(h + mean + std root eps) with the gap's mean (D,) and root of the covariance (D, D)."""
    noise = std * torch.randn_like(embeddings) @ root.T if std else 0.0
    return F.normalize(embeddings + mean + noise, dim=-1)


def gap_statistics(images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean (D,) and root of the covariance (D, D) of the difference from a text to its image.

    Texts need no images of their own: each is compared with the image that is nearest after both means are removed.

    Args:
        images: (N, D) of length 1.
        texts: (M, D) of length 1.
    """
    images, texts = images.double(), texts.double()
    nearest = (remove_mean(texts, texts.mean(0)) @ remove_mean(images, images.mean(0)).T).argmax(dim=1)
    gap = texts - images[nearest]
    values, vectors = torch.linalg.eigh(torch.cov(gap.T, correction=0).reshape(gap.shape[1], -1))
    return gap.mean(0).float(), (vectors * values.clamp_min(0).sqrt()).float()


def nearest_images(texts: Tensor, bank: Tensor, count: int) -> Tensor:
    """Return the mean of the ``count`` image embeddings most similar to each text (kNN-Diffusion, Sheynin et al. 2023).

    Args:
        texts: (M, D).
        bank: (N, D) image embeddings; rows of zeros are unused.
        count: number of neighbors, at most the number of used rows.
    """
    similarity = F.normalize(texts, dim=-1) @ F.normalize(bank, dim=-1).T
    similarity = similarity.masked_fill((bank == 0).all(dim=1), -torch.inf)
    return bank[similarity.topk(count, dim=1).indices].mean(dim=1)


def modality_gap(images: Tensor, texts: Tensor) -> float:
    """Return the distance of the means of normalized embeddings (N, D) and (M, D) (Liang et al. 2022, Eq. 1)."""
    return (F.normalize(images, dim=-1).mean(0) - F.normalize(texts, dim=-1).mean(0)).norm().item()
