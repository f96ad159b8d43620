"""An attribute-wise reading of a CLIP image embedding: the representation of CLIP-DisDiff.

The model is conditioned on one text embedding per unit, but an image without its texts has only one embedding for
all attributes together. This module returns the expected text embedding of every unit under CLIP's own zero-shot
posterior. With i the normalised image embedding, t_kw the W_k text embeddings of unit k, s the inverse temperature:

    p_kw = softmax_w(s <i, t_kw>)                       posterior of unit k
    m_k  = sum_w p_kw t_kw                              its expected text embedding, D numbers
    z_k  = V_k^T (m_k - mean_w t_kw)                    the same point in coordinates, R numbers

The columns of V_k are an orthonormal basis of the span of the centred texts, which has at most W_k - 1 dimensions
and contains ``m_k - mean``. So z_k is an isometric copy of m_k: distances, and hence the first principal component
of a unit that the scores use, are unchanged, in R = max_k rank instead of D numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ldm.modules.encoders.zero_shot import attribute_probabilities


class AttributeReadout(nn.Module):
    """Image embedding -> one small vector per attribute (equations above).

    Args:
        vocabulary: for each of U attributes the normalised text embeddings (W_k, D).
        logit_scale: s, CLIP's inverse temperature.
        temperature: divides s; above 1 the posterior is softer and the codes change more smoothly.

    Attributes:
        num_units: U.
        width: R, the largest rank of an attribute's centred texts; others are padded with zeros.
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

    def _buffers_of(self, kind: str) -> list[Tensor]:
        return [self.get_buffer(f"{kind}_{unit}") for unit in range(self.num_units)]

    def forward(self, image_embedding: Tensor) -> Tensor:
        """Read all attributes.

        Args:
            image_embedding: (B, D), normalised or not.

        Returns:
            float32 (B, U, R).
        """
        posteriors = attribute_probabilities(image_embedding.float(), self._buffers_of("texts"), self.scale)
        with torch.autocast(image_embedding.device.type, enabled=False):
            units = [posterior @ points for posterior, points in zip(posteriors, self._buffers_of("points"))]
        return torch.stack(units, dim=1)


def centred_coordinates(points: Tensor) -> Tensor:
    """Coordinates of points in an orthonormal basis of their own centred span (an isometry).

    Args:
        points: (W, D).

    Returns:
        float32 (W, rank), rank <= W - 1, at least 1 column.
    """
    centred = points.detach().double().cpu()
    centred = centred - centred.mean(dim=0)
    left, singular, _ = torch.linalg.svd(centred, full_matrices=False)
    # numpy's and torch's own threshold for a numerical rank, at the precision of the float32 input
    tolerance = singular.amax() * max(points.shape) * torch.finfo(torch.float32).eps
    rank = max(1, int((singular > tolerance).sum()))
    return (left[:, :rank] * singular[:rank]).float()
