"""InceptionV3's features of images, for FID and KID.

The network is torch-fidelity's (extra ``fid``), which reproduces the original TensorFlow code. Its weights are searched
on this machine and never downloaded: the given path, the variable ``INCEPTION_WEIGHTS``, torch's cache.

Figures of the references are not comparable: they pass images of 0 to 255 where 0 to 1 is expected.

Dimensions: B batch, n images, D = 2048 features.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from ldm.modules.weights import find_weights, read_state_dict
from ldm.util import UserError

INCEPTION_FILES = ("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth")
SLACK = 0.02  # share of the range by which a decoder may exceed [-1, 1]


def to_bytes(images: Tensor) -> Tensor:
    """Convert images (B, 3, H, W) in [-1, 1] to integers from 0 to 255; uint8 is returned unchanged.

    Raises:
        UserError: another shape, or values clearly outside [-1, 1].
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise UserError(f"images: expected shape (B, 3, H, W), got {tuple(images.shape)}")
    if images.dtype == torch.uint8:
        return images
    low, high = images.min().item(), images.max().item()
    if not (-1 - 2 * SLACK <= low and high <= 1 + 2 * SLACK):
        raise UserError(f"images: expected values in [-1, 1], got {low:.3g} to {high:.3g}. Scale them first")
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


class Inception:
    """The pooled features of InceptionV3.

    Args:
        weights: path of the weights; ``None`` searches them.
        device: device of the network.

    Raises:
        UserError: torch-fidelity is not installed, or the weights are missing or of another network.
    """

    def __init__(self, weights: str | os.PathLike | None = None, device: str | torch.device = "cpu") -> None:
        user, source = "FID and KID: expected InceptionV3's weights", "torch-fidelity's release v0.2.0"
        path = find_weights(weights, user, INCEPTION_FILES, "INCEPTION_WEIGHTS", source, " or with --inception")
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError as error:
            raise UserError("FID and KID need torch-fidelity: pip install -e .[fid]") from error
        buffer = io.BytesIO()  # torch-fidelity unpickles its input, so the buffer contains tensors only
        torch.save(read_state_dict(path), buffer)
        buffer.seek(0)
        try:
            self._network = FeatureExtractorInceptionV3("inception", ["2048"], buffer).to(device)
        except RuntimeError as error:
            first_line = " ".join(str(error).split())[:200]
            raise UserError(f"{path}: expected FID's InceptionV3 ({INCEPTION_FILES[0]}), got: {first_line}") from error
        self._device = torch.device(device)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> np.ndarray:
        """Return the features (B, D) float32 of images (B, 3, H, W) in [-1, 1] or uint8."""
        return self._network(to_bytes(images).to(self._device))[0].cpu().numpy()

    def features(self, batches: Iterable[Tensor]) -> np.ndarray:
        """Return the features (n, D) of all images of the batches.

        Raises:
            UserError: there are no images.
        """
        parts = [self(images) for images in batches]
        if not parts:
            raise UserError("features: expected at least one image, got none")
        return np.concatenate(parts)
