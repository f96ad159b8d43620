"""Loss of the KL-regularized autoencoder (Rombach et al. 2022, appendix G)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ldm.modules.distributions import DiagonalGaussian
from ldm.modules.losses.adversarial import AdversarialReconstruction, Log
from ldm.ranges import Finite, NonNegativeFloat, Weight


class LPIPSWithDiscriminator(AdversarialReconstruction):
    """Negative log-likelihood with one learned variance, KL divergence and adversarial loss.

    Args:
        disc_start: training step at which the adversarial terms start.
        logvar_init: initial log-variance of the reconstruction.
        kl_weight: weight of the divergence.
        options: keyword arguments of :class:`AdversarialReconstruction`.
    """

    def __init__(
        self, disc_start: NonNegativeFloat, logvar_init: Finite = 0.0, kl_weight: Weight = 1.0, **options: Any
    ) -> None:
        super().__init__(disc_start, **options)
        self.kl_weight = kl_weight
        self.logvar = nn.Parameter(torch.tensor(float(logvar_init)))

    def forward(
        self,
        inputs: Tensor,
        reconstructions: Tensor,
        posteriors: DiagonalGaussian,
        optimizer_idx: int,
        global_step: int,
        last_layer: Tensor | None = None,
        cond: Tensor | None = None,
        split: str = "train",
    ) -> tuple[Tensor, Log]:
        """Return the loss of one of the two optimizers.

        Args:
            inputs: (B, C, H, W) in [-1, 1].
            reconstructions: (B, C, H, W).
            posteriors: distribution of the latent.
            optimizer_idx: 0 for the autoencoder, 1 for the discriminator.
            global_step: training step, for ``disc_start``.
            last_layer: the decoder's last weight; required in training with a discriminator.
            cond: (B, C', H, W), with ``disc_conditional``.
            split: prefix of the log's keys.

        Returns:
            Scalar loss, summed over the values of an image, and detached scalars to log by name.
        """
        if optimizer_idx == 1:
            return self.discriminator_loss(inputs, reconstructions, global_step, cond, split)
        error, _ = self.reconstruction_error(inputs, reconstructions)
        nll = (error / self.logvar.exp() + self.logvar).sum() / len(inputs)
        kl = posteriors.kl().mean()
        adversarial, log = self.generator_loss(nll, reconstructions, last_layer, global_step, cond, split)
        loss = nll + self.kl_weight * kl + adversarial
        log |= {
            f"{split}/total_loss": loss.detach(),
            f"{split}/logvar": self.logvar.detach(),
            f"{split}/kl_loss": kl.detach(),
            f"{split}/nll_loss": nll.detach(),
            f"{split}/rec_loss": error.detach().mean(),
        }
        return loss, log


class DummyLoss(nn.Module):
    """Placeholder for the loss of a frozen first stage."""
