"""Probability distributions returned by encoders."""

from __future__ import annotations

import torch
from torch import Tensor

_LOGVAR_RANGE = (-30.0, 20.0)


class DiagonalGaussian:
    """Independent normal distributions.

    Args:
        parameters: (B, 2C, ...) means, then log-variances, which are clamped to [-30, 20]; half precision is converted
            to float32, because the divergence is a large sum.
    """

    def __init__(self, parameters: Tensor) -> None:
        if parameters.dtype in (torch.float16, torch.bfloat16):
            parameters = parameters.float()
        self.mean, logvar = parameters.chunk(2, dim=1)
        self.logvar = logvar.clamp(*_LOGVAR_RANGE)
        self.std = (0.5 * self.logvar).exp()
        self.var = self.logvar.exp()

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Return a reparameterized sample, (B, C, ...)."""
        noise = torch.randn(self.mean.shape, generator=generator, device=self.mean.device, dtype=self.mean.dtype)
        return self.mean + self.std * noise

    def mode(self) -> Tensor:
        """Return the means, (B, C, ...)."""
        return self.mean

    def kl(self) -> Tensor:
        """Return the Kullback-Leibler divergence from the standard normal distribution, (B,), in nats."""
        return 0.5 * (self.mean.square() + self.var - 1.0 - self.logvar).flatten(1).sum(dim=1)


DiagonalGaussianDistribution = DiagonalGaussian  # the name in LDM
