"""First stages: autoencoders that turn images into small latents (Esser et al. 2021; Rombach et al. 2022)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.models.autoencoder_base import Autoencoder, Log, psnr
from ldm.modules.distributions import DiagonalGaussian
from ldm.modules.losses import LPIPSWithDiscriminator
from ldm.modules.quantize import VectorQuantizer2
from ldm.util import ConfigError

__all__ = ["AutoencoderKL", "IdentityFirstStage", "VQModel", "VQModelInterface", "psnr"]


class VQModel(Autoencoder):
    """VQ-VAE / VQ-GAN: encoder, codebook, decoder, trained with the taming losses."""

    def __init__(
        self,
        ddconfig: Mapping[str, Any],
        n_embed: int,
        embed_dim: int,
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),
        remap: str | None = None,
        sane_index_shape: bool = False,
        init_codebook_from_data: bool = False,
        revive_codes_every: int = 0,
        **options: Any,
    ) -> None:
        """Build the autoencoder.

        Args:
            ddconfig: arguments of ``Encoder`` and ``Decoder``.
            n_embed: number of codebook vectors.
            embed_dim: width of a codebook vector and channels of the latent.
            ckpt_path: weights to start from, of an autoencoder or of a latent diffusion model that holds one.
            ignore_keys: prefixes of the state dict not to load.
            remap: file with the codebook entries in use (taming).
            sane_index_shape: return code indices as (B, h, w) instead of flat.
            init_codebook_from_data: start the codebook from vectors of the first batch.
            revive_codes_every: replace unused codes every so many steps by encoder outputs; 0 never.
            **options: see ``Autoencoder``.
        """
        super().__init__(ddconfig=ddconfig, **options)
        self.quantize = VectorQuantizer2(
            n_embed,
            embed_dim,
            beta=0.25,
            remap=remap,
            sane_index_shape=sane_index_shape,
            init_from_data=init_codebook_from_data,
            revive_every=revive_codes_every,
        )
        self.quant_conv = nn.Conv2d(ddconfig["z_channels"], embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, ddconfig["z_channels"], 1)
        self.start_from(ckpt_path, ignore_keys)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor, tuple]:
        """Images (B, 3, H, W) in [-1, 1] -> quantised latent (B, C, h, w), codebook loss (), code information."""
        return self.quantize(self.encode_to_prequant(x))

    def encode_to_prequant(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> latent before the codebook, (B, C, h, w).

        Raises:
            UserError: the images are not of ``ddconfig.resolution``.
        """
        return self.encode_features(x)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images -> reconstruction, codebook loss, flat code indices."""
        quant, codebook_loss, (_, _, indices) = self.encode(x)
        return self.decode(quant), codebook_loss, indices

    def reconstruct(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Images -> reconstruction; codebook loss and code indices."""
        reconstruction, codebook_loss, indices = self(x)
        return reconstruction, (codebook_loss, indices)

    def loss_terms(
        self, x: Tensor, reconstruction: Tensor, bottleneck: tuple[Tensor, Tensor], optimizer_idx: int, split: str
    ) -> tuple[Tensor, Log]:
        """See ``Autoencoder``."""
        codebook_loss, indices = bottleneck
        return self.loss(
            codebook_loss,
            x,
            reconstruction,
            optimizer_idx,
            self.training_steps_done,
            last_layer=self.get_last_layer(),
            split=split,
            predicted_indices=indices,
        )

    def generator_parameters(self) -> list[nn.Parameter]:
        """See ``Autoencoder``."""
        parts = (self.encoder, self.decoder, self.quantize, self.quant_conv, self.post_quant_conv)
        return [parameter for part in parts for parameter in part.parameters()]


