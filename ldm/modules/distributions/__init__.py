"""Probability distributions returned by encoders."""

from ldm.modules.distributions.distributions import DiagonalGaussian

__all__ = ["DiagonalGaussian"]
