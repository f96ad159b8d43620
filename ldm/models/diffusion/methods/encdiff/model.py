"""EncDiff: disentanglement from cross-attention alone (Yang, Lan, Lu & Zheng, NeurIPS 2024).

An encoder computes U scalars of an image; a small network per unit turns each into a token, and a latent diffusion
model attends to the U tokens while it denoises. Encoder and denoiser are trained together from scratch by the denoising
loss alone: the narrow scalars and the competition of the tokens for attention make the units specialise.

Dimensions: B batch, U units, D width of a token, C, H, W the latent.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from ldm.data.factors import factor_space
from ldm.diffusion.conditions import TensorCondition
from ldm.diffusion.samplers import Sampler
from ldm.models.contracts import TokenEncoder, TokenNetwork, require
from ldm.models.diffusion.latent import LatentDiffusion
from ldm.models.diffusion.methods.encdiff.pictures import encdiff_pictures
from ldm.models.inputs import images_from_batch
from ldm.pictures.grid import CaptionedGrid
from ldm.util import ConfigError


class EncDiff(LatentDiffusion):
    """A latent diffusion model conditioned on scalars that an encoder computes of the same image."""

    kept_constants = ("alphas_cumprod_next",)
    picture_steps_and_eta = (50, 0.0)

    def __init__(
        self,
        unet_config: Mapping[str, Any],
        cond_stage_config: Mapping[str, Any],
        cond_stage_key: str = "image",
        cond_stage_trainable: bool = True,
        conditioning_key: Literal["crossattn"] = "crossattn",
        eval_name: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Build the model.

        Args:
            unet_config: a U-Net with cross-attention, ``openaimodel_enc.UNetModel``.
            cond_stage_config: the encoder, ``openaimodel_enc.Encoder4``.
            cond_stage_key: entry of the batch that the encoder reads.
            cond_stage_trainable: train the encoder as well; False freezes one that was trained before.
            conditioning_key: ``crossattn``, the only value; accepted because the family's configs contain it.
            eval_name: factors of the data set (shapes3d, mpi3d, cars3d, ...). Scores use the data set's own
                factors; this name is only compared with them.
            **kwargs: see ``LatentDiffusion`` and ``DDPM``.

        Raises:
            ConfigError: an option has an unknown value, or encoder and U-Net do not fit each other.
        """
        super().__init__(
            unet_config=unet_config,
            cond_stage_config=cond_stage_config,
            cond_stage_key=cond_stage_key,
            cond_stage_trainable=cond_stage_trainable,
            conditioning_key=conditioning_key,
            **kwargs,
        )
        self.eval_space = None if eval_name is None else factor_space(eval_name)
        self._check_fit()
        self.latent_unit = self.cond_stage_model.latent_unit
        self.unit_names: list[str] | None = None  # set once the units are named

    def _check_fit(self) -> None:
        """Compare the tokens the encoder makes with those the U-Net takes."""
        encoder, unet = self.cond_stage_model, self.model.diffusion_model
        require(encoder, TokenEncoder, "model.params.cond_stage_config.target", ConfigError)
        require(unet, TokenNetwork, "model.params.unet_config.target", ConfigError)
        pairs = (
            ("latent_unit", encoder.latent_unit, unet.latent_unit),
            ("context_dim", encoder.context_dim, unet.config.context_dim),
        )
        for name, made, taken in pairs:
            if made != taken:
                raise ConfigError(
                    f"model.params.cond_stage_config.params.{name}: expected {taken}, as in unet_config.params.{name}, "
                    f"got {made}. Set both to the same number"
                )

    def get_condition(self, batch: Mapping[str, Any]) -> TensorCondition:
        """Return the tokens (B, U * D) of the batch's images; gradients reach the encoder."""
        return TensorCondition(self.cond_stage_model(images_from_batch(batch, self.cond_stage_key)))

    @torch.no_grad()
    def encode_units(self, images: Tensor) -> Tensor:
        """Return the scalars (B, U) of images (B, 3, H, W) in [-1, 1], in float32 for every precision of training."""
        with torch.autocast(images.device.type, enabled=False):
            return self.cond_stage_model.encoding(images.float())

    @torch.no_grad()
    def decode_units(
        self, codes: Tensor, x_T: Tensor, sampler: Sampler | None = None, only: Tensor | None = None
    ) -> Tensor:
        """Return images of scalars.

        Args:
            codes: (B, U).
            x_T: (B, C, H, W) standard normal noise.
            sampler: DDIM with 50 steps and eta 0 by default.
            only: (B,) int64, the one unit whose token is attended to in each sample; ``None`` attends to all.

        Returns:
            (B, 3, H, W) in [-1, 1].
        """
        tokens = self.cond_stage_model.warp(codes)
        if only is not None:
            tokens = tokens.unflatten(1, (self.latent_unit, -1))[torch.arange(len(only), device=only.device), only]
        latent = self.sample(x_T, TensorCondition(tokens), self.choose_sampler(sampler, 50, 0.0))
        return self.decode_first_stage(latent).clamp(-1, 1)

    def encode_representation(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the scalars (B, U) of the batch's images."""
        return self.encode_units(images_from_batch(batch, self.cond_stage_key))

    def draw_pictures(self, batch: Mapping[str, Any], **options: Any) -> dict[str, Tensor | CaptionedGrid]:
        """Return pictures by name; ``options`` are those of ``encdiff_pictures``."""
        return encdiff_pictures(self, batch, **options)
