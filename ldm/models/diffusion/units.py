"""What DisDiff and CLIP-DisDiff share: the gradient of a frozen diffusion model, split into one part per unit.

A frozen latent diffusion model predicts the noise (or x_0) of a noisy latent. For every unit k a decoder adds a
sub-gradient g_k that depends on the noisy latent and on that unit's code alone. Their sum is trained to turn the
unconditional prediction into one that fits the image (PDAE, Zhang et al. 2022).

Dimensions: B batch, U units, D width of a unit's code, C, H, W the latent.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ldm.diffusion.schedule import extract
from ldm.models.diffusion.latent import LatentDiffusion
from ldm.modules.diffusionmodules.openaimodel_shift import ShiftOutput, UNetModel
from ldm.util import ConfigError


class UnitCodes(NamedTuple):
    """A condition: ``codes`` (B, U, D), and ``mask`` (B, U) bool, False where a unit is left unset; None: all are set.

    ``only`` (B,) int64 keeps one unit's gradient per sample; None keeps all. ``guidance`` scales the sub-gradients.
    """

    codes: Tensor
    mask: Tensor | None = None
    only: Tensor | None = None
    guidance: float = 1.0

    def first(self, count: int | None) -> UnitCodes:
        """The first ``count`` samples, None for all."""
        mask, only = (None if value is None else value[:count] for value in (self.mask, self.only))
        return self._replace(codes=self.codes[:count], mask=mask, only=only)

    def swapped(self, unit: int) -> UnitCodes:
        """The same, but every sample takes that unit of the first one."""
        codes, mask = self.codes.clone(), None if self.mask is None else self.mask.clone()
        for values in (codes, mask):
            if values is not None:
                values[:, unit] = values[0, unit].clone()
        return self._replace(codes=codes, mask=mask)


class UnitDiffusion(LatentDiffusion):
    """A latent diffusion model whose gradient is split into sub-gradients; a subclass says where codes come from."""

    def __init__(
        self,
        unet_config: Mapping[str, Any],
        dis_loss_flag: bool = True,
        dis_loss_type: str = "Z",
        dis_weight: float = 0.05,
        dis_batch_size: int | None = None,
        detach_flag: bool = False,
        **kwargs: Any,
    ) -> None:
        """Build the model.

        Args:
            unet_config: the shift U-Net; its ``ckpt_path`` names the base model.
            dis_loss_flag: use the disentangling loss.
            dis_loss_type: it is weighted by the squared change of the latent (``Z``) or of the image (``IM``).
            dis_weight: constant factor of that weight.
            dis_batch_size: compute the disentangling loss on so many samples of the batch; None on all.
            detach_flag: quantise and detach the edited images (an ablation: the loss then trains nothing).
            **kwargs: see ``LatentDiffusion`` and ``DDPM``; ``conditioning_key`` means nothing here.

        Raises:
            ConfigError: an option has an unknown value.
        """
        if dis_loss_type not in ("Z", "IM"):
            raise ConfigError(f"model.params.dis_loss_type '{dis_loss_type}' is unknown; choose 'Z' or 'IM'")
        if dis_batch_size is not None and dis_batch_size < 1:
            raise ConfigError(f"model.params.dis_batch_size is {dis_batch_size}; expected at least 1, or null for all")
        kwargs["conditioning_key"] = None  # the shift U-Net takes the codes itself
        super().__init__(unet_config=unet_config, **kwargs)
        self.model.conditioning_key = None
        self.dis_loss_flag, self.dis_loss_type, self.dis_weight = dis_loss_flag, dis_loss_type, dis_weight
        self.dis_batch_size, self.detach_flag = dis_batch_size, detach_flag
        network = self.model.diffusion_model
        if not isinstance(network, UNetModel):
            raise ConfigError(
                f"model.params.unet_config.target is {type(network).__module__}.{type(network).__name__}, but "
                f"{type(self).__name__} needs {UNetModel.__module__}.{UNetModel.__name__}"
            )
        self.latent_unit = network.latent_unit
        base_scale = getattr(network, "scale_factor", None)
        if base_scale is not None:
            self.scale_factor.copy_(base_scale)
            self.restarted_from_ckpt = True

    def trained_parameters(self) -> list[nn.Parameter]:
        """The sub-gradient decoder and the condition stage where it is trained: the order of the family's files."""
        parameters = list(self.model.diffusion_model.trainable_parameters())
        if self.cond_stage_trainable:
            parameters += self.cond_stage_model.parameters()
        return [*parameters, self.logvar] if self.learn_logvar else parameters

    def gradients(self, x_noisy: Tensor, t: Tensor, cond: UnitCodes) -> ShiftOutput:
        """Base prediction (B, C, H, W) and all sub-gradients (B, U, C, H, W)."""
        return self.model(x_noisy, t, context=cond.codes, unit_mask=cond.mask, sampled_index=cond.only)

    def gradient_scale(self, t: Tensor, like: Tensor, training: bool = False) -> Tensor:
        """The factor of a sub-gradient in the prediction, (B, 1, 1, 1).

        For eps it is PDAE's: -sqrt(1 - abar) when sampling, and the posterior's ``shift_coef`` in the training loss.
        For x0 the sub-gradient is measured in units of the clean latent and fades with the noise: sqrt(1 - abar).
        """
        if self.parameterization == "x0":
            return extract(self.sqrt_one_minus_alphas_cumprod, t, like)
        return extract(self.shift_coef if training else self.ddim_coef, t, like)

    def apply_model(self, x_noisy: Tensor, t: Tensor, cond: UnitCodes | None) -> Tensor:
        """The conditional prediction: base plus all (or the one asked for) sub-gradients, as samplers need it."""
        if cond is None:
            return self.model.diffusion_model.base_prediction(x_noisy, t)
        out = self.gradients(x_noisy, t, cond)
        return out.pred + cond.guidance * self.gradient_scale(t, out.pred) * out.out_grad

    def condition_in_training(self, cond: UnitCodes) -> UnitCodes:
        """The condition as the loss sees it; a subclass may leave units unset at random."""
        return cond

    def p_losses(
        self, x_start: Tensor, cond: UnitCodes, t: Tensor, noise: Tensor | None = None, unit: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Reconstruction loss of the summed prediction, plus the disentangling loss.

        Args:
            x_start: (B, C, H, W) clean latent.
            cond: codes of the units.
            t: (B,) time steps.
            noise: (B, C, H, W); drawn if None.
            unit: (B,) the units to tell apart in the disentangling loss; drawn if None.

        Returns:
            see ``weigh_losses``.
        """
        noise = torch.randn_like(x_start) if noise is None else noise
        cond = self.condition_in_training(cond)
        x_noisy = self.q_sample(x_start, t, noise)
        out = self.gradients(x_noisy, t, cond)
        prediction = out.pred + self.gradient_scale(t, out.pred, training=True) * out.out_grad
        added = self.dis_loss(x_noisy, t, out, cond, unit) if self.dis_loss_flag else None
        return self.weigh_losses(prediction, noise if self.parameterization == "eps" else x_start, t, added)

    def dis_loss(self, x_t: Tensor, t: Tensor, out: ShiftOutput, cond: UnitCodes, unit: Tensor | None = None) -> Tensor:
        """The disentangling loss of each sample, weight included.

        Args:
            x_t: (B, C, H, W) noisy latent.
            t: (B,) time steps.
            out: base prediction and sub-gradients at x_t.
            cond: codes of the units.
            unit: (B,) the unit to tell apart; drawn if None.

        Returns:
            (b,) with b = min(B, dis_batch_size).
        """
        raise NotImplementedError(f"{type(self).__name__} must say how its units are told apart")

    def decode_prediction(self, x_t: Tensor, t: Tensor, prediction: Tensor) -> tuple[Tensor, Tensor]:
        """What a prediction says the clean latent is, (B, C, H, W), and its image (B, 3, H, W), for the loss.

        The codebook is left out, so that gradients pass, unless ``detach_flag`` wants none.
        """
        z = self.start_from_prediction(x_t, t, prediction)
        return z, self.decode_first_stage(z, force_not_quantize=not self.detach_flag)

    def change_weight(self, z_change: Tensor, image_change: Tensor) -> Tensor:
        """Weight (B,) of the disentangling loss: squared change of the latent or of the image, without gradient."""
        change = image_change if self.dis_loss_type == "IM" else z_change
        return change.detach().square().flatten(1).mean(1) * self.dis_weight

    @torch.no_grad()
    def decode_condition(self, cond: UnitCodes, x_T: Tensor, num_steps: int | None = 50, eta: float = 0.0) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] of codes, by DDIM from noise x_T (B, C, H, W)."""
        return self.decode_first_stage(self.sample(x_T, cond, num_steps, eta)).clamp(-1, 1)

    def test_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """The representation of the batch, for whoever writes it down."""
        return self.encode_representation(batch)

    def encode_representation(self, batch: Mapping[str, Any]) -> Tensor:
        """(B, U, R) units of a batch's images, for the metrics."""
        raise NotImplementedError(f"{type(self).__name__} must say how it reads units off images")

    def unit_captions(self, batch: Mapping[str, Any]) -> tuple[list[str], list[str]]:
        """Words for pictures: one for each unit of the first sample, and one for each sample (none at all: empty)."""
        raise NotImplementedError(f"{type(self).__name__} must say what its units are called")
