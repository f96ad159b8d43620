"""Latent diffusion with entries of the batch beside the condition stage's output (Stable Diffusion 1.5 and 2).

The models differ in their entries: a mask and the masked image, a depth map, a low-resolution image, or an embedding of
the image. Their dotted paths in configs are ``ldm.models.diffusion.ddpm.<class>``.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ldm.diffusion.conditions import Condition, DictCondition, ListCondition, TensorCondition
from ldm.models.diffusion.latent import LatentDiffusion
from ldm.models.inputs import batch_value, images_from_batch, mask_from_batch
from ldm.pictures.grid import CaptionedGrid
from ldm.util import ConfigError, UserError, instantiate_from_config

logger = logging.getLogger(__name__)

FIRST_CONVOLUTION = ("model.diffusion_model.input_blocks.0.0.weight", "model_ema.diffusion_modelinput_blocks00weight")


class LatentFinetuneDiffusion(LatentDiffusion):
    """Latent diffusion that concatenates entries of the batch, resized to the latent, to the noisy latent."""

    def __init__(
        self,
        concat_keys: Sequence[str],
        finetune_keys: Sequence[str] | None = FIRST_CONVOLUTION,
        keep_finetune_dims: int = 4,
        c_concat_log_start: int | None = None,
        c_concat_log_end: int | None = None,
        **kwargs: Any,
    ) -> None:
        """Build the model.

        Args:
            concat_keys: entries of the batch, in the order of the network's channels.
            finetune_keys: weights that a checkpoint may have with fewer input channels; the new ones start at zero.
            keep_finetune_dims: number of input channels that are kept of such a weight.
            c_concat_log_start: first concatenated channel of the picture ``c_concat_decoded``.
            c_concat_log_end: end of its channels; without both, there is no such picture.
            **kwargs: see ``LatentDiffusion``; ``conditioning_key`` is ``hybrid`` or ``concat``.

        Raises:
            ConfigError: ``conditioning_key`` does not concatenate.
        """
        self.concat_keys = tuple(concat_keys)
        self.finetune_keys, self.keep_finetune_dims = tuple(finetune_keys or ()), keep_finetune_dims
        self.logged_channels = slice(c_concat_log_start, c_concat_log_end)
        super().__init__(**kwargs)
        if not self.model.concatenates:
            raise ConfigError(
                f"model.params.conditioning_key: expected hybrid, hybrid-adm or concat for {type(self).__name__}, got "
                f"{self.model.conditioning_key!r}"
            )

    def concatenated(self, batch: Mapping[str, Any], key: str) -> Tensor:
        """Return an entry of the batch in the size of the latent, (B, c, h, w)."""
        images = images_from_batch(batch, self.first_stage_key)
        return F.interpolate(mask_from_batch(batch, key, lowest=0.0), self.latent_size(*images.shape[-2:]))

    def entries(self, batch: Mapping[str, Any]) -> dict[str, list[Tensor]]:
        """Return the conditions beside the condition stage's output, see ``DictCondition``."""
        return {"c_concat": [self.concatenated(batch, key) for key in self.concat_keys]}

    def complete_condition(self, cond: Condition | None, batch: Mapping[str, Any]) -> Condition:
        """Add the entries, which guidance and condition dropout leave as they are."""
        return _joined(self.entries(batch), cond)

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
                widened[key] = torch.zeros_like(own[key], device="cpu")
                widened[key][:, : kept.shape[1]] = kept
                logger.info("%s: %d input channels loaded, %d start at zero", key, kept.shape[1], own[key].shape[1])
        return widened

    def draw_pictures(self, batch: Mapping[str, Any], **options: Any) -> dict[str, Tensor | CaptionedGrid]:
        """See the base class; with ``c_concat_log_start`` or ``_end`` also the decoded channels of the condition."""
        pictures = super().draw_pictures(batch, **options)
        if self.logged_channels != slice(None):
            count = len(pictures["inputs"]) if "inputs" in pictures else None
            maps = torch.cat([self.concatenated(batch, key)[:count] for key in self.concat_keys], dim=1)
            pictures["c_concat_decoded"] = self.decode_first_stage(maps[:, self.logged_channels])
        return pictures


