"""What the losses of the autoencoders share: pixels, perception and a discriminator (Esser et al. 2021, VQGAN).

Legend: B batch, C channels, H W space.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.modules.discriminator import NLayerDiscriminator
from ldm.modules.lpips import LPIPS
from ldm.util import ConfigError

Log = dict[str, Tensor]

_MAX_ADVERSARIAL_WEIGHT = 1e4


def hinge_d_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Mean hinge loss of a discriminator's logits."""
    return 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())


def vanilla_d_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Mean cross-entropy of a discriminator's logits."""
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


_D_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"hinge": hinge_d_loss, "vanilla": vanilla_d_loss}


def pixel_l1(x: Tensor, y: Tensor) -> Tensor:
    """Absolute differences."""
    return (x - y).abs()


def pixel_l2(x: Tensor, y: Tensor) -> Tensor:
    """Squared differences."""
    return (x - y).square()


_PIXEL_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"l1": pixel_l1, "l2": pixel_l2}


class AdversarialReconstruction(nn.Module):
    """Reconstruction and adversarial terms; a subclass adds what its bottleneck needs.

    Args:
        disc_start: training step from which the discriminator counts.
        pixelloss_weight: accepted from older configs; it never had an effect.
        disc_num_layers: halvings in the discriminator.
        disc_in_channels: channels of the images (plus those of the condition).
        disc_factor: factor of both adversarial losses; 0 builds no discriminator.
        disc_weight: weight of the generator's adversarial loss; 0 builds no discriminator.
        perceptual_weight: weight of LPIPS; 0 builds no LPIPS.
        use_actnorm: not available; batch normalisation is used.
        disc_conditional: the discriminator also sees a condition.
        disc_ndf: width of the discriminator.
        disc_loss: "hinge" or "vanilla".
        perceptual_loss: "lpips".
        pixel_loss: "l1" or "l2".
        vgg_weights: path of VGG16's weights for LPIPS, see :mod:`ldm.modules.lpips`.
    """

    def __init__(
        self,
        disc_start: int,
        pixelloss_weight: float = 1.0,
        disc_num_layers: int = 3,
        disc_in_channels: int = 3,
        disc_factor: float = 1.0,
        disc_weight: float = 1.0,
        perceptual_weight: float = 1.0,
        use_actnorm: bool = False,
        disc_conditional: bool = False,
        disc_ndf: int = 64,
        disc_loss: str = "hinge",
        perceptual_loss: str = "lpips",
        pixel_loss: str = "l1",
        vgg_weights: str | None = None,
    ) -> None:
        super().__init__()
        _check_choice("disc_loss", disc_loss, _D_LOSSES)
        _check_choice("pixel_loss", pixel_loss, _PIXEL_LOSSES)
        _check_choice("perceptual_loss", perceptual_loss, {"lpips"})
        _check_choice("use_actnorm", use_actnorm, {False})
        self.pixel_loss = _PIXEL_LOSSES[pixel_loss]
        self.disc_loss = _D_LOSSES[disc_loss]
        self.disc_start = disc_start
        self.disc_factor = disc_factor
        self.disc_weight = disc_weight
        self.disc_conditional = disc_conditional
        self.perceptual_weight = perceptual_weight
        self.perceptual_loss = LPIPS(vgg_weights) if perceptual_weight > 0 else None
        self.discriminator = None
        if disc_factor > 0 and disc_weight > 0:
            self.discriminator = NLayerDiscriminator(disc_in_channels, disc_ndf, disc_num_layers)

    def reconstruction_error(self, inputs: Tensor, reconstructions: Tensor) -> tuple[Tensor, Tensor]:
        """Error of each value (B, C, H, W) and the perceptual part of it, (B, 1, 1, 1) or a scalar 0."""
        error = self.pixel_loss(inputs, reconstructions)
        if self.perceptual_loss is None:
            return error, error.new_zeros(())
        perceptual = self.perceptual_loss(inputs, reconstructions)
        return error + self.perceptual_weight * perceptual, perceptual

    def generator_loss(
        self,
        nll: Tensor,
        reconstructions: Tensor,
        last_layer: Tensor | None,
        step: int,
        cond: Tensor | None,
        split: str,
    ) -> tuple[Tensor, Log]:
        """The weighted adversarial term of the autoencoder (VQGAN Eq. 6 and 7) and what to log of it."""
        zero = nll.new_zeros(())
        factor = self._factor(step)
        adversarial, weight = zero, zero
        if self.discriminator is not None and factor > 0:
            adversarial = -self._judge(reconstructions, cond).mean()
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
        """The discriminator's own loss, 0 (with zero gradients) before ``disc_start``."""
        if self.discriminator is None:
            raise ConfigError(
                "the loss has no discriminator, because `disc_factor` or `disc_weight` is 0: skip its step."
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
            raise ConfigError(
                f"`disc_conditional` is {self.disc_conditional}, but the condition is "
                f"{'given' if cond is not None else 'missing'}: they must agree."
            )
        return self.discriminator(images if cond is None else torch.cat([images, cond], dim=1))

    def _adaptive_weight(self, nll: Tensor, adversarial: Tensor, last_layer: Tensor | None) -> Tensor:
        """Balance of the two gradients at the decoder's last weight, times ``disc_weight``."""
        if last_layer is None:
            raise ValueError("the adversarial loss is balanced at the decoder's last weight: give `last_layer`.")
        nll_grad = torch.autograd.grad(nll, last_layer, retain_graph=True)[0].norm()
        adversarial_grad = torch.autograd.grad(adversarial, last_layer, retain_graph=True)[0].norm()
        ratio = (nll_grad / (adversarial_grad + 1e-4)).clamp(0.0, _MAX_ADVERSARIAL_WEIGHT)
        return ratio.detach() * self.disc_weight


def _check_choice(key: str, value: object, known: object) -> None:
    if value not in known:
        raise ConfigError(f"lossconfig.params.{key} is {value!r}; expected one of {sorted(known)}.")
