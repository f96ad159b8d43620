"""Base class of DisDiff and CLIP-DisDiff: the gradient of a frozen diffusion model, split into one part per unit.

A frozen latent diffusion model predicts the noise (or x_0) of a noisy latent. For every unit k a decoder adds a
sub-gradient g_k that depends on the noisy latent and on that unit's code alone. Their sum is trained to turn the
unconditional prediction into one that fits the image (PDAE, Zhang et al. 2022).

Dimensions: B batch, U units, D width of a unit's code, C, H, W the latent.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ldm.diffusion.conditions import UnitCodes
from ldm.diffusion.guidance import add_units
from ldm.diffusion.samplers import Sampler
from ldm.models.contracts import ShiftNetwork, UnitMethod, require
from ldm.models.diffusion.latent import LatentDiffusion
from ldm.models.diffusion.unit_pictures import unit_pictures
from ldm.modules.diffusionmodules.openaimodel_shift import ShiftOutput
from ldm.pictures.grid import CaptionedGrid
from ldm.ranges import Count, Weight
from ldm.util import ConfigError


class UnitDiffusion(LatentDiffusion):
    """A latent diffusion model whose gradient is split into sub-gradients; a subclass provides the codes.

    A subclass implements ``get_condition`` and the members of ``ldm.models.contracts.UnitMethod``.
    """

    def __init__(
        self,
        unet_config: Mapping[str, Any],
        dis_loss_flag: bool = True,
        dis_loss_type: Literal["Z", "IM"] = "Z",
        dis_weight: Weight = 0.05,
        dis_batch_size: Count | None = None,
        detach_flag: bool = False,
        **kwargs: Any,
    ) -> None:
        """Build the model.

        Args:
            unet_config: the shift U-Net; its ``ckpt_path`` names the base model.
            dis_loss_flag: use the disentangling loss.
            dis_loss_type: it is weighted by the squared change of the latent (``Z``) or of the image (``IM``).
            dis_weight: constant factor of that weight.
            dis_batch_size: number of samples of the batch that the disentangling loss is computed on; ``None`` for all.
            detach_flag: quantise and detach the edited images (an ablation: the loss then trains nothing).
            **kwargs: see ``LatentDiffusion`` and ``DDPM``; ``conditioning_key`` is ignored.

        Raises:
            ConfigError: an option has an unknown value.
        """
        if dis_loss_type not in ("Z", "IM"):
            raise ConfigError(f"model.params.dis_loss_type: expected 'Z' or 'IM', got {dis_loss_type!r}")
        kwargs["conditioning_key"] = None  # the shift U-Net takes the codes itself
        super().__init__(unet_config=unet_config, **kwargs)
        self.model.conditioning_key = None
        self.dis_loss_flag, self.dis_loss_type, self.dis_weight = dis_loss_flag, dis_loss_type, dis_weight
        self.dis_batch_size, self.detach_flag = dis_batch_size, detach_flag
        network = self.model.diffusion_model
        require(self, UnitMethod, "model.target", ConfigError)
        require(network, ShiftNetwork, "model.params.unet_config.target", ConfigError)
        self.latent_unit = network.latent_unit
        self._take_base_scale(network)

    def _take_base_scale(self, network: ShiftNetwork) -> None:
        """Use the scale of the latents that the base model was trained on, if its checkpoint has one."""
        if network.base_scale is not None:
            self.scale_factor.copy_(network.base_scale)
            self._has_scale = True

    def on_weights_loaded(self, loaded: set[str]) -> None:
        """Start shift layers that the file lacks from the loaded base, where the network's config asks for it."""
        network = self.model.diffusion_model
        require(network, ShiftNetwork, "model.params.unet_config.target", ConfigError)
        if not self.scale_by_std:  # else the scale is one of the loaded weights
            self._take_base_scale(network)
        if network.init_shift_from_base and not any("diffusion_model.shift_" in name for name in loaded):
            network.copy_base_to_shift()

    def network_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the sub-gradient decoder, in the order of the family's checkpoints."""
        return list(self.model.diffusion_model.trainable_parameters())

    def gradients(self, x_noisy: Tensor, t: Tensor, cond: UnitCodes) -> ShiftOutput:
        """Return the base prediction (B, C, H, W) and all sub-gradients (B, U, C, H, W)."""
        return self.model(x_noisy, t, **cond.inputs(None))

    def gradient_scale(self, t: Tensor, like: Tensor, training: bool = False) -> Tensor:
        """Return the factor of a sub-gradient in the prediction, (B, 1, 1, 1); see ``Parameterization``."""
        return self.parameterization.sub_gradient_scale(self.schedule, t, like, training)

    def apply_model(self, x_noisy: Tensor, t: Tensor, cond: UnitCodes | None) -> Tensor:
        """Return the conditional prediction for samplers: base plus all sub-gradients, or the one in ``cond.only``."""
        if cond is None:
            return self.model.diffusion_model.base_prediction(x_noisy, t)
        out, guidance = self.gradients(x_noisy, t, cond), cond.guidance
        if isinstance(guidance, Tensor) and cond.only is not None:
            guidance = guidance.expand(cond.codes.shape[:2]).gather(1, cond.only.unsqueeze(1))
        return add_units(out.pred, out.out_grad, out.unit_grad, self.gradient_scale(t, out.pred), guidance)

    def condition_in_training(self, cond: UnitCodes) -> UnitCodes:
        """Return the condition as the loss sees it; a subclass may leave units unset at random."""
        return cond

    def p_losses(
        self, x_start: Tensor, cond: UnitCodes, t: Tensor, noise: Tensor | None = None, unit: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the reconstruction loss of the summed prediction, plus the disentangling loss.

        Args:
            x_start: (B, C, H, W) clean latent.
            cond: codes of the units.
            t: (B,) time steps.
            noise: (B, C, H, W); drawn if ``None``.
            unit: (B,) the units to tell apart in the disentangling loss; drawn if ``None``.

        Returns:
            see ``weigh_losses``.
        """
        noise = torch.randn_like(x_start) if noise is None else noise
        cond = self.condition_in_training(cond)
        x_noisy = self.q_sample(x_start, t, noise)
        out = self.gradients(x_noisy, t, cond)
        prediction = out.pred + self.gradient_scale(t, out.pred, training=True) * out.out_grad
        added = self.dis_loss(x_noisy, t, out, cond, unit) if self.dis_loss_flag else None
        target = self.parameterization.target(self.schedule, x_start, noise, t)
        return self.weigh_losses(prediction, target, t, added)

    def decode_prediction(self, x_t: Tensor, t: Tensor, prediction: Tensor) -> tuple[Tensor, Tensor]:
        """Return a prediction's clean latent (B, C, H, W) and its image (B, 3, H, W), for the loss.

        The codebook is left out, so that gradients pass, unless ``detach_flag`` is set.
        """
        z = self.start_from_prediction(x_t, t, prediction)
        return z, self.decode_first_stage(z, force_not_quantize=not self.detach_flag)

    def change_weight(self, z_change: Tensor, image_change: Tensor) -> Tensor:
        """Return the weight (B,) of the disentangling loss: squared change of latent or image, without gradient."""
        change = image_change if self.dis_loss_type == "IM" else z_change
        return change.detach().square().flatten(1).mean(1) * self.dis_weight

    @torch.no_grad()
    def decode_condition(self, cond: UnitCodes, x_T: Tensor, sampler: Sampler | None = None) -> Tensor:
        """Return images (B, 3, H, W) in [-1, 1] of codes, from noise x_T (B, C, H, W); DDIM by default."""
        return self.decode_first_stage(self.sample(x_T, cond, self.choose_sampler(sampler, 50, 0.0))).clamp(-1, 1)

    def draw_pictures(self, batch: Mapping[str, Any], **options: Any) -> dict[str, Tensor | CaptionedGrid]:
        """Return pictures by name; ``options`` are those of ``unit_pictures``."""
        return unit_pictures(self, batch, **options)