class LatentInpaintDiffusion(LatentFinetuneDiffusion):
    """Inpainting: mask (1 in the part to fill, else 0) and encoded masked image are concatenated."""

    def __init__(
        self,
        concat_keys: Sequence[str] = ("mask", "masked_image"),
        masked_image_key: str = "masked_image",
        **kwargs: Any,
    ) -> None:
        """Build the model; ``masked_image_key`` is the entry that the first stage encodes."""
        if masked_image_key not in concat_keys:
            raise ConfigError(
                f"model.params.masked_image_key: expected one of concat_keys ({', '.join(concat_keys)}), got "
                f"{masked_image_key!r}"
            )
        self.masked_image_key = masked_image_key
        super().__init__(concat_keys=concat_keys, **kwargs)

    def concatenated(self, batch: Mapping[str, Any], key: str) -> Tensor:
        """See the base class."""
        if key == self.masked_image_key:
            return self.encode_first_stage(images_from_batch(batch, key))
        return super().concatenated(batch, key)


class LatentDepth2ImageDiffusion(LatentFinetuneDiffusion):
    """Conditioning on a depth map; the map is part of the data, and no depth network is run."""

    def __init__(
        self, depth_stage_config: Any = None, concat_keys: Sequence[str] = ("midas_in",), **kwargs: Any
    ) -> None:
        """Build the model; ``depth_stage_config`` is not built."""
        super().__init__(concat_keys=concat_keys, **kwargs)
        if depth_stage_config is not None:
            logger.warning(
                "depth_stage_config is not run: batch['%s'] must contain depth maps, and weights of `depth_model.` in "
                "a checkpoint are not loaded",
                self.concat_keys[0],
            )

    def concatenated(self, batch: Mapping[str, Any], key: str) -> Tensor:
        """Return the depth map, resized and scaled to [-1, 1] for each image.

        Raises:
            UserError: it has several channels, such as the input of a depth network.
        """
        depth = images_from_batch(batch, key)
        if depth.shape[1] != 1:
            raise UserError(
                f"batch['{key}']: expected depth maps of one channel, (B, H, W) or (B, H, W, 1), got "
                f"{tuple(batch[key].shape)}. Compute them before training; MiDaS is not included"
            )
        size = self.latent_size(*images_from_batch(batch, self.first_stage_key).shape[-2:])
        depth = F.interpolate(depth, size, mode="bicubic", align_corners=False)
        low, high = (extreme(depth, dim=(1, 2, 3), keepdim=True) for extreme in (torch.amin, torch.amax))
        return 2 * (depth - low) / (high - low + 0.001) - 1


