"""Methods of diffusion models that LDM's scripts call and that today's models do not have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ldm.util import get_obj_from_str


class ScriptMethods:
    """Mixin of diffusion models. Dimensions: B batch, C channels, h w the latent."""

    def get_learned_conditioning(self, c: Any) -> Any:
        """Return the condition stage's output for texts or for any other input; a distribution gives its mode."""
        encoded = self._encode_condition(list(c) if isinstance(c, tuple) else c)
        return encoded if isinstance(encoded, (Tensor, list, tuple, dict)) else encoded.mode()

    def get_unconditional_conditioning(self, batch_size: int, null_label: Any = None) -> Tensor:
        """Return the condition of no text or class, or of ``null_label``, for each sample, (B, ...)."""
        label = [null_label] if isinstance(null_label, str) else null_label
        empty = self._unconditional() if label is None else self.get_learned_conditioning(label)
        return empty.expand(batch_size, *empty.shape[1:])

    def get_first_stage_encoding(self, encoder_posterior: Any) -> Tensor:
        """Return scaled latents (B, C, h, w): of a distribution; those of ``encode_first_stage`` are scaled already."""
        is_latent = isinstance(encoder_posterior, Tensor)
        return encoder_posterior if is_latent else self.scale_factor * encoder_posterior.sample()

    def p_sample_loop(
        self, cond: Any, shape: Sequence[int], return_intermediates: bool = False, verbose: bool = True
    ) -> Any:
        """Return samples (B, C, h, w) of all time steps; with ``return_intermediates`` also the list of all states."""
        states = [torch.randn(tuple(shape), device=self.betas.device)]
        clip = self.input_options.clip_denoised
        sampler = get_obj_from_str("ldm.diffusion.samplers.DDPMSampler")(clip_denoised=clip)
        samples = self.sample(states[0], cond, sampler, callback=lambda step: states.append(step.x))
        return (samples, states) if return_intermediates else samples

    def progressive_denoising(self, cond: Any, shape: Sequence[int], verbose: bool = True) -> tuple[Tensor, list]:
        """See :meth:`p_sample_loop`."""
        return self.p_sample_loop(cond, shape, return_intermediates=True)
