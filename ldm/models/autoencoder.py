"""First stages: autoencoders from images to small latents (Esser et al. 2021; Rombach et al. 2022)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.autoencoder_base import Autoencoder, Log, psnr
from ldm.models.first_stages import check_first_stage
from ldm.modules.distributions import DiagonalGaussian
from ldm.modules.quantize import GumbelQuantize, VectorQuantizer2
from ldm.ranges import Count, OptionalCount, Weight
from ldm.util import UserError, instantiate_from_config

__all__ = ["AutoencoderKL", "GumbelVQ", "IdentityFirstStage", "VQModel", "VQModelInterface", "psnr"]


class Quantized(NamedTuple):
    """Codes (B, C, h, w), loss () and (None, None, indices); a diffusion model samples the codes from it."""

    codes: Tensor
    loss: Tensor
    info: tuple

    def sample(self) -> Tensor:
        """Return the codes."""
        return self.codes


class QuantizedAutoencoder(Autoencoder):
    """Autoencoder with a codebook; a subclass builds the quantizer."""

    has_codebook = True
    disentangled_dim = 0  # width of the codes of units that the decoder takes beside the latent

    def attach(self, quantize: nn.Module, z_channels: int, embed_dim: int) -> None:
        """Add the quantizer and the convolutions on both of its sides."""
        self.quantize = quantize
        self.quant_conv = nn.Conv2d(z_channels, embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim + self.disentangled_dim, z_channels, 1)

    def encode(self, x: Tensor) -> Quantized:
        """Map images (B, 3, H, W) in [-1, 1] to quantized latents (B, C, h, w), codebook loss () and code indices."""
        return Quantized(*self.quantize(self.encode_to_prequant(x)))

    encode_to_prequant = Autoencoder.encode_features

    def decode(self, z: Tensor, force_not_quantize: bool = False, disentangled_repr: Tensor | None = None) -> Tensor:
        """Map codes (B, C, h, w) and those of units (B, ``disentangled_dim``), by default 0, to images (B, 3, H, W).

        The codes are decoded as they are; ``force_not_quantize`` has an effect in ``VQModelInterface`` only.
        """
        if self.disentangled_dim:
            units = z.new_zeros(len(z), self.disentangled_dim) if disentangled_repr is None else disentangled_repr
            z = torch.cat([z, units[:, :, None, None].expand(-1, -1, *z.shape[2:])], dim=1)
        return super().decode(z)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the reconstruction of images, the codebook loss and the code indices."""
        quant, codebook_loss, (_, _, indices) = self.quantize(self.encode_to_prequant(x))
        return self.decode(quant), codebook_loss, indices

    def reconstruct(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return the reconstruction of images, and the pair of codebook loss and code indices."""
        reconstruction, codebook_loss, indices = self(x)
        return reconstruction, (codebook_loss, indices)

    def loss_terms(
        self, x: Tensor, reconstruction: Tensor, bottleneck: tuple[Tensor, Tensor], optimizer_idx: int, split: str
    ) -> tuple[Tensor, Log]:
        codebook_loss, indices = bottleneck
        options = {"last_layer": self.get_last_layer(), "split": split, "predicted_indices": indices}
        return self.loss(codebook_loss, x, reconstruction, optimizer_idx, self.training_steps_done, **options)

    def fitting_weights(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """See ``Autoencoder``; the decoder's inputs of units keep their initial weights if a file has none."""
        key, own = "post_quant_conv.weight", self.post_quant_conv.weight.detach()
        state = super().fitting_weights(state)
        if self.disentangled_dim and key in state and state[key].shape[1] == own.shape[1] - self.disentangled_dim:
            state = {**state, key: torch.cat([state[key], own[:, state[key].shape[1] :].to(state[key])], dim=1)}
        return state


class VQModel(QuantizedAutoencoder):
    """VQ-VAE / VQ-GAN: encoder, codebook and decoder, trained with the losses of VQGAN."""

    def __init__(
        self,
        ddconfig: Mapping[str, Any],
        n_embed: Count,
        embed_dim: Count,
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),
        remap: str | None = None,
        sane_index_shape: bool = False,
        init_codebook_from_data: bool = False,
        revive_codes_every: OptionalCount = 0,
        use_disentangled_concat: bool = False,
        disentangled_dim: OptionalCount = 0,
        **options: Any,
    ) -> None:
        """Build the autoencoder.

        Args:
            ddconfig: arguments of ``Encoder`` and ``Decoder``; ``double_z`` must be false.
            n_embed: number of codes.
            embed_dim: width of a code and channels of the latent.
            ckpt_path: initial weights, see ``start_from``.
            ignore_keys: prefixes of keys that are not loaded.
            remap: file with the indices of the used codes.
            sane_index_shape: return code indices as (B, h, w) instead of flat.
            init_codebook_from_data: initialize the codebook with vectors of the first batch.
            revive_codes_every: interval in steps at which unused codes are replaced by encoder outputs; 0 disables it.
            use_disentangled_concat: the decoder takes ``disentangled_dim`` codes of units, too (a fork of EncDiff).
            disentangled_dim: their number.
            **options: see ``Autoencoder``.

        Raises:
            ConfigError: the options do not fit each other.
        """
        check_first_stage("VQModel", {"ddconfig": ddconfig, **options})
        super().__init__(ddconfig=ddconfig, **options)
        self.disentangled_dim = disentangled_dim if use_disentangled_concat else 0
        renewal = {"init_from_data": init_codebook_from_data, "revive_every": revive_codes_every}
        quantize = VectorQuantizer2(n_embed, embed_dim, 0.25, remap, sane_index_shape=sane_index_shape, **renewal)
        self.attach(quantize, ddconfig["z_channels"], embed_dim)
        self.start_from(ckpt_path, ignore_keys)


