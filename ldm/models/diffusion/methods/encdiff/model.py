"""EncDiff: disentanglement from cross-attention alone (Yang, Lan, Lu & Zheng, NeurIPS 2024).

An encoder reads U scalars off an image; each becomes a token through a small network of its own, and a latent
diffusion model denoises while it attends to the U tokens. Encoder and denoiser are trained together from scratch by
the denoising loss and nothing else: the narrow scalars and the competition of the tokens for attention make the units
specialise.

Dimensions: B batch, U units, D width of a token, C, H, W the latent.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ldm.data.factors import factor_space
from ldm.models.diffusion.latent import LatentDiffusion
from ldm.models.diffusion.methods.encdiff.pictures import encdiff_pictures
from ldm.models.inputs import images_from_batch
from ldm.pictures.grid import CaptionedGrid
from ldm.util import ConfigError


class EncDiff(LatentDiffusion):
    """A latent diffusion model conditioned on scalars that an encoder reads off the very image."""

    kept_constants = ("alphas_cumprod_next",)

    def __init__(
        self,
        unet_config: Mapping[str, Any],
        cond_stage_config: Mapping[str, Any],
        cond_stage_key: str = "image",
        cond_stage_trainable: bool = True,
        conditioning_key: str = "crossattn",
        eval_name: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Build the model.

        Args:
            unet_config: a U-Net with cross-attention, ``openaimodel_enc.UNetModel``.
            cond_stage_config: the encoder, ``openaimodel_enc.Encoder4``.
            cond_stage_key: entry of the batch the encoder looks at.
            cond_stage_trainable: train the encoder along; False freezes one that was trained before.
            conditioning_key: ``crossattn``; accepted because the family's configs say so.
            eval_name: factors of the data set (shapes3d, mpi3d, cars3d, ...). Scores are taken with the data set's own
                factors, this name is only compared with them.
            **kwargs: see ``LatentDiffusion`` and ``DDPM``.

        Raises:
            ConfigError: an option has an unknown value, or encoder and U-Net do not fit each other.
        """
        if conditioning_key != "crossattn":
            raise ConfigError(
                f"model.params.conditioning_key is '{conditioning_key}'; EncDiff's units enter by 'crossattn'"
            )
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
        self.unit_names: list[str] | None = None  # what each unit tells, once somebody has found out

    def _check_fit(self) -> None:
        """Compare the tokens the encoder makes with those the U-Net takes."""
        encoder, unet = self.cond_stage_model, self.model.diffusion_model
        missing = [name for name in ("encoding", "warp") if not hasattr(encoder, name)]
        if missing or not hasattr(unet, "latent_unit"):
            raise ConfigError(
                "EncDiff needs Encoder4 and UNetModel of ldm.modules.diffusionmodules.openaimodel_enc as targets of "
                "model.params.cond_stage_config and model.params.unet_config; found "
                f"{type(encoder).__name__} and {type(unet).__module__}.{type(unet).__name__}"
            )
        pairs = (
            ("latent_unit", encoder.latent_unit, unet.latent_unit),
            ("context_dim", encoder.context_dim, unet.config.context_dim),
        )
        for name, made, taken in pairs:
            if made != taken:
                raise ConfigError(
                    f"model.params.cond_stage_config.params.{name} is {made}, but model.params.unet_config.params."
                    f"{name} is {taken}: set both to the same number"
                )

    def get_condition(self, batch: Mapping[str, Any]) -> Tensor:
        """Tokens (B, U * D) of the batch's images; gradients reach the encoder."""
        return self.cond_stage_model(images_from_batch(batch, self.cond_stage_key))

    @torch.no_grad()
    def encode_units(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> scalars (B, U), float32 whatever the precision of training."""
        with torch.autocast(images.device.type, enabled=False):
            return self.cond_stage_model.encoding(images.float())

    @torch.no_grad()
    def decode_units(
        self, codes: Tensor, x_T: Tensor, num_steps: int = 50, eta: float = 0.0, only: Tensor | None = None
    ) -> Tensor:
        """Images from scalars, by DDIM.

        Args:
            codes: (B, U).
            x_T: (B, C, H, W) standard normal noise.
            num_steps: DDIM steps.
            eta: 0 deterministic, 1 as noisy as DDPM.
            only: (B,) int64, the one unit whose token is attended to in each sample; None attends to all.

        Returns:
            (B, 3, H, W) in [-1, 1].
        """
        tokens = self.cond_stage_model.warp(codes)
        if only is not None:
            tokens = tokens.unflatten(1, (self.latent_unit, -1))[torch.arange(len(only), device=only.device), only]
        return self.decode_first_stage(self.sample(x_T, tokens, num_steps, eta)).clamp(-1, 1)

    def encode_representation(self, batch: Mapping[str, Any]) -> Tensor:
        """Scalars (B, U) of the batch's images, which the metrics take as they are."""
        return self.encode_units(images_from_batch(batch, self.cond_stage_key))

    def test_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """The representation of the batch, for whoever writes it down."""
        return self.encode_representation(batch)

    @torch.no_grad()
    def log_images(
        self, batch: Mapping[str, Any], split: str = "train", **options: Any
    ) -> dict[str, Tensor | CaptionedGrid]:
        """Pictures by name; ``options`` are those of ``encdiff_pictures``."""
        with self.ema_scope():
            return encdiff_pictures(self, batch, **options)
