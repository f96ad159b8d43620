"""Reading attributes off an image embedding with nothing but the texts of a vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def attribute_probabilities(image_embedding: Tensor, vocabulary: Sequence[Tensor], logit_scale: float) -> list[Tensor]:
    """How probable CLIP finds each text of each attribute, an attribute at a time.

    ``p_k(w | x) = softmax_w(s <i(x), t_kw> / |i(x)|)``, Radford et al. 2021, section 3.1.2.

    Args:
        image_embedding: (B, D), normalised or not.
        vocabulary: for each of U attributes the normalised text embeddings (W_k, D).
        logit_scale: s, CLIP's inverse temperature.

    Returns:
        U tensors (B, W_k); rows sum to 1.
    """
    direction = F.normalize(image_embedding.float(), dim=-1)
    with torch.autocast(direction.device.type, enabled=False):  # halves would make near words equal
        return [torch.softmax(logit_scale * direction @ texts.T, dim=-1) for texts in vocabulary]


def attribute_hits(image_embedding: Tensor, vocabulary: Sequence[Tensor], labels: Tensor) -> Tensor:
    """Whether the most similar text of each attribute is the true one.

    Args:
        image_embedding: (B, D), normalised or not.
        vocabulary: for each of U attributes the normalised text embeddings (W_k, D).
        labels: (B, U) int, index of the true text of each attribute.

    Returns:
        bool (B, U).
    """
    with torch.autocast(image_embedding.device.type, enabled=False):  # halves would make near words equal
        guesses = [(image_embedding.float() @ texts.T).argmax(dim=-1) for texts in vocabulary]
    return torch.stack(guesses, dim=1) == labels