class VQModelInterface(VQModel):
    """VQModel as the first stage of a latent diffusion model, whose latent is the one before the codebook."""

    def __init__(self, embed_dim: Count, **kwargs: Any) -> None:
        """Build the autoencoder; see ``VQModel`` for the arguments."""
        super().__init__(embed_dim=embed_dim, **kwargs)
        self.embed_dim = embed_dim

    encode = Autoencoder.encode_features

    def decode(self, h: Tensor, force_not_quantize: bool = False, disentangled_repr: Tensor | None = None) -> Tensor:
        """Map a latent (B, C, h, w) to images (B, 3, H, W), through the codebook unless ``force_not_quantize``."""
        quant = h if force_not_quantize else self.quantize(h)[0]
        return super().decode(quant, disentangled_repr=disentangled_repr)


class GumbelVQ(QuantizedAutoencoder):
    """Autoencoder whose codes are drawn by the Gumbel-softmax trick (taming-transformers; Jang et al. 2017)."""

    def __init__(
        self,
        ddconfig: Mapping[str, Any],
        n_embed: Count,
        embed_dim: Count,
        temperature_scheduler_config: Mapping[str, Any],
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),
        kl_weight: Weight = 1e-8,
        **options: Any,
    ) -> None:
        """Build the autoencoder.

        Args:
            ddconfig, n_embed, ckpt_path, ignore_keys: see ``VQModel``.
            embed_dim: width of a code and channels of the latent; equal to ``z_channels``.
            temperature_scheduler_config: ``{target, params}`` of the temperature, called with the number of steps.
            kl_weight: weight of the divergence of the codes from a uniform distribution.
            **options: see ``Autoencoder``.

        Raises:
            ConfigError: the options do not fit each other.
        """
        check_first_stage("GumbelVQ", {"ddconfig": ddconfig, "embed_dim": embed_dim, **options})
        super().__init__(ddconfig=ddconfig, **options)
        self.loss.n_classes = n_embed
        width = ddconfig["z_channels"]
        self.attach(GumbelQuantize(width, embed_dim, n_embed, kl_weight=kl_weight), width, embed_dim)
        self.temperature_scheduler = instantiate_from_config(temperature_scheduler_config, "callable")
        self.start_from(ckpt_path, ignore_keys)

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """See ``Autoencoder``; the temperature follows its schedule."""
        self.quantize.temperature = float(self.temperature_scheduler(self.training_steps_done))
        self.log("temperature", torch.tensor(self.quantize.temperature))
        return super().training_step(batch, batch_idx)


