"""Learned perceptual distance between images (Zhang et al. 2018, LPIPS v0.1).

Papers report the distance on AlexNet; that on VGG16 is the better training loss. The weights of these networks are
never downloaded. They are searched in this order: the given path, the environment variable ``ALEXNET_WEIGHTS`` or
``VGG16_WEIGHTS``, torchvision's cache (``<torch hub folder>/checkpoints``). The channel weights of LPIPS (7 kB) are
those of torchmetrics.

Legend: B batch, C channels, H W space.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.modules.diffusionmodules.util import sequence_in
from ldm.modules.weights import NeedsWeights, find_weights, read_state_dict
from ldm.util import UserError

VGG16_FILE, ALEXNET_FILE = "vgg16-397923af.pth", "alexnet-owt-7be5be79.pth"

# Indices in torchvision's ``features`` after the ReLUs whose outputs are compared (relu1_2, 2_2, 3_3, 4_3, 5_3).
_VGG16_ENDS = (4, 9, 16, 23, 30)
_VGG16_WIDTHS = (64, 128, 256, 512, 512)
_ALEXNET_ENDS, _ALEXNET_WIDTHS = (2, 5, 8, 10, 12), (64, 192, 384, 256, 256)


class ScalingLayer(nn.Module):
    """Normalization from [-1, 1] to the statistics that VGG16 was trained with."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (B, 3, H, W) in [-1, 1] to (B, 3, H, W)."""
        return (x - self.shift) / self.scale


class SlicedFeatures(nn.Module):
    """Convolutional layers of a torchvision network in slices; layers are named by their indices in ``features``.

    Args:
        features: layers of the network.
        ends: index after the last layer of each slice.
    """

    def __init__(self, features: nn.Sequential, ends: Sequence[int]) -> None:
        super().__init__()
        for number, (start, end) in enumerate(zip((0, *ends), ends), start=1):
            self.add_module(f"slice{number}", features[start:end])

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the output of each slice for images ``x`` (B, 3, H, W)."""
        outputs = []
        for layers in self.children():
            x = layers(x)
            outputs.append(x)
        return outputs


class PerceptualDistance(nn.Module):
    """Distance between two images in the features of a network; all weights are frozen.

    Args:
        features: network from (B, 3, H, W) to a list of feature maps.
        widths: channels of the feature maps.
    """

    def __init__(self, features: nn.Module, widths: Sequence[int]) -> None:
        super().__init__()
        self.scaling_layer = ScalingLayer()
        self.net = features
        for index, width in enumerate(widths):
            # Index 0 is the dropout of the original training.
            weights = sequence_in("model", nn.Identity(), nn.Conv2d(width, 1, 1, bias=False))
            self.add_module(f"lin{index}", weights)
        self.requires_grad_(False)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Return the distance (B, 1, 1, 1) between two batches of images (B, 3, H, W) in [-1, 1].

        The images have at least 16 pixels a side (AlexNet: 31).
        """
        pairs = zip(self.net(self.scaling_layer(first)), self.net(self.scaling_layer(second)))
        distance = torch.zeros((), device=first.device)
        for index, (one, other) in enumerate(pairs):
            difference = (_unit_length(one) - _unit_length(other)).square()
            distance = distance + self.get_submodule(f"lin{index}")(difference).mean(dim=(2, 3), keepdim=True)
        return distance

    def load(self, path: Path, network: str, file: str) -> None:
        """Load torchvision's weights of the network and the matching channel weights.

        Args:
            path: weight file.
            network: ``VGG16`` or ``AlexNet``.
            file: torchvision's name of the file, for error messages.

        Raises:
            UserError: the file is damaged or contains another network.
        """
        state = {f"features.{key.split('.', 1)[1]}": key for key in self.net.state_dict()}
        weights = read_state_dict(path, state)
        missing = [name for name in state if name not in weights]
        if missing:
            raise UserError(f"{path}: expected torchvision's {network} ({file}), got a file without {missing[0]}.")
        self.net.load_state_dict({key: weights[name] for name, key in state.items()})
        package = Path(importlib.util.find_spec("torchmetrics").origin).parent
        linear = "vgg.pth" if network == "VGG16" else "alex.pth"
        channel_weights = read_state_dict(package / "functional" / "image" / "lpips_models" / linear)
        self.load_state_dict(channel_weights, strict=False)


class LPIPS(NeedsWeights, PerceptualDistance):
    """Perceptual distance on VGG16.

    If no weights are found, the module is built with random weights, so that configs can be inspected and checkpoints
    that contain the weights can be loaded; computing a distance then raises an error.

    Args:
        vgg_weights: path of VGG16's weights, which must exist; None: see the module docstring.
        load_weights: search for weights; False keeps random weights, to be replaced by a state dict.
    """

    def __init__(self, vgg_weights: str | os.PathLike | None = None, load_weights: bool = True) -> None:
        from torchvision.models.vgg import cfgs, make_layers  # takes seconds to import

        super().__init__(SlicedFeatures(make_layers(cfgs["D"]), _VGG16_ENDS), _VGG16_WIDTHS)
        if load_weights:
            user, source = "perceptual loss: expected VGG16's weights", "torchvision's model zoo"
            others = " or `vgg_weights` of the loss, or disable the perceptual loss (`perceptual_weight: 0`)"
            try:
                path = find_weights(vgg_weights, user, [VGG16_FILE], "VGG16_WEIGHTS", source, others)
            except UserError as error:
                if vgg_weights is not None:
                    raise
                self.missing_weights = str(error)
            else:
                self.load(path, "VGG16", VGG16_FILE)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """See ``PerceptualDistance``; raises ``UserError`` without weights."""
        self.require_weights()
        return super().forward(first, second)


class AlexLPIPS(PerceptualDistance):
    """Perceptual distance on AlexNet.

    Args:
        weights: path of AlexNet's weights; None: see the module docstring.

    Raises:
        UserError: the weights are missing, or the file contains another network.
    """

    def __init__(self, weights: str | os.PathLike | None = None) -> None:
        from torchvision.models import AlexNet  # takes seconds to import

        with torch.device("meta"):  # do not initialize the large classifier
            features = AlexNet().features
        super().__init__(SlicedFeatures(features.to_empty(device="cpu"), _ALEXNET_ENDS), _ALEXNET_WIDTHS)
        user, source = "LPIPS: expected AlexNet's weights", "torchvision's model zoo"
        path = find_weights(weights, user, [ALEXNET_FILE], "ALEXNET_WEIGHTS", source, " or with --lpips")
        self.load(path, "AlexNet", ALEXNET_FILE)


def _unit_length(features: Tensor) -> Tensor:
    """Normalize the channel vector of each position."""
    return features / (features.square().sum(dim=1, keepdim=True).sqrt() + 1e-10)
