"""LPIPS on AlexNet: the variant that papers report as a figure (the one on VGG16 is the better training loss).

AlexNet's weights are looked for as VGG16's are (``ldm.modules.lpips``) and never downloaded: the path given, the
variable ``ALEXNET_WEIGHTS``, torchvision's cache.

Legend: B batch, H W space.
"""

from __future__ import annotations

import os
from pathlib import Path

from torch import Tensor, nn

from ldm.modules.lpips import PerceptualDistance
from ldm.modules.weights import find_weights

ALEXNET_FILE = "alexnet-owt-7be5be79.pth"
ALEXNET_VARIABLE = "ALEXNET_WEIGHTS"

# index in torchvision's ``features``, inputs, outputs, kernel, stride, padding; a max-pooling stands before 3 and 6
_CONVOLUTIONS = (
    (0, 3, 64, 11, 4, 2),
    (3, 64, 192, 5, 1, 2),
    (6, 192, 384, 3, 1, 1),
    (8, 384, 256, 3, 1, 1),
    (10, 256, 256, 3, 1, 1),
)
_POOLED = (3, 6)


class AlexNetFeatures(nn.Module):
    """The convolutions of AlexNet in five slices; layers keep torchvision's numbers as names."""

    def __init__(self) -> None:
        super().__init__()
        for number, (index, inputs, outputs, kernel, stride, padding) in enumerate(_CONVOLUTIONS, start=1):
            layers = nn.Sequential()
            if index in _POOLED:
                layers.add_module(str(index - 1), nn.MaxPool2d(3, stride=2))
            layers.add_module(str(index), nn.Conv2d(inputs, outputs, kernel, stride, padding))
            layers.add_module(str(index + 1), nn.ReLU())
            self.add_module(f"slice{number}", layers)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Features after each ReLU. ``x``: (B, 3, H, W), at least 31 pixels a side."""
        features = []
        for layers in self.children():
            x = layers(x)
            features.append(x)
        return features


class AlexLPIPS(PerceptualDistance):
    """Perceptual distance on AlexNet.

    Args:
        weights: path of AlexNet's weights; None looks in the places named above.

    Raises:
        UserError: there are no weights, or the file is none of AlexNet.
    """

    def __init__(self, weights: str | os.PathLike | None = None) -> None:
        super().__init__(AlexNetFeatures(), [outputs for _, _, outputs, *_ in _CONVOLUTIONS])
        self.load(find_alexnet(weights), "AlexNet", ALEXNET_FILE)


def find_alexnet(path: str | os.PathLike | None = None) -> Path:
    """Where AlexNet's weights are.

    Raises:
        UserError: they are nowhere; the message says which file to put where.
    """
    what, source = "LPIPS on AlexNet needs its weights", "torchvision's model zoo"
    return find_weights(path, what, [ALEXNET_FILE], ALEXNET_VARIABLE, source, " or after --lpips")
