"""Zero-shot classification of attributes from an image embedding and the text embeddings of a vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def attribute_probabilities(image_embedding: Tensor, vocabulary: Sequence[Tensor], logit_scale: float) -> list[Tensor]:
    """Return the probability of each text of each attribute.

    ``p_k(w | x) = softmax_w(s <i(x), t_kw> / |i(x)|)``, Radford et al. 2021, section 3.1.2.

    Args:
        image_embedding: (B, D), normalized or not.
        vocabulary: normalized text embeddings (W_k, D) for each of U attributes.
        logit_scale: s, CLIP's inverse temperature.

    Returns:
        U tensors (B, W_k); rows sum to 1.
    """
    direction = F.normalize(image_embedding.float(), dim=-1)
    with torch.autocast(direction.device.type, enabled=False):  # half precision cannot separate similar words
        return [torch.softmax(logit_scale * direction @ texts.T, dim=-1) for texts in vocabulary]


def attribute_hits(image_embedding: Tensor, vocabulary: Sequence[Tensor], labels: Tensor) -> Tensor:
    """Return whether the most similar text of each attribute is the true one, bool (B, U).

    The arguments are those of :func:`attribute_probabilities`, and ``labels`` (B, U) int, indices of the true texts.
    """
    with torch.autocast(image_embedding.device.type, enabled=False):  # half precision cannot separate similar words
        guesses = [(image_embedding.float() @ texts.T).argmax(dim=-1) for texts in vocabulary]
    return torch.stack(guesses, dim=1) == labels
