"""LPIPS on AlexNet: the variant that papers report as a figure (the one on VGG16 is the better training loss).

AlexNet's weights are looked for as VGG16's are (``ldm.modules.lpips``) and never downloaded: the path given, the
variable ``ALEXNET_WEIGHTS``, torchvision's cache.

Legend: B batch, H W space.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.modules.lpips import LPIPS, ChannelWeights, ScalingLayer, find_linear_weights, read_weights
from ldm.util import UserError

ALEXNET_FILE = "alexnet-owt-7be5be79.pth"
ALEXNET_VARIABLE = "ALEXNET_WEIGHTS"

# index in torchvision's ``features``, inputs, outputs, kernel, stride, padding; a max-pooling stands before 3 and 6
_CONVOLUTIONS = ((0, 3, 64, 11, 4, 2), (3, 64, 192, 5, 1, 2), (6, 192, 384, 3, 1, 1), (8, 384, 256, 3, 1, 1),
                 (10, 256, 256, 3, 1, 1))  # fmt: skip
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


class AlexLPIPS(LPIPS):
    """Perceptual distance on AlexNet; all its weights are frozen. Call it as ``LPIPS``.

    Args:
        weights: path of AlexNet's weights; None looks in the places named above.

    Raises:
        UserError: there are no weights, or the file is none of AlexNet.
    """

    def __init__(self, weights: str | os.PathLike | None = None) -> None:
        nn.Module.__init__(self)  # LPIPS' own would build VGG16
        self.scaling_layer = ScalingLayer()
        self.net = AlexNetFeatures()
        for index, (_, _, outputs, *_) in enumerate(_CONVOLUTIONS):
            self.add_module(f"lin{index}", ChannelWeights(outputs))
        self._lack = None
        path = find_alexnet(weights)
        state = read_weights(path)
        names = {key: f"features.{key.split('.', 1)[1]}" for key in self.net.state_dict()}
        missing = [name for name in names.values() if name not in state]
        if missing:
            raise UserError(f"{path} is no AlexNet of torchvision: it lacks {missing[0]}. Expected {ALEXNET_FILE}.")
        self.net.load_state_dict({key: state[name] for key, name in names.items()})
        self.load_state_dict(read_weights(find_linear_weights("alex")), strict=False)
        self.requires_grad_(False)


def find_alexnet(path: str | os.PathLike | None = None) -> Path:
    """Where AlexNet's weights are.

    Raises:
        UserError: they are nowhere; the message says which file to put where.
    """
    cache = Path(torch.hub.get_dir()) / "checkpoints" / ALEXNET_FILE
    given = path or os.environ.get(ALEXNET_VARIABLE)
    found = Path(given) if given else cache
    if found.is_dir():
        found = found / ALEXNET_FILE
    if not found.is_file():
        raise UserError(
            f"LPIPS on AlexNet needs its weights, and there is no {found}. Put {ALEXNET_FILE} (from torchvision's "
            f"model zoo) at {cache}, or name its path here or in the variable {ALEXNET_VARIABLE}."
        )
    return found
