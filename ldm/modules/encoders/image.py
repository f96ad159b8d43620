"""Small convolutional encoders of images into unit codes (Yang et al. 2023, DisDiff).

Legend: B batch, U units, D width of a unit's code.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ldm.modules.distributions import DiagonalGaussian
from ldm.util import ConfigError

_FINAL_SIDE = 4  # height and width before the linear layer


class ResBlock(nn.Module):
    """Residual 3x3 and 1x1 convolutions, activated before each."""

    def __init__(self, channels: int, bn: bool) -> None:
        super().__init__()
        normalisation = [nn.BatchNorm2d(channels)] if bn else []
        self.convs = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            *normalisation,
            nn.ReLU(),
            nn.Conv2d(channels, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W) -> the same shape."""
        return x + self.convs(x)


class Encoder4(nn.Module):
    """Encoder of 64x64 images: four halvings, two residual blocks, one linear layer.

    Args:
        d: width of the convolutions.
        bn: batch normalisation inside the residual blocks; outside it is always there.
        num_channels: channels of the images.
        latent_dim: width of the output, U*D for U units.
        image_size: height and width of the images, 8, 16, 32, 64, ...; as many halvings as lead to 4x4 are made. None
            is the size the class was made for: 64, for :class:`Encoder256` 256.

    Example:
        >>> Encoder4(d=8, latent_dim=6, image_size=32)(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 6])
    """

    num_halvings = 4

    def __init__(
        self, d: int, bn: bool = True, num_channels: int = 3, latent_dim: int = 192, image_size: int | None = None
    ) -> None:
        super().__init__()
        if image_size is not None:
            self.num_halvings = halvings_of(image_size)
        self.image_side = _FINAL_SIDE * 2**self.num_halvings
        self.latent_dim = latent_dim
        layers: list[nn.Module] = []
        for index in range(self.num_halvings):
            layers += [nn.Conv2d(d if index else num_channels, d, 4, stride=2, padding=1), nn.BatchNorm2d(d)]
            if index < 2 or index == self.num_halvings - 1:  # the layers between have no activation
                layers.append(nn.ReLU())
        layers += [ResBlock(d, bn), nn.BatchNorm2d(d), nn.ReLU(), ResBlock(d, bn), nn.Flatten()]
        self.encoder = nn.Sequential(*layers, nn.Linear(d * _FINAL_SIDE**2, self.output_width))

    @property
    def output_width(self) -> int:
        """Width of the last layer."""
        return self.latent_dim

    def forward(self, x: Tensor) -> Tensor:
        """Encode.

        Args:
            x: (B, num_channels, H, W) in [-1, 1]; 64 pixels a side, 256 for :class:`Encoder256`, or ``image_size``.

        Returns:
            (B, latent_dim).
        """
        if x.shape[-2:] != (self.image_side, self.image_side):
            raise ValueError(
                f"{type(self).__name__} takes images of {self.image_side}x{self.image_side} pixels, found "
                f"{x.shape[-2]}x{x.shape[-1]}: resize them, or set `cond_stage_config.params.image_size`."
            )
        return self.encoder(x)

    def mean(self, x: Tensor) -> Tensor:
        """What :meth:`forward` returns, without its randomness if it has any: (B, latent_dim)."""
        return self(x)


class Encoder256(Encoder4):
    """The same for 256x256 images: six halvings."""

    num_halvings = 6


class Encoder4_vae(Encoder4):
    """:class:`Encoder4` that returns a draw from a normal distribution and remembers the distribution."""

    posterior: DiagonalGaussian | None = None

    @property
    def output_width(self) -> int:
        """Means and log-variances."""
        return 2 * self.latent_dim

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, num_channels, 64, 64) in [-1, 1] -> (B, latent_dim), random."""
        self.posterior = DiagonalGaussian(super().forward(x))
        return self.posterior.sample()

    def mean(self, x: Tensor) -> Tensor:
        """x: (B, num_channels, 64, 64) in [-1, 1] -> (B, latent_dim), the same every time; nothing is remembered."""
        return DiagonalGaussian(super().forward(x)).mode()

    def kl_loss(self, num_units: int) -> Tensor:
        """Divergence of the last batch from the standard normal, mean over units and samples; forgets the batch."""
        if self.posterior is None:
            raise RuntimeError("kl_loss needs a forward pass before it.")
        divergence = self.posterior.kl().mean() / num_units
        self.posterior = None
        return divergence


class _Mean(nn.Module):
    """``encoder.mean`` as a module's call, which is what other tensors can be put in place of parameters for."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W) -> (B, latent_dim)."""
        return mean_code(self.encoder, x)


def mean_code(encoder: nn.Module, x: Tensor) -> Tensor:
    """What an encoder says of x without randomness; (B, latent_dim), of encoders that have none their output."""
    return encoder.mean(x) if hasattr(encoder, "mean") else encoder(x)


def mean_code_frozen(encoder: nn.Module, x: Tensor) -> Tensor:
    """:func:`mean_code` in evaluation mode and without a gradient to the encoder's parameters; x does get one.

    Batch statistics are neither used nor updated. It is what a copy of the encoder would return, without the copy.
    """
    frozen = {f"encoder.{name}": parameter.detach() for name, parameter in encoder.named_parameters()}
    modes = {module: module.training for module in encoder.modules()}
    reader = _Mean(encoder).eval()
    try:
        return torch.func.functional_call(reader, frozen, (x,))
    finally:
        for module, mode in modes.items():
            module.training = mode


def halvings_of(image_size: int) -> int:
    """Halvings that lead from an image to 4x4.

    Raises:
        ConfigError: there is no such number.
    """
    halvings = round(math.log2(image_size / _FINAL_SIDE)) if image_size > _FINAL_SIDE else 0
    if halvings < 1 or _FINAL_SIDE * 2**halvings != image_size:
        raise ConfigError(
            f"cond_stage_config.params.image_size is {image_size}; the encoder halves images down to "
            f"{_FINAL_SIDE}x{_FINAL_SIDE}, so it takes 8, 16, 32, 64, 128, ...: resize the images to one of these."
        )
    return halvings
