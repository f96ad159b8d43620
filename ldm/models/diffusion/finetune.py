"""Stable Diffusion's models that concatenate entries of the batch to the noisy latent: inpainting, depth, upscaling."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.diffusion.conditions import Condition, PartsCondition, as_condition
from ldm.diffusion.schedule import NoiseSchedule, extract
from ldm.models.diffusion.latent import LatentDiffusion
from ldm.models.inputs import images_from_batch
from ldm.models.options import ScheduleOptions
from ldm.ranges import OptionalCount
from ldm.util import ConfigError, instantiate_from_config

logger = logging.getLogger(__name__)

FIRST_CONVOLUTION = ("model.diffusion_model.input_blocks.0.0.weight", "model_ema.diffusion_modelinput_blocks00weight")


class LatentFinetuneDiffusion(LatentDiffusion):
    """Latent diffusion with entries of the batch, resized to the latent, beside the condition stage's output.

    Args:
        concat_keys: entries of the batch, in the order of the network's channels; by default those of the class.
        masked_image_key: the entry that the first stage encodes.
        finetune_keys: weights that a checkpoint may have with fewer input channels; the new ones start at zero.
        **kwargs: see ``LatentDiffusion``.
    """

    lowest_of_masks = 0.0

    def __init__(
        self,
        concat_keys: Sequence[str] | None = None,
        masked_image_key: str = "masked_image",
        finetune_keys: Sequence[str] | None = FIRST_CONVOLUTION,
        **kwargs: Any,
    ) -> None:
        self.concat_keys, self.masked_image_key = tuple(concat_keys or self.concat_keys), masked_image_key
        self.finetune_keys = tuple(finetune_keys or ())
        super().__init__(**kwargs)
        key, name = self.model.conditioning_key, type(self).__name__
        if not self.model.concatenates:
            raise ConfigError(f"model.params.conditioning_key: expected hybrid or concat for {name}, got {key!r}")

    def concatenated(self, batch: Mapping[str, Any], key: str) -> Tensor:
        """See the base class; the masked image is encoded."""
        if key == self.masked_image_key:
            return self.encode_first_stage(images_from_batch(batch, key))
        return super().concatenated(batch, key)

    def initial_state(self, state: Mapping[str, Tensor], only_unet: bool) -> Mapping[str, Tensor]:
        """See the base class; weights of ``finetune_keys`` get the input channels that they lack."""
        own, widened = self.state_dict(), dict(state)
        for key in self.finetune_keys:
            if key in own and key in state and (lacking := own[key].shape[1] - state[key].shape[1]) > 0:
                widened[key] = F.pad(state[key], (0, 0, 0, 0, 0, lacking))
                logger.info("%s: %d input channels loaded, %d start at zero", key, state[key].shape[1], lacking)
        return super().initial_state(widened, only_unet)


class LatentInpaintDiffusion(LatentFinetuneDiffusion):
    """Inpainting: mask, which is 1 in the part to fill and else 0, and encoded masked image are concatenated."""

    concat_keys = ("mask", "masked_image")


class LatentDepth2ImageDiffusion(LatentFinetuneDiffusion):
    """Conditioning on a depth map of the data; the network that computes depth maps is not included."""

    concat_keys = ("midas_in",)

    def concatenated(self, batch: Mapping[str, Any], key: str) -> Tensor:
        """Return the depth map, resized, and scaled to [-1, 1] for each image."""
        depth, size = images_from_batch(batch, key), self.size_of_latents(batch)
        depth = F.interpolate(depth, size, mode="bicubic", align_corners=False)
        low, high = (extreme(depth, dim=(1, 2, 3), keepdim=True) for extreme in (torch.amin, torch.amax))
        return 2 * (depth - low) / (high - low + 0.001) - 1


class LatentUpscaleFinetuneDiffusion(LatentFinetuneDiffusion):
    """Upscaling: the low-resolution image, which has the size of the latent, is concatenated."""

    concat_keys = ("lr",)

    def concatenated(self, batch: Mapping[str, Any], key: str) -> Tensor:
        """Return the image, not resized."""
        return images_from_batch(batch, key)


class LatentUpscaleDiffusion(LatentUpscaleFinetuneDiffusion):
    """Stable Diffusion's x4 upscaler: the low-resolution image is noised, and the network takes the level as ``y``.

    Args:
        low_scale_config: ``{target, params}`` of :class:`ImageConcatWithNoiseAugmentation`.
        low_scale_key: entry of the batch with the image.
        **kwargs: see ``LatentDiffusion``.
    """

    def __init__(self, low_scale_config: Mapping[str, Any], low_scale_key: str = "LR", **kwargs: Any) -> None:
        self.low_scale_config = low_scale_config
        super().__init__(concat_keys=(low_scale_key,), finetune_keys=None, **kwargs)

    def build_cond_stage(self, config: Mapping[str, Any] | str) -> nn.Module | None:
        """See the base class; attaches the noise augmentation as well."""
        low_scale, classes = instantiate_from_config(self.low_scale_config), self.model.num_classes
        if classes is not None and low_scale.max_noise_level > classes:
            raise ConfigError(
                f"model.params.unet_config.params.num_classes: expected at least {low_scale.max_noise_level}, the "
                f"max_noise_level of low_scale_config, got {classes}. Change one of them"
            )
        self.add_frozen("low_scale_model", low_scale)
        return super().build_cond_stage(config)

    def complete_condition(self, cond: Condition | None, batch: Mapping[str, Any]) -> Condition:
        """See the base class; the image is noised, and its level is added as ``c_adm``."""
        parts = super().complete_condition(cond, batch).parts
        image, level = self.low_scale_model(parts["c_concat"][0].value)
        return PartsCondition({**parts, **as_condition({"c_concat": image, "c_adm": level}).parts})


class ImageConcatWithNoiseAugmentation(nn.Module):
    """Noise augmentation of a low-resolution image (Ho et al. 2022).

    Args:
        noise_schedule_config: see ``ScheduleOptions``.
        max_noise_level: levels are drawn below it.
        to_cuda: without effect.
    """

    def __init__(
        self, noise_schedule_config: Mapping[str, Any], max_noise_level: OptionalCount = 1000, to_cuda: bool = False
    ) -> None:
        super().__init__()
        self.max_noise_level = max_noise_level
        constants = NoiseSchedule.from_betas(ScheduleOptions(**noise_schedule_config).betas()).constants()
        if max_noise_level > len(constants["betas"]):
            limit = f"expected at most {len(constants['betas'])} (timesteps)"
            raise ConfigError(f"low_scale_config.params.max_noise_level: {limit}, got {max_noise_level}. Lower it")
        for name, value in constants.items():
            if not name.startswith(("posterior_", "shift_", "ddim_")):
                self.register_buffer(name, value)

    def forward(self, x: Tensor, noise_level: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the noised image x (B, C, h, w), and its noise levels (B,) int64, by default drawn."""
        if noise_level is None:
            noise_level = torch.randint(0, self.max_noise_level, (len(x),), device=x.device)
        signal = extract(self.sqrt_alphas_cumprod, noise_level, x) * x
        return signal + extract(self.sqrt_one_minus_alphas_cumprod, noise_level, x) * torch.randn_like(x), noise_level
