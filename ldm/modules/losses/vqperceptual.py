"""Loss of the vector-quantized autoencoder (Esser et al. 2021, VQGAN)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ldm.modules.losses.adversarial import AdversarialReconstruction, Log
from ldm.ranges import Count, NonNegativeFloat, Weight


class VQLPIPSWithDiscriminator(AdversarialReconstruction):
    """Reconstruction, codebook and adversarial loss.

    Args:
        disc_start: training step at which the adversarial terms start.
        codebook_weight: weight of the codebook loss.
        n_classes: number of codes; if given, perplexity and usage of the codebook are logged.
        options: keyword arguments of :class:`AdversarialReconstruction`.
    """

    def __init__(
        self,
        disc_start: NonNegativeFloat,
        codebook_weight: Weight = 1.0,
        n_classes: Count | None = None,
        **options: Any,
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
        """Return the loss of one of the two optimizers; other arguments are those of ``LPIPSWithDiscriminator``.

        Args:
            codebook_loss: scalar loss of the quantizer.
            inputs: (B, C, H, W) in [-1, 1].
            reconstructions: (B, C, H, W).
            predicted_indices: indices of the used codes, any shape, for perplexity and usage.

        Returns:
            Scalar loss, and detached scalars to log by name.
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
    """Return perplexity and usage of the codebook.

    Args:
        indices: codes of a batch, any shape, in [0, num_codes).
        num_codes: size of the codebook.

    Returns:
        Perplexity, exp of the entropy of the codes, in [1, num_codes], and the number of used codes, float scalars.
    """
    indices = indices.flatten()
    ones = torch.ones_like(indices, dtype=torch.float)
    counts = ones.new_zeros(num_codes).index_add_(0, indices, ones)  # bincount synchronizes
    frequencies = counts / counts.sum()
    perplexity = torch.exp(-(frequencies * torch.log(frequencies + 1e-10)).sum())
    return perplexity, (counts > 0).float().sum()
