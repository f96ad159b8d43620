"""Representation of CLIP-DisDiff: attribute-wise codes of a CLIP image embedding.

The model is conditioned on one text embedding per unit, but an image without texts has one embedding for all
attributes. This module returns the expected text embedding of every unit under CLIP's zero-shot posterior. With the
normalized image embedding i, the W_k text embeddings t_kw of unit k and the inverse temperature s:

    p_kw = softmax_w(s <i, t_kw>)                       posterior of unit k
    m_k  = sum_w p_kw t_kw                              its expected text embedding, D numbers
    z_k  = V_k^T (m_k - mean_w t_kw)                    the same point in coordinates, R numbers

The columns of V_k are an orthonormal basis of the span of the centred texts, which has at most W_k - 1 dimensions and
contains ``m_k - mean``. Hence z_k is an isometric copy of m_k in R = max_k rank instead of D numbers: distances, and
the first principal component of each unit, which the metrics use, are unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ldm.modules.encoders.zero_shot import attribute_probabilities


class AttributeReadout(nn.Module):
    """Map from an image embedding to one small vector per attribute (see the module docstring).

    Args:
        vocabulary: normalized text embeddings (W_k, D) for each of U attributes.
        logit_scale: s, CLIP's inverse temperature.
        temperature: divisor of s; above 1 the posterior is softer and the codes change more smoothly.

    Attributes:
        num_units: U.
        width: R, the largest rank of the centred texts of an attribute; other codes are padded with zeros.
    """

    def __init__(self, vocabulary: Sequence[Tensor], logit_scale: float, temperature: float = 1.0) -> None:
        super().__init__()
        coordinates = [centred_coordinates(texts) for texts in vocabulary]
        self.num_units = len(vocabulary)
        self.width = max(points.shape[1] for points in coordinates)
        self.scale = logit_scale / temperature
        for unit, (texts, points) in enumerate(zip(vocabulary, coordinates)):
            padded = nn.functional.pad(points, (0, self.width - points.shape[1]))
            self.register_buffer(f"texts_{unit}", texts.detach().clone(), persistent=False)
            self.register_buffer(f"points_{unit}", padded.to(texts.device), persistent=False)

    def forward(self, image_embedding: Tensor) -> Tensor:
        """Map image embeddings (B, D), normalized or not, to the codes of all attributes, float32 (B, U, R)."""
        texts, points = (
            [self.get_buffer(f"{kind}_{unit}") for unit in range(self.num_units)] for kind in ("texts", "points")
        )
        posteriors = attribute_probabilities(image_embedding.float(), texts, self.scale)
        with torch.autocast(image_embedding.device.type, enabled=False):
            units = [posterior @ coordinates for posterior, coordinates in zip(posteriors, points)]
        return torch.stack(units, dim=1)


def centred_coordinates(points: Tensor) -> Tensor:
    """Return the coordinates of points (W, D) in an orthonormal basis of their centred span, an isometry.

    The result is float32 (W, rank) with 1 <= rank <= W - 1, or 1 for equal points.
    """
    centred = points.detach().double().cpu()
    centred = centred - centred.mean(dim=0)
    left, singular, _ = torch.linalg.svd(centred, full_matrices=False)
    # threshold of torch.linalg.matrix_rank for the precision of the float32 input
    tolerance = singular.amax() * max(points.shape) * torch.finfo(torch.float32).eps
    rank = max(1, int((singular > tolerance).sum()))
    return (left[:, :rank] * singular[:rank]).float()
