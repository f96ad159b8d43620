"""First stages: autoencoders that turn images into small latents (Esser et al. 2021; Rombach et al. 2022)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from ldm.models.averaging import AverageWeights
from ldm.models.checkpoints import load_into, strip_prefix
from ldm.models.inputs import check_image_size, images_from_batch
from ldm.modules.diffusionmodules.model import Decoder, Encoder
from ldm.modules.ema import LitEma
from ldm.modules.quantize import VectorQuantizer2
from ldm.util import instantiate_from_config


class VQModel(pl.LightningModule):
    """VQ-VAE / VQ-GAN: encoder, codebook, decoder, trained with the taming losses.

    Optimisation is manual (two optimizers take turns on each batch); gradient accumulation is therefore done here,
    over ``accumulate_grad_batches`` batches, and ``disc_start`` counts accumulated steps.
    """

    def __init__(
        self,
        ddconfig: Mapping[str, Any],
        lossconfig: Mapping[str, Any],
        n_embed: int,
        embed_dim: int,
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),
        image_key: str = "image",
        monitor: str | None = None,
        scheduler_config: Mapping[str, Any] | None = None,
        lr_g_factor: float = 1.0,
        remap: str | None = None,
        sane_index_shape: bool = False,
        use_ema: bool = False,
        init_codebook_from_data: bool = False,
        revive_codes_every: int = 0,
    ) -> None:
        """Build the autoencoder.

        Args:
            ddconfig: arguments of ``Encoder`` and ``Decoder``.
            lossconfig: ``{target, params}`` of the loss; ``torch.nn.Identity`` for a frozen first stage.
            n_embed: number of codebook vectors.
            embed_dim: width of a codebook vector and channels of the latent.
            ckpt_path: weights to start from.
            ignore_keys: prefixes of the state dict not to load.
            image_key: entry of the batch that holds the images.
            monitor: logged metric by which checkpoints are kept.
            scheduler_config: learning-rate multiplier, called with the number of optimizer steps.
            lr_g_factor: the autoencoder's learning rate over the discriminator's.
            remap: file with the codebook entries in use (taming).
            sane_index_shape: return code indices as (B, h, w) instead of flat.
            use_ema: keep a moving average of all weights.
            init_codebook_from_data: start the codebook from vectors of the first batch.
            revive_codes_every: replace unused codes every so many steps by encoder outputs; 0 never.
        """
        super().__init__()
        self.automatic_optimization = False
        self.learning_rate = 4.5e-6
        self.accumulate_grad_batches = 1
        self.gradient_clip_val: float | None = None
        self.image_key, self.lr_g_factor, self.scheduler_config = image_key, lr_g_factor, scheduler_config
        self.resolution = ddconfig["resolution"]
        self.encoder, self.decoder = Encoder(**ddconfig), Decoder(**ddconfig)
        self.loss = instantiate_from_config(lossconfig)
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
        if monitor is not None:
            self.monitor = monitor
        if ckpt_path is not None:
            if isinstance(self.loss, nn.Identity):  # a frozen first stage has no use for a discriminator
                ignore_keys = [*ignore_keys, "loss."]
            load_into(self, ckpt_path, ignore_keys, transform=first_stage_weights)
        self.use_ema = use_ema
        if use_ema:
            self.model_ema = LitEma(self)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor, tuple]:
        """Images (B, 3, H, W) in [-1, 1] -> quantised latent (B, C, h, w), codebook loss (), code information."""
        return self.quantize(self.encode_to_prequant(x))

    def encode_to_prequant(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> latent before the codebook, (B, C, h, w).

        Raises:
            UserError: the images are not of ``ddconfig.resolution``.
        """
        check_image_size(x, self.resolution, "first-stage ddconfig.resolution")
        return self.quant_conv(self.encoder(x))

    def decode(self, quant: Tensor) -> Tensor:
        """Quantised latent (B, C, h, w) -> images (B, 3, H, W), about [-1, 1]."""
        return self.decoder(self.post_quant_conv(quant))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images -> reconstruction, codebook loss, flat code indices."""
        quant, codebook_loss, (_, _, indices) = self.encode(x)
        return self.decode(quant), codebook_loss, indices

    def get_input(self, batch: Mapping[str, Any]) -> Tensor:
        """Images of a batch, (B, 3, H, W) in [-1, 1]."""
        return images_from_batch(batch, self.image_key)

    def get_last_layer(self) -> nn.Parameter:
        """The weight whose gradient balances the adversarial against the reconstruction loss."""
        return self.decoder.conv_out.weight

    @property
    def _step(self) -> int:
        """Accumulated training steps; Lightning's global_step would count both optimizers."""
        if self._trainer is None:
            return 0
        return self.trainer.fit_loop.total_batch_idx // self.accumulate_grad_batches

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """One step of the autoencoder, then one of the discriminator if there is one; returns the former's loss."""
        x = self.get_input(batch)
        reconstruction, codebook_loss, indices = self(x)
        optimizers = self.optimizers()
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        update = (batch_idx + 1) % self.accumulate_grad_batches == 0 or self.trainer.is_last_batch
        losses = []
        for index, optimizer in enumerate(optimizers):
            self.toggle_optimizer(optimizer)
            loss, log = self.loss(
                codebook_loss,
                x,
                reconstruction,
                index,
                self._step,
                last_layer=self.get_last_layer(),
                split="train",
                predicted_indices=indices,
            )
            self.manual_backward(loss / self.accumulate_grad_batches)
            if update:
                self.clip_gradients(optimizer, self.gradient_clip_val)
                optimizer.step()
                optimizer.zero_grad()
            self.untoggle_optimizer(optimizer)
            self.log_dict(log, prog_bar=False, batch_size=len(x))
            losses.append(loss.detach())
        if update:
            for scheduler in self._schedulers():
                scheduler.step()
        self.log("train/loss", losses[0], prog_bar=True, batch_size=len(x))
        self.log("train/psnr", psnr(reconstruction.detach(), x).mean(), prog_bar=True, batch_size=len(x))
        return losses[0]

    def _schedulers(self) -> list[LambdaLR]:
        schedulers = self.lr_schedulers()
        if schedulers is None:
            return []
        return schedulers if isinstance(schedulers, list) else [schedulers]

    def configure_callbacks(self) -> list[pl.Callback]:
        """The averaged weights move along with training."""
        return [AverageWeights(self.model_ema, self)] if self.use_ema else []

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Log ``val/*`` losses, ``val/rec_loss`` and ``val/psnr`` of the averaged (if any) weights."""
        x = self.get_input(batch)
        with self.ema_scope():
            reconstruction, codebook_loss, indices = self(x)
            for index in range(2 if getattr(self.loss, "discriminator", None) is not None else 1):
                _, log = self.loss(
                    codebook_loss, x, reconstruction, index, self._step, last_layer=self.get_last_layer(),
                    split="val", predicted_indices=indices,
                )  # fmt: skip
                self.log_dict(log, batch_size=len(x), sync_dist=True)
        self.log("val/psnr", psnr(reconstruction, x).mean(), prog_bar=True, batch_size=len(x), sync_dist=True)

    def test_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Log ``figure/psnr``: mean over images of the peak signal-to-noise ratio, dB on [0, 1]."""
        x = self.get_input(batch)
        with self.ema_scope():
            reconstruction = self(x)[0]
        self.log("figure/psnr", psnr(reconstruction, x).mean(), batch_size=len(x), sync_dist=True)

    def configure_optimizers(self) -> Any:
        """Adam(0.5, 0.9) for the autoencoder and, if the loss has one, for the discriminator."""
        generator = nn.ModuleList([self.encoder, self.decoder, self.quantize, self.quant_conv, self.post_quant_conv])
        optimizers = [
            torch.optim.Adam(generator.parameters(), lr=self.lr_g_factor * self.learning_rate, betas=(0.5, 0.9))
        ]
        discriminator = getattr(self.loss, "discriminator", None)
        if discriminator is not None:
            optimizers.append(torch.optim.Adam(discriminator.parameters(), lr=self.learning_rate, betas=(0.5, 0.9)))
        if self.scheduler_config is None:
            return optimizers, []
        factor = instantiate_from_config(self.scheduler_config)
        return optimizers, [{"scheduler": LambdaLR(o, factor), "interval": "step"} for o in optimizers]

    @contextlib.contextmanager
    def ema_scope(self) -> Iterator[None]:
        """Within it, the averaged weights are in place of the trained ones; without an average it does nothing."""
        if not self.use_ema:
            yield
            return
        self.model_ema.store(self.parameters())
        self.model_ema.copy_to(self)
        try:
            yield
        finally:
            self.model_ema.restore(self.parameters())

    @torch.no_grad()
    def log_images(self, batch: Mapping[str, Any], N: int = 8, **_: Any) -> dict[str, Tensor]:
        """``inputs`` and ``reconstructions``, (n, 3, H, W) in [-1, 1] with n at most ``N``."""
        x = self.get_input(batch)[:N].to(self.device)
        with self.ema_scope():
            return {"inputs": x, "reconstructions": self(x)[0].clamp(-1, 1)}


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


def psnr(reconstruction: Tensor, images: Tensor) -> Tensor:
    """Peak signal-to-noise ratio per image in dB, (B,), of images in [-1, 1] mapped to [0, 1] and clamped."""
    error = F.mse_loss(
        (reconstruction.clamp(-1, 1) + 1) / 2, (images.clamp(-1, 1) + 1) / 2, reduction="none"
    ).flatten(1).mean(1)  # fmt: skip
    return -10 * torch.log10(error.clamp_min(1e-10))


def first_stage_weights(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The first stage's part of a latent diffusion checkpoint; any other state dict unchanged."""
    return strip_prefix(state, "first_stage_model.") or state
