"""Losses that contain networks: autoencoder losses with LPIPS and a discriminator."""

from ldm.modules.losses.contperceptual import DummyLoss, LPIPSWithDiscriminator
from ldm.modules.losses.vqperceptual import VQLPIPSWithDiscriminator

__all__ = ["DummyLoss", "LPIPSWithDiscriminator", "VQLPIPSWithDiscriminator"]
