"""Samples of a model from the texts of prompts, or from their images."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ldm.diffusion.samplers import Sampler, StepCallback
from ldm.evaluation.prompts.measure import PromptPlan
from ldm.models.contracts import HasJointSpace
from ldm.models.inputs import images_from_batch


class PromptSamplers:
    """Two samplers of the prompt score.

    Args:
        model: implements ``SampledFromTexts``; for ``from_images`` also ``HasJointSpace``.
        plan: the prompts.
        sampler: see ``build_sampler``.
    """

    def __init__(self, model: Any, plan: PromptPlan, sampler: Sampler) -> None:
        self.model, self.plan, self.sampler = model, plan, sampler

    @property
    def embeds_images(self) -> bool:
        """Whether ``from_images`` can be used."""
        return isinstance(self.model, HasJointSpace) and self.model.embeds_images

    def from_texts(self, part: slice, x_T: Tensor, w: float, callback: StepCallback | None = None) -> Tensor:
        """Return images (B, 3, H, W) of some prompts at the guidance strength w."""
        return self._images(self.model.condition_from_texts(self.plan.texts[part]), x_T, w, callback)

    def from_images(self, part: slice, x_T: Tensor, w: float) -> Tensor:
        """Return images (B, 3, H, W) under the conditions of the prompts' own images."""
        images = images_from_batch({"image": self.plan.images[part].to(x_T.device)})
        return self._images(self.model.condition_from_images(images), x_T, w, None)

    def _images(self, cond: Any, x_T: Tensor, w: float, callback: StepCallback | None) -> Tensor:
        z = self.model.sample(x_T, cond, self.sampler, guidance_scale=1 + w, callback=callback)
        return self.model.decode_first_stage(z)
