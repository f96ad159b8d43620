"""Loss of the vector-quantised autoencoder (Esser et al. 2021, VQGAN)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ldm.modules.losses.adversarial import AdversarialReconstruction, Log


class VQLPIPSWithDiscriminator(AdversarialReconstruction):
    """Reconstruction, codebook and adversarial loss.

    Args:
        disc_start: training step from which the discriminator counts.
        codebook_weight: weight of the codebook loss.
        n_classes: number of codes; given, perplexity and usage of the codebook are logged.
        options: keywords of :class:`AdversarialReconstruction`.
    """

    def __init__(
        self, disc_start: int, codebook_weight: float = 1.0, n_classes: int | None = None, **options: Any
    ) -> None:
        super().__init__(disc_start, **options)
        self.codebook_weight = codebook_weight
        self.n_classes = n_classes

    def forward(
        self,
        codebook_loss: Tensor,
        inputs: Tensor,
        reconstructions: Tensor,
        optimizer_idx: int,
        global_step: int,
        last_layer: Tensor | None = None,
        cond: Tensor | None = None,
        split: str = "train",
        predicted_indices: Tensor | None = None,
    ) -> tuple[Tensor, Log]:
        """Loss of one of the two optimisers.

        Args:
            codebook_loss: scalar of the quantiser.
            inputs: (B, C, H, W) in [-1, 1].
            reconstructions: (B, C, H, W).
            optimizer_idx: 0 for the autoencoder, 1 for the discriminator.
            global_step: training step, for ``disc_start``.
            last_layer: the decoder's last weight, needed in training with a discriminator.
            cond: (B, C', H, W), only with ``disc_conditional``.
            split: prefix of the log's keys.
            predicted_indices: the codes used, any shape, for perplexity and usage.

        Returns:
            scalar loss; name -> scalar to log, detached.
        """
        if optimizer_idx == 1:
            return self.discriminator_loss(inputs, reconstructions, global_step, cond, split)
        error, perceptual = self.reconstruction_error(inputs, reconstructions)
        nll = error.mean()
        adversarial, log = self.generator_loss(nll, reconstructions, last_layer, global_step, cond, split)
        loss = nll + adversarial + self.codebook_weight * codebook_loss.mean()
        log |= {
            f"{split}/total_loss": loss.detach(),
            f"{split}/quant_loss": codebook_loss.detach().mean(),
            f"{split}/nll_loss": nll.detach(),
            f"{split}/rec_loss": nll.detach(),
            f"{split}/p_loss": perceptual.detach().mean(),
        }
        if predicted_indices is not None and self.n_classes is not None:
            perplexity, usage = codebook_statistics(predicted_indices, self.n_classes)
            log |= {f"{split}/perplexity": perplexity, f"{split}/cluster_usage": usage}
        return loss, log


@torch.no_grad()
def codebook_statistics(indices: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """How evenly and how widely codes are used.

    Args:
        indices: codes of a batch, any shape, in 0..num_codes-1.
        num_codes: size of the codebook.

    Returns:
        perplexity, exp of the entropy: 1 (a single code) to num_codes (all alike); number of codes used (float).
    """
    indices = indices.flatten()
    ones = torch.ones_like(indices, dtype=torch.float)
    counts = ones.new_zeros(num_codes).index_add_(0, indices, ones)  # bincount would wait for the device
    frequencies = counts / counts.sum()
    perplexity = torch.exp(-(frequencies * torch.log(frequencies + 1e-10)).sum())
    return perplexity, (counts > 0).float().sum()