class VQModelInterface(VQModel):
    """A VQModel as the first stage of a latent diffusion model: the latent is the one before the codebook."""

    def __init__(self, embed_dim: int, **kwargs: Any) -> None:
        """Args: ``embed_dim`` and everything ``VQModel`` takes."""
        super().__init__(embed_dim=embed_dim, **kwargs)
        self.embed_dim = embed_dim

    def encode(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> latent before the codebook, (B, C, h, w)."""
        return self.encode_to_prequant(x)

    def decode(self, h: Tensor, force_not_quantize: bool = False) -> Tensor:
        """Latent (B, C, h, w) -> images (B, 3, H, W); through the codebook unless told not to."""
        quant = h if force_not_quantize else self.quantize(h)[0]
        return super().decode(quant)


class AutoencoderKL(Autoencoder):
    """VAE whose latent is a normal distribution held near the standard one by a small weight (LDM, KL-reg.)."""

    def __init__(
        self,
        ddconfig: Mapping[str, Any],
        embed_dim: int,
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),
        **options: Any,
    ) -> None:
        """Build the autoencoder.

        Args:
            ddconfig: arguments of ``Encoder`` and ``Decoder``; ``double_z`` must be true.
            embed_dim: channels of the latent.
            ckpt_path: weights to start from, of an autoencoder or of a latent diffusion model that holds one.
            ignore_keys: prefixes of the state dict not to load.
            **options: see ``Autoencoder``.

        Raises:
            ConfigError: the encoder makes no mean and variance.
        """
        if not ddconfig.get("double_z", True):
            raise ConfigError(
                "ddconfig.double_z is false, but AutoencoderKL's encoder makes a mean and a variance for each channel: "
                "set it to true, or use VQModel"
            )
        super().__init__(ddconfig=ddconfig, **options)
        self.embed_dim = embed_dim
        self.quant_conv = nn.Conv2d(2 * ddconfig["z_channels"], 2 * embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, ddconfig["z_channels"], 1)
        self.start_from(ckpt_path, ignore_keys)

    def encode(self, x: Tensor) -> DiagonalGaussian:
        """Images (B, 3, H, W) in [-1, 1] -> distribution of the latent (B, C, h, w)."""
        return DiagonalGaussian(self.encode_features(x))

    def forward(self, x: Tensor, sample_posterior: bool = True) -> tuple[Tensor, DiagonalGaussian]:
        """Images -> reconstruction of a drawn latent (or of its mean), and the distribution."""
        posterior = self.encode(x)
        return self.decode(posterior.sample() if sample_posterior else posterior.mode()), posterior

    def reconstruct(self, x: Tensor) -> tuple[Tensor, DiagonalGaussian]:
        """Images -> reconstruction, and the distribution; drawn in training, else of the mean: the same every time."""
        return self(x, sample_posterior=self.training)

    def loss_terms(
        self, x: Tensor, reconstruction: Tensor, bottleneck: DiagonalGaussian, optimizer_idx: int, split: str
    ) -> tuple[Tensor, Log]:
        """See ``Autoencoder``."""
        return self.loss(
            x,
            reconstruction,
            bottleneck,
            optimizer_idx,
            self.training_steps_done,
            last_layer=self.get_last_layer(),
            split=split,
        )

    def generator_parameters(self) -> list[nn.Parameter]:
        """See ``Autoencoder``; last the variance that weighs the reconstruction error, which the references forgot."""
        parts = (self.encoder, self.decoder, self.quant_conv, self.post_quant_conv)
        parameters = [parameter for part in parts for parameter in part.parameters()]
        return [*parameters, self.loss.logvar] if isinstance(self.loss, LPIPSWithDiscriminator) else parameters

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Files of the references have no optimizer state of the variance: it starts anew."""
        last = len(self.generator_parameters()) - 1
        for state in checkpoint.get("optimizer_states", [])[:1]:
            known = state["param_groups"][0]["params"]
            if len(known) == last and isinstance(self.loss, LPIPSWithDiscriminator):
                known.append(last)

    @torch.no_grad()
    def log_images(self, batch: Mapping[str, Any], N: int = 8, **options: Any) -> dict[str, Tensor]:
        """``inputs``, ``reconstructions`` and ``samples`` of the standard normal latent, (n, 3, H, W) in [-1, 1]."""
        pictures = super().log_images(batch, N, **options)
        with self.ema_scope():
            noise = torch.randn_like(self.encode(pictures["inputs"]).mean)
            return {**pictures, "samples": self.decode(noise).clamp(-1, 1)}


class IdentityFirstStage(nn.Module):
    """Stands where a first stage is expected when the diffusion model works on pixels."""

    def __init__(self, *_: Any, vq_interface: bool = False, **__: Any) -> None:
        """Args: ``vq_interface`` makes ``quantize`` return a loss and indices too."""
        super().__init__()
        self.vq_interface = vq_interface

    def encode(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        """x, unchanged."""
        return x

    def decode(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        """x, unchanged."""
        return x

    def quantize(self, x: Tensor, *_: Any, **__: Any) -> Any:
        """x, unchanged."""
        return (x, None, [None, None, None]) if self.vq_interface else x

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        """x, unchanged."""
        return x