class LatentUpscaleFinetuneDiffusion(LatentFinetuneDiffusion):
    """Upscaling: the low-resolution image, which has the size of the latent, is concatenated, with noise if wanted."""

    def __init__(
        self,
        concat_keys: Sequence[str] = ("lr",),
        reshuffle_patch_size: int | None = None,
        low_scale_config: Mapping[str, Any] | None = None,
        low_scale_key: str | None = None,
        noise_level_key: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Build the model.

        Args:
            concat_keys: entries of the batch.
            reshuffle_patch_size: p: the image is cut into p x p tiles, which become channels.
            low_scale_config: ``{target, params}`` of the map of the image, such as
                ``ldm.diffusion.upscaling.ImageConcatWithNoiseAugmentation``. Its noise level is passed as ``y``.
            low_scale_key: the entry that it maps.
            noise_level_key: entry of the batch with noise levels (B,) int64; by default they are drawn.
            **kwargs: see ``LatentFinetuneDiffusion``.
        """
        self.reshuffle_patch_size, self._low_scale_config = reshuffle_patch_size, low_scale_config
        self.low_scale_key, self.noise_level_key = low_scale_key, noise_level_key
        super().__init__(concat_keys=concat_keys, **kwargs)

    def build_parts(self) -> None:
        """See the base class."""
        self.add_frozen("low_scale_model", self._low_scale_config and instantiate_from_config(self._low_scale_config))

    def concatenated(self, batch: Mapping[str, Any], key: str) -> Tensor:
        """See the base class; the image is not resized."""
        low, side = images_from_batch(batch, key), self.reshuffle_patch_size
        return low if side is None else rearrange(low, "b c (p h) (q w) -> b (p q c) h w", p=side, q=side)

    def entries(self, batch: Mapping[str, Any]) -> dict[str, list[Tensor]]:
        """See the base class; the low-scale model may add noise, and its levels as ``c_adm``."""
        parts = super().entries(batch)
        if self.low_scale_model is None or self.low_scale_key not in self.concat_keys:
            return parts
        maps, place = parts["c_concat"], self.concat_keys.index(self.low_scale_key)
        given = None if self.noise_level_key is None else batch_value(batch, self.noise_level_key)
        maps[place], level = self.low_scale_model(maps[place], given)
        return parts if level is None else {**parts, "c_adm": [level]}


class LatentUpscaleDiffusion(LatentUpscaleFinetuneDiffusion):
    """Stable Diffusion's x4 upscaler (``hybrid-adm``)."""

    def __init__(
        self,
        low_scale_config: Mapping[str, Any],
        low_scale_key: str = "LR",
        noise_level_key: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Build the model; see ``LatentUpscaleFinetuneDiffusion``."""
        entries = {"concat_keys": (low_scale_key,), "low_scale_key": low_scale_key, "noise_level_key": noise_level_key}
        super().__init__(low_scale_config=low_scale_config, finetune_keys=None, **entries, **kwargs)


class ImageEmbeddingConditionedLatentDiffusion(LatentDiffusion):
    """Conditioning on an embedding of the image beside the text (``crossattn-adm``; Stable unCLIP)."""

    def __init__(
        self,
        embedder_config: Mapping[str, Any],
        embedding_key: str = "jpg",
        embedding_dropout: float = 0.5,
        freeze_embedder: bool = True,
        noise_aug_config: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Build the model.

        Args:
            embedder_config: ``{target, params}`` of the map from images (B, 3, H, W) to embeddings (B, D).
            embedding_key: entry of the batch with the images.
            embedding_dropout: probability of a zero embedding in training.
            freeze_embedder: do not train the embedder.
            noise_aug_config: ``{target, params}`` of a module that returns noised embeddings (B, D) and vectors of
                their noise levels (B, E).
            **kwargs: see ``LatentDiffusion``.
        """
        self._configs = embedder_config, noise_aug_config
        self.embedding_key, self.embedding_dropout, self.freezes = embedding_key, embedding_dropout, freeze_embedder
        super().__init__(**kwargs)

    def build_parts(self) -> None:
        """See the base class."""
        embedder, noise = (config and instantiate_from_config(config) for config in self._configs)
        (self.add_frozen if self.freezes else self.add_trained)("embedder", embedder)
        self.add_frozen("noise_augmentor", noise)

    def complete_condition(self, cond: Condition | None, batch: Mapping[str, Any]) -> Condition:
        """Add the embedding, which guidance and condition dropout leave as it is."""
        vectors = self.embedder(images_from_batch(batch, self.embedding_key))
        if self.noise_augmentor is not None:
            vectors = torch.cat(self.noise_augmentor(vectors), dim=1)
        if self.training:
            kept = torch.rand(len(vectors), 1, device=vectors.device) >= self.embedding_dropout
            vectors = vectors * kept
        return _joined({"c_adm": [vectors]}, cond)


def _joined(entries: Mapping[str, Sequence[Tensor]], cond: Condition | None) -> DictCondition:
    """Return conditions by their place, with the condition stage's output as context."""
    parts = {name: ListCondition(tuple(map(TensorCondition, values))) for name, values in entries.items()}
    if isinstance(cond, DictCondition):
        return DictCondition({**cond.parts, **parts})
    context = (
        {} if cond is None else {"c_crossattn": ListCondition((cond,)) if isinstance(cond, TensorCondition) else cond}
    )
    return DictCondition({**parts, **context})
