"""Patch discriminator of the adversarial autoencoder loss (Isola et al. 2017, pix2pix)."""

from __future__ import annotations

from torch import Tensor, nn

_MAX_MULTIPLIER = 8


class NLayerDiscriminator(nn.Module):
    """Convolutions that judge overlapping patches: one logit per patch.

    Args:
        input_nc: channels of the images.
        ndf: width of the first layer; it doubles with each, up to eight times.
        n_layers: number of halvings of the resolution.
    """

    def __init__(self, input_nc: int = 3, ndf: int = 64, n_layers: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(input_nc, ndf, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        width = ndf
        for layer in range(1, n_layers + 1):
            before, width = width, ndf * min(2**layer, _MAX_MULTIPLIER)
            stride = 2 if layer < n_layers else 1
            convolution = nn.Conv2d(before, width, 4, stride=stride, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(width), nn.LeakyReLU(0.2)]
        self.main = nn.Sequential(*layers, nn.Conv2d(width, 1, 4, stride=1, padding=1))
        self.apply(_initialise)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, input_nc, H, W) -> (B, 1, h, w) logits, high for real patches."""
        return self.main(x)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
