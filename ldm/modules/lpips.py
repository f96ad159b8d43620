"""Learned perceptual distance of two images (Zhang et al. 2018, LPIPS v0.1 on VGG16).

The network's weights are looked for on this machine and never downloaded: 1. the path given, 2. the environment
variable ``VGG16_WEIGHTS``, 3. torchvision's cache (``<torch hub folder>/checkpoints``). The weights of the distance
itself (7 kB) come with torchmetrics.

Legend: B batch, C channels, H W space.
"""

from __future__ import annotations

import importlib.util
import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.modules.weights import find_weights
from ldm.util import UserError

VGG16_FILE = "vgg16-397923af.pth"
VGG16_VARIABLE = "VGG16_WEIGHTS"

# Widths of VGG16's convolutions, slice by slice; a max-pooling opens each slice but the first.
_SLICES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class ScalingLayer(nn.Module):
    """From [-1, 1] to the statistics VGG16 was trained with."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, 3, H, W) in [-1, 1] -> (B, 3, H, W)."""
        return (x - self.shift) / self.scale


class VGG16Features(nn.Module):
    """The convolutions of VGG16 in five slices; layers keep torchvision's numbers as names."""

    def __init__(self) -> None:
        super().__init__()
        index, channels = 0, 3
        for number, widths in enumerate(_SLICES, start=1):
            layers = nn.Sequential()
            if number > 1:
                layers.add_module(str(index), nn.MaxPool2d(2))
                index += 1
            for width in widths:
                layers.add_module(str(index), nn.Conv2d(channels, width, 3, padding=1))
                layers.add_module(str(index + 1), nn.ReLU())
                index, channels = index + 2, width
            self.add_module(f"slice{number}", layers)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Features after the last ReLU of each slice (relu1_2, 2_2, 3_3, 4_3, 5_3)."""
        features = []
        for layers in self.children():
            x = layers(x)
            features.append(x)
        return features


class ChannelWeights(nn.Module):
    """A non-negative weight per channel; it lies at index 1, behind the dropout of LPIPS' own training."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Identity(), nn.Conv2d(channels, 1, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W) -> (B, 1, H, W)."""
        return self.model(x)


class PerceptualDistance(nn.Module):
    """Distance of two images in the features of a network; all its weights are frozen.

    Args:
        features: (B, 3, H, W) -> features of several depths.
        widths: their channels.
    """

    def __init__(self, features: nn.Module, widths: Sequence[int]) -> None:
        super().__init__()
        self.scaling_layer = ScalingLayer()
        self.net = features
        for index, width in enumerate(widths):
            self.add_module(f"lin{index}", ChannelWeights(width))
        self.requires_grad_(False)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Distance.

        Args:
            first, second: (B, 3, H, W) in [-1, 1], at least 16 pixels a side (AlexNet: 31).

        Returns:
            (B, 1, 1, 1), 0 for equal images.
        """
        pairs = zip(self.net(self.scaling_layer(first)), self.net(self.scaling_layer(second)))
        distance = torch.zeros((), device=first.device)
        for index, (one, other) in enumerate(pairs):
            difference = (_unit_length(one) - _unit_length(other)).square()
            distance = distance + self.get_submodule(f"lin{index}")(difference).mean(dim=(2, 3), keepdim=True)
        return distance

    def load(self, path: Path, network: str, file: str) -> None:
        """Take torchvision's weights of the network and the channel weights that belong to them.

        Args:
            path: the weights.
            network: ``VGG16`` or ``AlexNet``.
            file: what torchvision calls their file.

        Raises:
            UserError: the file is damaged or of another network.
        """
        state = {f"features.{key.split('.', 1)[1]}": key for key in self.net.state_dict()}
        weights = read_weights(path)
        missing = [name for name in state if name not in weights]
        if missing:
            raise UserError(f"{path} is no {network} of torchvision: it lacks {missing[0]}. Expected {file}.")
        self.net.load_state_dict({key: weights[name] for name, key in state.items()})
        linear = "vgg" if network == "VGG16" else "alex"
        self.load_state_dict(read_weights(find_linear_weights(linear)), strict=False)


class LPIPS(PerceptualDistance):
    """Perceptual distance on VGG16.

    Where no weights are found the module is built all the same, so that a config can be looked at and a checkpoint
    that brings them can be loaded; the first distance asked for without them is the error.

    Args:
        vgg_weights: path of VGG16's weights, which must exist; None looks in the places named above.
        load_weights: False leaves the weights at random, for a state dict that brings them.
    """

    def __init__(self, vgg_weights: str | os.PathLike | None = None, load_weights: bool = True) -> None:
        super().__init__(VGG16Features(), [widths[-1] for widths in _SLICES])
        self._lack: str | None = None
        if load_weights:
            self._find_and_load(vgg_weights)
        self.register_load_state_dict_pre_hook(_note_weights)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """See ``PerceptualDistance``; a ``UserError`` if there are no weights."""
        self.require_weights()
        return super().forward(first, second)

    def require_weights(self) -> None:
        """Raise a ``UserError`` that says where weights belong, if there are none."""
        if self._lack is not None:
            raise UserError(self._lack)

    def _find_and_load(self, vgg_weights: str | os.PathLike | None) -> None:
        try:
            path = find_vgg16(vgg_weights)
        except UserError as error:
            if vgg_weights is not None:
                raise
            self._lack = str(error)
        else:
            self.load(path, "VGG16", VGG16_FILE)


def _note_weights(module: LPIPS, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """A state dict with VGG16 in it brings what was lacking."""
    if f"{prefix}net.slice1.0.weight" in state:
        module._lack = None


def find_vgg16(path: str | os.PathLike | None = None) -> Path:
    """Where VGG16's weights are.

    Raises:
        UserError: they are nowhere; the message says which file to put where.
    """
    what, source = "the perceptual loss needs VGG16's weights", "torchvision's model zoo"
    others = " or in the loss' `vgg_weights`; or do without: `perceptual_weight: 0`"
    return find_weights(path, what, [VGG16_FILE], VGG16_VARIABLE, source, others)


def find_linear_weights(net: str) -> Path:
    """Channel weights of the distance on a network (vgg, alex), which torchmetrics carries.

    Raises:
        UserError: torchmetrics is not installed.
    """
    spec = importlib.util.find_spec("torchmetrics")
    if spec is None or spec.origin is None:
        raise UserError("the perceptual loss takes its channel weights from torchmetrics: pip install torchmetrics.")
    return Path(spec.origin).parent / "functional" / "image" / "lpips_models" / f"{net}.pth"


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of a weight file.

    Raises:
        UserError: the file is damaged.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        raise UserError(f"{path} is damaged or cut short ({error}): copy it again.") from error


def _unit_length(features: Tensor) -> Tensor:
    """Scale the channel vector of each position to length 1."""
    return features / (features.square().sum(dim=1, keepdim=True).sqrt() + 1e-10)
