"""Convolutional encoders of images into the codes of units (Yang et al. 2023, DisDiff).

Legend: B batch, U units, D width of a unit's code.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ldm.modules.distributions import DiagonalGaussian
from ldm.modules.encoders.base import ConditionStageBase
from ldm.ranges import Count, Size
from ldm.util import ConfigError

_FINAL_SIDE = 4  # height and width before the linear layer


class ResBlock(nn.Module):
    """Residual block of a 3x3 and a 1x1 convolution, each preceded by an activation."""

    def __init__(self, channels: Size, bn: bool) -> None:
        super().__init__()
        normalization = [nn.BatchNorm2d(channels)] if bn else []
        self.convs = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            *normalization,
            nn.ReLU(),
            nn.Conv2d(channels, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (B, C, H, W) to the same shape."""
        return x + self.convs(x)


class ImageEncoder(ConditionStageBase):
    """Base class of the encoders of images into the codes of all units.

    Attributes:
        latent_dim: width of the output, U*D; None if unknown.
        is_random: ``forward`` samples the codes, and ``kl_loss(num_units)`` is implemented.
    """

    latent_dim: int | None = None
    is_random = False

    def networks_to_compile(self) -> list[nn.Module]:
        """See ``ldm.training.compiling.Compilable``."""
        return [self]

    def mean_code(self, x: Tensor) -> Tensor:
        """Return the output of :meth:`forward` without randomness, (B, U*D)."""
        return self(x)


class Encoder4(ImageEncoder):
    """Encoder of 64x64 images: four halvings, two residual blocks, one linear layer.

    Args:
        d: channels of the convolutions.
        bn: use batch normalization inside the residual blocks.
        num_channels: channels of the images.
        latent_dim: width of the output, U*D for U units.
        image_size: height and width of the images, 8, 16, 32, 64, ..., which are halved to 4x4; None: 64, or 256 for
            :class:`Encoder256`.

    Raises:
        ConfigError: ``image_size`` is not 4 times a power of two.

    Example:
        >>> Encoder4(d=8, latent_dim=6, image_size=32)(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 6])
    """

    num_halvings = 4
    num_moments = 1  # numbers of the last layer for each number of the code

    def __init__(
        self, d: Count, bn: bool = True, num_channels: Size = 3, latent_dim: Count = 192, image_size: Size | None = None
    ) -> None:
        super().__init__()
        if image_size is not None:
            self.num_halvings = round(math.log2(image_size / _FINAL_SIDE)) if image_size > _FINAL_SIDE else 0
            if self.num_halvings < 1 or _FINAL_SIDE * 2**self.num_halvings != image_size:
                raise ConfigError(
                    "cond_stage_config.params.image_size: expected 8, 16, 32, 64, 128, ..., because the encoder halves "
                    f"images to {_FINAL_SIDE}x{_FINAL_SIDE}, got {image_size}. Resize the images to one of these sizes."
                )
        self.image_side = _FINAL_SIDE * 2**self.num_halvings
        self.latent_dim = latent_dim
        layers: list[nn.Module] = []
        for index in range(self.num_halvings):
            layers += [nn.Conv2d(d if index else num_channels, d, 4, stride=2, padding=1), nn.BatchNorm2d(d)]
            if index < 2 or index == self.num_halvings - 1:  # no activation in between
                layers.append(nn.ReLU())
        layers += [ResBlock(d, bn), nn.BatchNorm2d(d), nn.ReLU(), ResBlock(d, bn), nn.Flatten()]
        self.encoder = nn.Sequential(*layers, nn.Linear(d * _FINAL_SIDE**2, latent_dim * self.num_moments))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (B, num_channels, image_size, image_size) in [-1, 1] to (B, latent_dim)."""
        if x.shape[-2:] != (self.image_side, self.image_side):
            raise ValueError(
                f"{type(self).__name__}: expected images of {self.image_side}x{self.image_side} pixels, got "
                f"{x.shape[-2]}x{x.shape[-1]}. Resize them, or set `cond_stage_config.params.image_size`."
            )
        return self.encoder(x)


class Encoder256(Encoder4):
    """Encoder of 256x256 images: as :class:`Encoder4`, with six halvings."""

    num_halvings = 6


class Encoder4_vae(Encoder4):
    """:class:`Encoder4` that returns a sample of a normal distribution.

    Attributes:
        posterior: distribution of the last forward pass, until :meth:`kl_loss` is called.
    """

    is_random = True
    num_moments = 2
    posterior: DiagonalGaussian | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (B, num_channels, H, W) in [-1, 1] to sampled codes (B, latent_dim)."""
        self.posterior = DiagonalGaussian(super().forward(x))
        return self.posterior.sample()

    def mean_code(self, x: Tensor) -> Tensor:
        """Map ``x`` (B, num_channels, H, W) in [-1, 1] to mean codes (B, latent_dim); ``posterior`` is unchanged."""
        return DiagonalGaussian(super().forward(x)).mode()

    def kl_loss(self, num_units: int) -> Tensor:
        """Return the divergence of ``posterior`` from the standard normal, averaged over units and samples."""
        if self.posterior is None:
            raise RuntimeError("kl_loss: expected a forward pass since the last call. Call the encoder first.")
        divergence = self.posterior.kl().mean() / num_units
        self.posterior = None
        return divergence


class _MeanCode(nn.Module):
    """``encoder.mean_code`` as the forward pass of a module, as required by ``functional_call``."""

    def __init__(self, encoder: ImageEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (B, C, H, W) to (B, latent_dim)."""
        return self.encoder.mean_code(x)


def mean_code_frozen(encoder: ImageEncoder, x: Tensor) -> Tensor:
    """Return ``encoder.mean_code(x)`` in evaluation mode, with gradients to ``x`` but not to the encoder.

    Batch statistics are neither used nor updated. The result is that of a frozen copy of the encoder, without the copy.
    """
    frozen = {f"encoder.{name}": parameter.detach() for name, parameter in encoder.named_parameters()}
    modes = {module: module.training for module in encoder.modules()}
    reader = _MeanCode(encoder).eval()
    try:
        return torch.func.functional_call(reader, frozen, (x,))
    finally:
        for module, mode in modes.items():
            module.training = mode