class AutoencoderKL(Autoencoder):
    """VAE with a small weight of the Kullback-Leibler divergence (LDM, KL-reg.)."""

    def __init__(
        self,
        ddconfig: Mapping[str, Any],
        embed_dim: Count,
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),
        **options: Any,
    ) -> None:
        """Build the autoencoder.

        Args:
            ddconfig: arguments of ``Encoder`` and ``Decoder``; ``double_z`` must be true.
            embed_dim: channels of the latent.
            ckpt_path: initial weights, see ``start_from``.
            ignore_keys: prefixes of keys that are not loaded.
            **options: see ``Autoencoder``.

        Raises:
            ConfigError: ``double_z`` is false.
        """
        check_first_stage("AutoencoderKL", {"ddconfig": ddconfig, **options})
        super().__init__(ddconfig=ddconfig, **options)
        self.embed_dim = embed_dim
        self.quant_conv = nn.Conv2d(2 * ddconfig["z_channels"], 2 * embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, ddconfig["z_channels"], 1)
        self.start_from(ckpt_path, ignore_keys)

    def encode(self, x: Tensor) -> DiagonalGaussian:
        """Map images (B, 3, H, W) in [-1, 1] to the distribution of the latent (B, C, h, w)."""
        return DiagonalGaussian(self.encode_features(x))

    def forward(self, x: Tensor, sample_posterior: bool = True) -> tuple[Tensor, DiagonalGaussian]:
        """Return the reconstruction of a sampled latent, or of its mean, and the distribution."""
        posterior = self.encode(x)
        return self.decode(posterior.sample() if sample_posterior else posterior.mode()), posterior

    def reconstruct(self, x: Tensor) -> tuple[Tensor, DiagonalGaussian]:
        """Return the reconstruction, of a sampled latent in training, else of its mean, and the distribution."""
        return self(x, sample_posterior=self.training)

    def loss_terms(
        self, x: Tensor, reconstruction: Tensor, bottleneck: DiagonalGaussian, optimizer_idx: int, split: str
    ) -> tuple[Tensor, Log]:
        options = {"last_layer": self.get_last_layer(), "split": split}
        return self.loss(x, reconstruction, bottleneck, optimizer_idx, self.training_steps_done, **options)

    def generator_parameters(self) -> list[nn.Parameter]:
        """See ``Autoencoder``; includes the loss's own parameters, that is its variance, unlike the reference code."""
        return [*super().generator_parameters(), *self.loss.parameters(recurse=False)]

    @torch.no_grad()
    def log_images(self, batch: Mapping[str, Any], N: int = 8, **options: Any) -> dict[str, Tensor]:
        """Return ``inputs``, ``reconstructions`` and ``samples`` of normal latents, (n, 3, H, W) in [-1, 1]."""
        pictures = super().log_images(batch, N, **options)
        with self.ema_scope():
            noise = torch.randn_like(self.encode(pictures["inputs"]).mean)
            return {**pictures, "samples": self.decode(noise).clamp(-1, 1)}


class IdentityFirstStage(nn.Module):
    """First stage of diffusion models on pixels, without weights.

    Args:
        patch_size: p; blocks of p x p pixels become channels, (B, C, H, W) to (B, C p^2, H / p, W / p), so that the
            network works at a lower resolution. 1 leaves images unchanged.
        vq_interface: ``quantize`` also returns a loss and indices, of None.

    Example:
        >>> stage = IdentityFirstStage(patch_size=4)
        >>> stage.encode(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 48, 8, 8])
    """

    has_codebook = False

    def __init__(self, *_: Any, patch_size: Count = 1, vq_interface: bool = False, **__: Any) -> None:
        super().__init__()
        self.patch_size, self.vq_interface = patch_size, vq_interface

    def quantize(self, x: Tensor, *_: Any, **__: Any) -> Any:
        """Return ``x``, with a loss and indices of None if ``vq_interface``."""
        return (x, None, [None, None, None]) if self.vq_interface else x

    def encode(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        """Return images (B, C, H, W) with patches folded into channels.

        Raises:
            UserError: the size of the images is not a multiple of ``patch_size``.
        """
        if any(side % self.patch_size for side in x.shape[-2:]):
            raise UserError(
                f"IdentityFirstStage: expected images whose sides are multiples of patch_size, {self.patch_size}, got "
                f"{x.shape[-2]} x {x.shape[-1]}. Set data.params.*.params.image_size, or patch_size"
            )
        return F.pixel_unshuffle(x, self.patch_size)

    def decode(self, z: Tensor, *_: Any, **__: Any) -> Tensor:
        """Return the images of folded ones."""
        return F.pixel_shuffle(z, self.patch_size)

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        """Return ``x``."""
        return x
