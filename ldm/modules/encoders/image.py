"""Small convolutional encoders of images into unit codes (Yang et al. 2023, DisDiff).

Legend: B batch, U units, D width of a unit's code.
"""

from __future__ import annotations

from torch import Tensor, nn

from ldm.modules.distributions import DiagonalGaussian

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
    """

    num_halvings = 4

    def __init__(self, d: int, bn: bool = True, num_channels: int = 3, latent_dim: int = 192) -> None:
        super().__init__()
        self.image_side = _FINAL_SIDE * 2**self.num_halvings
        layers: list[nn.Module] = []
        for index in range(self.num_halvings):
            layers += [nn.Conv2d(d if index else num_channels, d, 4, stride=2, padding=1), nn.BatchNorm2d(d)]
            if index < 2 or index == self.num_halvings - 1:  # the layers between have no activation
                layers.append(nn.ReLU())
        layers += [ResBlock(d, bn), nn.BatchNorm2d(d), nn.ReLU(), ResBlock(d, bn), nn.Flatten()]
        self.encoder = nn.Sequential(*layers, nn.Linear(d * _FINAL_SIDE**2, latent_dim))

    def forward(self, x: Tensor) -> Tensor:
        """Encode.

        Args:
            x: (B, num_channels, H, W) in [-1, 1]; 64 pixels a side, 256 for :class:`Encoder256`.

        Returns:
            (B, latent_dim).
        """
        if x.shape[-2:] != (self.image_side, self.image_side):
            raise ValueError(
                f"{type(self).__name__} takes images of {self.image_side}x{self.image_side} pixels, found "
                f"{x.shape[-2]}x{x.shape[-1]}: resize them or choose another `cond_stage_config`."
            )
        return self.encoder(x)


class Encoder256(Encoder4):
    """The same for 256x256 images: six halvings."""

    num_halvings = 6


class Encoder4_vae(Encoder4):
    """:class:`Encoder4` that returns a draw from a normal distribution and remembers the distribution."""

    def __init__(self, d: int, bn: bool = True, num_channels: int = 3, latent_dim: int = 192) -> None:
        super().__init__(d, bn, num_channels, 2 * latent_dim)
        self.posterior: DiagonalGaussian | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, num_channels, 64, 64) in [-1, 1] -> (B, latent_dim), random."""
        self.posterior = DiagonalGaussian(super().forward(x))
        return self.posterior.sample()

    def kl_loss(self, num_units: int) -> Tensor:
        """Divergence of the last batch from the standard normal, mean over units and samples; forgets the batch."""
        if self.posterior is None:
            raise RuntimeError("kl_loss needs a forward pass before it.")
        divergence = self.posterior.kl().mean() / num_units
        self.posterior = None
        return divergence
