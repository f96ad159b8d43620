"""Shared terms of the autoencoder losses: pixels, perceptual distance and discriminator (Esser et al. 2021, VQGAN).

Legend: B batch, C channels, H W space.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from taming.modules.discriminator.model import NLayerDiscriminator, weights_init
from torch import Tensor, nn

from ldm.data.options import require_choice
from ldm.modules.diffusionmodules.shapes import most_discriminator_layers
from ldm.modules.lpips import LPIPS
from ldm.ranges import Count, NonNegativeFloat, OptionalCount, Weight
from ldm.util import ConfigError, UserError

Log = dict[str, Tensor]

_MAX_ADVERSARIAL_WEIGHT = 1e4


def hinge_d_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Return the mean hinge loss of a discriminator's logits."""
    return 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())


def vanilla_d_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Return the mean cross-entropy of a discriminator's logits."""
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


_CHOICES: dict[str, dict[str, Callable[..., Any]]] = {
    "disc_loss": {"hinge": hinge_d_loss, "vanilla": vanilla_d_loss},
    "pixel_loss": {"l1": F.l1_loss, "l2": F.mse_loss},
    "perceptual_loss": {"lpips": LPIPS},
}


class AdversarialReconstruction(nn.Module):
    """Reconstruction and adversarial terms; subclasses add the term of their bottleneck.

    Args:
        disc_start: training step at which the adversarial terms start.
        pixelloss_weight: accepted from older configs and ignored.
        disc_num_layers: number of downsamplings in the discriminator.
        disc_in_channels: channels of the images (and of the condition).
        disc_factor: factor of both adversarial terms; 0 builds no discriminator.
        disc_weight: weight of the generator's adversarial term; 0 builds no discriminator.
        perceptual_weight: weight of LPIPS; 0 builds no LPIPS.
        use_actnorm: use taming's ActNorm instead of batch normalization in the discriminator. ActNorm is initialized
            from the first batch of each process, and therefore supports a single process only.
        disc_conditional: concatenate a condition to the discriminator's input.
        disc_ndf: channels of the first layer of the discriminator.
        disc_loss: "hinge" or "vanilla".
        perceptual_loss: "lpips".
        pixel_loss: "l1" or "l2".
        vgg_weights: path of VGG16's weights for LPIPS, see :mod:`ldm.modules.lpips`.
    """

    def __init__(
        self,
        disc_start: NonNegativeFloat,
        pixelloss_weight: Weight = 1.0,
        disc_num_layers: OptionalCount = 3,
        disc_in_channels: Count = 3,
        disc_factor: Weight = 1.0,
        disc_weight: Weight = 1.0,
        perceptual_weight: Weight = 1.0,
        use_actnorm: bool = False,
        disc_conditional: bool = False,
        disc_ndf: Count = 64,
        disc_loss: Literal["hinge", "vanilla"] = "hinge",
        perceptual_loss: str = "lpips",
        pixel_loss: Literal["l1", "l2"] = "l1",
        vgg_weights: str | None = None,
    ) -> None:
        super().__init__()
        chosen = {"disc_loss": disc_loss, "pixel_loss": pixel_loss, "perceptual_loss": perceptual_loss}
        for key, value in chosen.items():
            require_choice(f"lossconfig.params.{key}", value, _CHOICES[key])
        self.pixel_loss, self.disc_loss = _CHOICES["pixel_loss"][pixel_loss], _CHOICES["disc_loss"][disc_loss]
        self.disc_start, self.disc_factor, self.disc_weight = disc_start, disc_factor, disc_weight
        self.disc_num_layers = disc_num_layers
        self.disc_conditional, self.use_actnorm = disc_conditional, use_actnorm
        self.perceptual_weight = perceptual_weight
        self.perceptual_loss = LPIPS(vgg_weights) if perceptual_weight > 0 else None
        self.discriminator = None
        if disc_factor > 0 and disc_weight > 0:
            discriminator = NLayerDiscriminator(disc_in_channels, disc_ndf, disc_num_layers, use_actnorm)
            self.discriminator = discriminator.apply(weights_init)

    def reconstruction_error(self, inputs: Tensor, reconstructions: Tensor) -> tuple[Tensor, Tensor]:
        """Return the error of each value, (B, C, H, W), and its perceptual term, (B, 1, 1, 1) or a scalar 0."""
        error = self.pixel_loss(inputs, reconstructions, reduction="none")
        if self.perceptual_loss is None:
            return error, error.new_zeros(())
        perceptual = self.perceptual_loss(inputs, reconstructions)
        return error + self.perceptual_weight * perceptual, perceptual

    def generator_loss(
        self, nll: Tensor, fake: Tensor, last_layer: Tensor | None, step: int, cond: Tensor | None, split: str
    ) -> tuple[Tensor, Log]:
        """Return the weighted adversarial term of reconstructions ``fake`` (VQGAN Eq. 6 and 7) and values to log."""
        adversarial = weight = zero = nll.new_zeros(())
        factor = self._factor(step)
        if self.discriminator is not None and factor > 0:
            adversarial = -self._judge(fake, cond).mean()
            if torch.is_grad_enabled() and nll.requires_grad:
                weight = self._adaptive_weight(nll, adversarial, last_layer)
        log = {
            f"{split}/d_weight": weight.detach(),
            f"{split}/disc_factor": zero + factor,
            f"{split}/g_loss": adversarial.detach(),
        }
        return weight * factor * adversarial, log

    def discriminator_loss(
        self, inputs: Tensor, reconstructions: Tensor, step: int, cond: Tensor | None, split: str
    ) -> tuple[Tensor, Log]:
        """Return the loss of the discriminator, 0 with zero gradients before ``disc_start``, and values to log."""
        if self.discriminator is None:
            raise ConfigError(
                "discriminator loss: expected a discriminator, got `disc_factor` or `disc_weight` 0. Set both above 0."
            )
        real = self._judge(inputs.detach(), cond)
        fake = self._judge(reconstructions.detach(), cond)
        loss = self._factor(step) * self.disc_loss(real, fake)
        log = {
            f"{split}/disc_loss": loss.detach(),
            f"{split}/logits_real": real.detach().mean(),
            f"{split}/logits_fake": fake.detach().mean(),
        }
        return loss, log

    def _factor(self, step: int) -> float:
        return self.disc_factor if step >= self.disc_start else 0.0

    def _judge(self, images: Tensor, cond: Tensor | None) -> Tensor:
        if (cond is not None) != self.disc_conditional:
            found = "no condition" if cond is None else "a condition"
            raise ConfigError(f"discriminator: got {found}, but `disc_conditional` is {self.disc_conditional}.")
        if self.use_actnorm and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise ConfigError(
                f"lossconfig.params.use_actnorm: expected a single process, got {dist.get_world_size()}. Train on one "
                "device, or set it to false."
            )
        if self.disc_num_layers > (most := most_discriminator_layers(min(images.shape[2:]))):
            raise UserError(
                f"model.params.lossconfig.params.disc_num_layers: expected at most {most} for images of "
                f"{images.shape[2]} x {images.shape[3]}, got {self.disc_num_layers}. Lower it"
            )
        return self.discriminator(images if cond is None else torch.cat([images, cond], dim=1))

    def _adaptive_weight(self, nll: Tensor, adversarial: Tensor, last_layer: Tensor | None) -> Tensor:
        """Return the ratio of the gradient norms at the decoder's last weight, times ``disc_weight``."""
        if last_layer is None:
            raise ValueError("adversarial loss: expected the decoder's last weight, got None. Pass `last_layer`.")
        nll_grad = torch.autograd.grad(nll, last_layer, retain_graph=True)[0].norm()
        adversarial_grad = torch.autograd.grad(adversarial, last_layer, retain_graph=True)[0].norm()
        ratio = (nll_grad / (adversarial_grad + 1e-4)).clamp(0.0, _MAX_ADVERSARIAL_WEIGHT)
        return ratio.detach() * self.disc_weight
