"""DisDiff: disentanglement of a diffusion model without labels (Yang et al., NeurIPS 2023).

An image encoder computes U codes of the clean image. A decoder on top of a frozen latent diffusion model turns each
code into a sub-gradient; their sum is trained to move the unconditional prediction to this image. The disentangling
loss adds one sub-gradient alone, encodes the predicted clean image, and requires that this unit came closer to its code
(variant) and that no other unit changed (invariant).

Dimensions: B batch, U units, D width of a unit's code, C, H, W the latent.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ldm.diffusion.conditions import UnitCodes
from ldm.diffusion.samplers import Sampler
from ldm.losses.disentangling import disdiff_logits, disentangling_loss
from ldm.models.contracts import ImageEncoder, VariationalEncoder, require
from ldm.models.diffusion.traversal import unit_captions
from ldm.models.diffusion.units import UnitDiffusion
from ldm.models.inputs import images_from_batch
from ldm.modules.diffusionmodules.openaimodel_shift import ShiftOutput
from ldm.modules.encoders.image import mean_code_frozen
from ldm.ranges import Weight
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
        kl_weight: Weight = 5e-4,
        **kwargs: Any,
    ) -> None:
        """Build the model.

        Args:
            cond_stage_config: the image encoder, (B, 3, H, W) -> (B, U * D); ``ldm.modules.encoders.modules.Encoder4``
                and its relatives.
            cond_stage_key: entry of the batch that the encoder reads.
            cond_stage_trainable: train the encoder as well; False freezes one that was trained before.
            train_enc_flag: the disentangling loss also trains the encoder that judges the edits; by default it is
                frozen there.
            kl_loss_flag: keep the codes near a standard normal distribution; needs an encoder with ``kl_loss``
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
        self.unit_names: list[str] | None = None  # set once the units are named
        self._check_fit()
        if self.dis_loss_flag and not self.model.diffusion_model.is_separate:
            logger.warning(
                "dis_loss_flag has no effect: with seprate_decoder: false all units have one gradient together"
            )
            self.dis_loss_flag = False

    def _check_fit(self) -> None:
        """Compare the codes the encoder makes with those the U-Net takes."""
        encoder, network = self.cond_stage_model, self.model.diffusion_model
        if encoder is None or encoder is self.first_stage_model:
            raise ConfigError(
                "model.params.cond_stage_config: expected an image encoder, from whose output DisDiff reads its units, "
                "got none. Use ldm.modules.encoders.modules.Encoder4"
            )
        require(encoder, ImageEncoder, "model.params.cond_stage_config.target", ConfigError)
        made, taken = encoder.latent_dim, network.latent_unit * network.repre_emb_channels
        if made != taken:
            raise ConfigError(
                f"model.params.cond_stage_config.params.latent_dim: expected latent_unit x repre_emb_channels of "
                f"unet_config = {network.latent_unit} x {network.repre_emb_channels} = {taken}, got {made}"
            )
        if self.kl_loss_flag:
            require(encoder, VariationalEncoder, "model.params.kl_loss_flag", ConfigError)
        if self.train_enc_flag and not self.cond_stage_trainable:
            raise ConfigError("model.params.train_enc_flag: expected cond_stage_trainable: true, got false")

    def get_condition(self, batch: Mapping[str, Any]) -> UnitCodes:
        """Return the codes of the batch's images; gradients reach the encoder."""
        return UnitCodes(self._units(self.cond_stage_model(images_from_batch(batch, self.cond_stage_key))))

    def _units(self, codes: Tensor) -> Tensor:
        """Return codes (B, U * D) as (B, U, D)."""
        return codes.unflatten(1, (self.latent_unit, -1))

    def p_losses(
        self, x_start: Tensor, cond: UnitCodes, t: Tensor, noise: Tensor | None = None, unit: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return reconstruction, disentangling loss, and the divergence of the codes if configured."""
        # Before the disentangling loss, which may encode other images.
        divergence = self.cond_stage_model.kl_loss(self.latent_unit) if self.kl_loss_flag else None
        loss, terms = super().p_losses(x_start, cond, t, noise, unit)
        if divergence is None:
            return loss, terms
        loss = loss + self.kl_weight * divergence
        return loss, terms | {"loss_kl": divergence, "loss": loss}

    def dis_loss(self, x_t: Tensor, t: Tensor, out: ShiftOutput, cond: UnitCodes, unit: Tensor | None = None) -> Tensor:
        """See ``UnitMethod``; DisDiff's invariant and variant loss, the unit drawn uniformly."""
        count = self.dis_batch_size
        x_t, t, pred, unit_grad = x_t[:count], t[:count], out.pred[:count], out.unit_grad[:count]
        unit = torch.randint(self.latent_unit, (len(x_t),), device=x_t.device) if unit is None else unit[:count]
        one_grad = unit_grad[torch.arange(len(unit), device=unit.device), unit]  # (b, C, H, W)
        encoder = self.cond_stage_model
        read = encoder.mean_code if self.train_enc_flag else functools.partial(mean_code_frozen, encoder)
        with torch.no_grad():
            z_before, image_before = self.decode_prediction(x_t, t, pred)
            before = self._units(read(image_before))
        z_after, image_after = self.decode_prediction(x_t, t, pred + self.gradient_scale(t, pred) * one_grad)
        if self.detach_flag:
            image_after = image_after.detach()
        after = self._units(read(image_after))
        # Distances in float32: half precision would lose small differences of codes.
        codes = (part.float() for part in (before, after, cond.codes[:count].detach()))
        variant, invariant = disdiff_logits(*codes)
        weight = self.change_weight(z_before - z_after, image_before - image_after)
        return disentangling_loss(variant, invariant, unit, weight)

    @torch.no_grad()
    def encode_units(self, images: Tensor) -> Tensor:
        """Return the codes (B, U, D) of images (B, 3, H, W) in [-1, 1], in float32 for every precision of training.

        Variational encoders return the means.
        """
        with torch.autocast(images.device.type, enabled=False):
            return self._units(self.cond_stage_model.mean_code(images.float()))

    @torch.no_grad()
    def decode_units(
        self, codes: Tensor, x_T: Tensor, sampler: Sampler | None = None, only: Tensor | None = None
    ) -> Tensor:
        """Return images of codes.

        Args:
            codes: (B, U, D).
            x_T: (B, C, H, W) standard normal noise.
            sampler: DDIM with 50 steps and eta 0 by default.
            only: (B,) int64, the one unit whose gradient is added in each sample; ``None`` adds all.

        Returns:
            (B, 3, H, W) in [-1, 1].

        Raises:
            UserError: ``only`` is given, but the units have one gradient together.
        """
        if only is not None and not self.model.diffusion_model.is_separate:
            raise UserError(
                "unit: expected a model with one gradient per unit, got one gradient of all units together "
                "(unet_config.params.seprate_decoder: false). Leave the unit out"
            )
        return self.decode_condition(UnitCodes(codes, only=only), x_T, sampler)

    def encode_representation(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the codes (B, U, D) of a batch's images."""
        return self.encode_units(images_from_batch(batch, self.cond_stage_key))

    def unit_captions(self, batch: Mapping[str, Any]) -> tuple[list[str], list[str]]:
        """Return ``unit 1`` and so on, with names where they are known; images have no captions."""
        return unit_captions(self, range(self.latent_unit)), []
