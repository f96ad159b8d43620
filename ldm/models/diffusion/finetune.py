"""Stable Diffusion's models that concatenate entries of the batch to the noisy latent: inpainting, depth, upscaling."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ldm.diffusion.conditions import Condition, DictCondition, ListCondition, TensorCondition, as_condition
from ldm.diffusion.upscaling import ImageConcatWithNoiseAugmentation
from ldm.models.diffusion.latent import LatentDiffusion
from ldm.models.inputs import batch_value, images_from_batch, mask_from_batch
from ldm.pictures.grid import CaptionedGrid
from ldm.util import ConfigError, UserError, instantiate_from_config

logger = logging.getLogger(__name__)

FIRST_CONVOLUTION = ("model.diffusion_model.input_blocks.0.0.weight", "model_ema.diffusion_modelinput_blocks00weight")


class LatentFinetuneDiffusion(LatentDiffusion):
    """Latent diffusion with entries of the batch, resized to the latent, beside the condition stage's output.

    Args:
        concat_keys: entries of the batch, in the order of the network's channels.
        masked_image_key: the entry that the first stage encodes.
        finetune_keys: weights that a checkpoint may have with fewer input channels; the new ones start at zero.
        keep_finetune_dims: number of input channels that are kept of such a weight.
        c_concat_log_start: first concatenated channel of the picture ``c_concat_decoded``.
        c_concat_log_end: end of its channels; without both, there is no such picture.
        **kwargs: see ``LatentDiffusion``.
    """

    def __init__(
        self,
        concat_keys: Sequence[str],
        masked_image_key: str | None = None,
        finetune_keys: Sequence[str] | None = FIRST_CONVOLUTION,
        keep_finetune_dims: int = 4,
        c_concat_log_start: int | None = None,
        c_concat_log_end: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.concat_keys, self.masked_image_key = tuple(concat_keys), masked_image_key
        self.finetune_keys, self.keep_finetune_dims = tuple(finetune_keys or ()), keep_finetune_dims
        self.logged_channels = slice(c_concat_log_start, c_concat_log_end)
        super().__init__(**kwargs)
        key, name = self.model.conditioning_key, type(self).__name__
        if not self.model.concatenates:
            raise ConfigError(f"model.params.conditioning_key: expected hybrid or concat for {name}, got {key!r}")

    def concatenated(self, batch: Mapping[str, Any], key: str) -> Tensor:
        """Return an entry of the batch in the size of the latent, (B, c, h, w)."""
        if key == self.masked_image_key:
            return self.encode_first_stage(images_from_batch(batch, key))
        return F.interpolate(mask_from_batch(batch, key, lowest=0.0), self.size_of_latents(batch))

    def entries(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return the conditions beside that of the condition stage, by their place, see ``DictCondition``."""
        return {"c_concat": [self.concatenated(batch, key) for key in self.concat_keys]}

    def complete_condition(self, cond: Condition | None, batch: Mapping[str, Any]) -> Condition:
        """Add the entries, which guidance and condition dropout leave as they are."""
        cond = ListCondition((cond,)) if isinstance(cond, TensorCondition) else cond
        return DictCondition(as_condition(self.entries(batch)).parts | ({} if cond is None else {"c_crossattn": cond}))

    def model_state(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """See the base class; weights of ``finetune_keys`` get the input channels that they lack."""
        return super().model_state(self._widened(state))

    def network_state(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """See ``model_state``."""
        return super().network_state(self._widened(state))

    def _widened(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        own, widened = self.state_dict(), dict(state)
        for key in self.finetune_keys:
            if key in own and key in state and state[key].shape[1] < own[key].shape[1]:
                kept = state[key][:, : self.keep_finetune_dims]
                rest = own[key].new_zeros(len(kept), own[key].shape[1] - kept.shape[1], *kept.shape[2:])
                widened[key] = torch.cat([kept, rest.to(kept)], dim=1)
                logger.info("%s: %d input channels loaded, %d start at zero", key, kept.shape[1], rest.shape[1])
        return widened

    def draw_pictures(self, batch: Mapping[str, Any], **options: Any) -> dict[str, Tensor | CaptionedGrid]:
        """See the base class; with ``c_concat_log_start`` or ``_end`` also the decoded channels of the condition."""
        pictures = super().draw_pictures(batch, **options)
        if self.logged_channels != slice(None):
            maps = torch.cat(self.entries(batch)["c_concat"], dim=1)[:, self.logged_channels]
            pictures["c_concat_decoded"] = self.decode_first_stage(maps)
        return pictures


class LatentInpaintDiffusion(LatentFinetuneDiffusion):
    """Inpainting: mask, which is 1 in the part to fill and else 0, and encoded masked image are concatenated."""

    def __init__(
        self,
        concat_keys: Sequence[str] = ("mask", "masked_image"),
        masked_image_key: str = "masked_image",
        **kwargs: Any,
    ) -> None:
        super().__init__(concat_keys=concat_keys, masked_image_key=masked_image_key, **kwargs)


class LatentDepth2ImageDiffusion(LatentFinetuneDiffusion):
    """Conditioning on a depth map of the data; ``depth_stage_config``, a network that computes it, is not built."""

    def __init__(
        self, depth_stage_config: Any = None, concat_keys: Sequence[str] = ("midas_in",), **kwargs: Any
    ) -> None:
        super().__init__(concat_keys=concat_keys, **kwargs)
        if depth_stage_config is not None:
            message = "depth_stage_config is not run, and its weights depth_model.* are not loaded: depth maps are read"
            logger.warning(f"{message} from %s", " and ".join(f"batch['{key}']" for key in self.concat_keys))

    def concatenated(self, batch: Mapping[str, Any], key: str) -> Tensor:
        """Return the depth map, resized, and scaled to [-1, 1] for each image."""
        depth = images_from_batch(batch, key)
        if depth.shape[1] != 1:
            raise UserError(
                f"batch['{key}']: expected depth maps (B, H, W) or (B, H, W, 1), got {tuple(batch[key].shape)}. "
                "Compute them before training; the network of depth_stage_config is not included"
            )
        depth = F.interpolate(depth, self.size_of_latents(batch), mode="bicubic", align_corners=False)
        low, high = (extreme(depth, dim=(1, 2, 3), keepdim=True) for extreme in (torch.amin, torch.amax))
        return 2 * (depth - low) / (high - low + 0.001) - 1


class LatentUpscaleFinetuneDiffusion(LatentFinetuneDiffusion):
    """Upscaling: the low-resolution image, which has the size of the latent, is concatenated.

    Args:
        concat_keys: entries of the batch.
        reshuffle_patch_size: p: the image is cut into p x p tiles, which become channels.
        low_scale_config: ``{target, params}`` of a map of the image, see ``ldm.diffusion.upscaling``; the network takes
            its noise level as ``y``.
        low_scale_key: the entry that it maps.
        noise_level_key: entry of the batch with noise levels (B,) int64; by default they are drawn.
        **kwargs: see ``LatentFinetuneDiffusion``.
    """

    def __init__(
        self,
        concat_keys: Sequence[str] = ("lr",),
        reshuffle_patch_size: int | None = None,
        low_scale_config: Mapping[str, Any] | None = None,
        low_scale_key: str | None = None,
        noise_level_key: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.reshuffle_patch_size, self.low_scale_config = reshuffle_patch_size, low_scale_config
        self.low_scale_key, self.noise_level_key = low_scale_key, noise_level_key
        super().__init__(concat_keys=concat_keys, **kwargs)

    def build_parts(self) -> None:
        """See the base class."""
        low_scale = self.low_scale_config and instantiate_from_config(self.low_scale_config)
        levels = low_scale.max_noise_level if isinstance(low_scale, ImageConcatWithNoiseAugmentation) else 0
        if levels > (self.model.num_classes or levels):
            raise ConfigError(
                f"model.params.unet_config.params.num_classes: expected at least {levels}, the max_noise_level of "
                f"low_scale_config, got {self.model.num_classes}. Change one of them"
            )
        self.add_frozen("low_scale_model", low_scale)

    def concatenated(self, batch: Mapping[str, Any], key: str) -> Tensor:
        """Return the image, not resized."""
        low, side = images_from_batch(batch, key), self.reshuffle_patch_size
        return low if side is None else rearrange(low, "b c (p h) (q w) -> b (p q c) h w", p=side, q=side)

    def entries(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """See the base class; with noise levels as ``c_adm``."""
        parts = super().entries(batch)
        if self.low_scale_model is None or self.low_scale_key not in self.concat_keys:
            return parts
        maps, place = parts["c_concat"], self.concat_keys.index(self.low_scale_key)
        given = None if self.noise_level_key is None else batch_value(batch, self.noise_level_key)
        maps[place], level = self.low_scale_model(maps[place], given)
        return parts if level is None else {**parts, "c_adm": level}


class LatentUpscaleDiffusion(LatentUpscaleFinetuneDiffusion):
    """Stable Diffusion's x4 upscaler (``hybrid-adm``)."""

    def __init__(self, low_scale_config: Mapping[str, Any], low_scale_key: str = "LR", **kwargs: Any) -> None:
        keys = {"concat_keys": (low_scale_key,), "low_scale_key": low_scale_key, "finetune_keys": None}
        super().__init__(low_scale_config=low_scale_config, **keys, **kwargs)
