"""DisDiff: disentanglement of a diffusion model without labels (Yang et al., NeurIPS 2023).

An image encoder reads U codes off the clean image; a decoder on top of a frozen latent diffusion model turns each into
a sub-gradient, and their sum has to carry the unconditional prediction to this very image. The disentangling loss adds
one sub-gradient alone, looks at the predicted clean image with the encoder, and asks that this unit came closer to its
code (variant) and that no other unit changed (invariant).

Dimensions: B batch, U units, D width of a unit's code, C, H, W the latent.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ldm.losses.disentangling import disdiff_logits, disentangling_loss
from ldm.models.diffusion import traversal as traverse
from ldm.models.diffusion.unit_pictures import unit_pictures
from ldm.models.diffusion.units import UnitCodes, UnitDiffusion
from ldm.models.inputs import images_from_batch
from ldm.modules.diffusionmodules.openaimodel_shift import ShiftOutput
from ldm.modules.encoders.image import mean_code, mean_code_frozen
from ldm.pictures.grid import CaptionedGrid
from ldm.util import ConfigError, UserError

logger = logging.getLogger(__name__)


class DisDiff(UnitDiffusion):
    """A latent diffusion model whose gradient is split into one sub-gradient per unit of an image encoder."""

    def __init__(
        self,
        cond_stage_config: Mapping[str, Any],
        cond_stage_key: str = "image",
        cond_stage_trainable: bool = True,
        train_enc_flag: bool = False,
        kl_loss_flag: bool = False,
        kl_weight: float = 5e-4,
        **kwargs: Any,
    ) -> None:
        """Build the model.

        Args:
            cond_stage_config: the image encoder, (B, 3, H, W) -> (B, U * D); ``ldm.modules.encoders.modules.Encoder4``
                and its relatives.
            cond_stage_key: entry of the batch the encoder looks at.
            cond_stage_trainable: train the encoder along; False freezes one that was trained before.
            train_enc_flag: the disentangling loss trains the encoder that judges the edits too, instead of looking
                through a copy of it at rest.
            kl_loss_flag: hold the codes near a standard normal distribution; needs an encoder with ``kl_loss``
                (``Encoder4_vae``).
            kl_weight: weight of that divergence.
            **kwargs: see ``UnitDiffusion``, ``LatentDiffusion`` and ``DDPM``.

        Raises:
            ConfigError: options or parts do not fit each other.
        """
        super().__init__(
            cond_stage_config=cond_stage_config,
            cond_stage_key=cond_stage_key,
            cond_stage_trainable=cond_stage_trainable,
            **kwargs,
        )
        self.train_enc_flag = train_enc_flag
        self.kl_loss_flag, self.kl_weight = kl_loss_flag, kl_weight
        self.unit_names: list[str] | None = None  # what each unit tells, once somebody has found out
        self._check_fit()
        if self.dis_loss_flag and not self.model.diffusion_model.is_separate:
            logger.warning(
                "dis_loss_flag has no effect: with seprate_decoder: false there is one gradient of all units together, "
                "and nothing to tell apart"
            )
            self.dis_loss_flag = False

    def _check_fit(self) -> None:
        """Compare the codes the encoder makes with those the U-Net takes."""
        encoder, network = self.cond_stage_model, self.model.diffusion_model
        if encoder is None or encoder is self.first_stage_model:
            raise ConfigError(
                "model.params.cond_stage_config must describe an image encoder, such as "
                "ldm.modules.encoders.modules.Encoder4: DisDiff reads its units off images"
            )
        made, taken = getattr(encoder, "latent_dim", None), network.latent_unit * network.repre_emb_channels
        if made not in (None, taken):
            raise ConfigError(
                f"model.params.cond_stage_config.params.latent_dim is {made}, but model.params.unet_config.params asks "
                f"for latent_unit x repre_emb_channels = {network.latent_unit} x {network.repre_emb_channels} = {taken}"
            )
        if self.kl_loss_flag and not hasattr(encoder, "kl_loss"):
            raise ConfigError(
                f"model.params.kl_loss_flag needs an encoder that draws its codes, but cond_stage_config.target is "
                f"{type(encoder).__name__}: use ldm.modules.encoders.modules.Encoder4_vae"
            )
        if self.train_enc_flag and not self.cond_stage_trainable:
            raise ConfigError("model.params.train_enc_flag trains the encoder: set cond_stage_trainable to true")

    def get_condition(self, batch: Mapping[str, Any]) -> UnitCodes:
        """Codes of the batch's images; gradients reach the encoder."""
        return UnitCodes(self._units(self.cond_stage_model(images_from_batch(batch, self.cond_stage_key))))

    def _units(self, codes: Tensor) -> Tensor:
        """(B, U * D) -> (B, U, D)."""
        return codes.unflatten(1, (self.latent_unit, -1))

    def p_losses(
        self, x_start: Tensor, cond: UnitCodes, t: Tensor, noise: Tensor | None = None, unit: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Reconstruction, disentangling loss, and the divergence of the codes where it is asked for."""
        # First of all: where the encoder is trained by the disentangling loss it may look at other images then.
        divergence = self.cond_stage_model.kl_loss(self.latent_unit) if self.kl_loss_flag else None
        loss, terms = super().p_losses(x_start, cond, t, noise, unit)
        if divergence is None:
            return loss, terms
        loss = loss + self.kl_weight * divergence
        return loss, terms | {"loss_kl": divergence, "loss": loss}

    def dis_loss(self, x_t: Tensor, t: Tensor, out: ShiftOutput, cond: UnitCodes, unit: Tensor | None = None) -> Tensor:
        """See ``UnitDiffusion``; DisDiff's invariant and variant loss, the unit drawn uniformly."""
        count = self.dis_batch_size
        x_t, t, pred, unit_grad = x_t[:count], t[:count], out.pred[:count], out.unit_grad[:count]
        unit = torch.randint(self.latent_unit, (len(x_t),), device=x_t.device) if unit is None else unit[:count]
        one_grad = unit_grad[torch.arange(len(unit), device=unit.device), unit]  # (b, C, H, W)
        read = mean_code if self.train_enc_flag else mean_code_frozen
        with torch.no_grad():
            z_before, image_before = self.decode_prediction(x_t, t, pred)
            before = self._units(read(self.cond_stage_model, image_before))
        z_after, image_after = self.decode_prediction(x_t, t, pred + self.gradient_scale(t, pred) * one_grad)
        if self.detach_flag:
            image_after = image_after.detach()
        after = self._units(read(self.cond_stage_model, image_after))
        # Differences of half-precision codes would be lost: distances are taken in float32.
        codes = (part.float() for part in (before, after, cond.codes[:count].detach()))
        variant, invariant = disdiff_logits(*codes)
        weight = self.change_weight(z_before - z_after, image_before - image_after)
        return disentangling_loss(variant, invariant, unit, weight)

    @torch.no_grad()
    def encode_units(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> codes (B, U, D), float32 whatever the precision of training.

        Encoders that draw their codes give the means.
        """
        with torch.autocast(images.device.type, enabled=False):
            return self._units(mean_code(self.cond_stage_model, images.float()))

    @torch.no_grad()
    def decode_units(
        self, codes: Tensor, x_T: Tensor, num_steps: int | None = 50, eta: float = 0.0, only: Tensor | None = None
    ) -> Tensor:
        """Images from codes, by DDIM.

        Args:
            codes: (B, U, D).
            x_T: (B, C, H, W) standard normal noise.
            num_steps: DDIM steps; None samples all T by DDPM.
            eta: 0 deterministic, 1 as noisy as DDPM.
            only: (B,) int64, the one unit whose gradient is added in each sample; None adds all.

        Returns:
            (B, 3, H, W) in [-1, 1].

        Raises:
            UserError: ``only`` is given, but the units have one gradient together.
        """
        if only is not None and not self.model.diffusion_model.is_separate:
            raise UserError(
                "one unit's gradient alone was asked for, but this model has one gradient of all units together "
                "(unet_config.params.seprate_decoder: false)"
            )
        return self.decode_condition(UnitCodes(codes, only=only), x_T, num_steps, eta)

    def encode_representation(self, batch: Mapping[str, Any]) -> Tensor:
        """(B, U, D) codes of a batch's images."""
        return self.encode_units(images_from_batch(batch, self.cond_stage_key))

    def unit_captions(self, batch: Mapping[str, Any]) -> tuple[list[str], list[str]]:
        """``unit 1``, or what it tells where that is known; images have no words."""
        return traverse.unit_captions(self, range(self.latent_unit)), []

    @torch.no_grad()
    def log_images(
        self, batch: Mapping[str, Any], split: str = "train", **options: Any
    ) -> dict[str, Tensor | CaptionedGrid]:
        """Pictures by name; ``options`` are those of ``unit_pictures``."""
        with self.ema_scope():
            return unit_pictures(self, batch, **options)
