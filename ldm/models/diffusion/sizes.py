"""Size of what a diffusion model denoises: that of the training data, else that of the config."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.data.collate import is_channel_first
from ldm.models.inputs import batch_value
from ldm.models.options import InputOptions
from ldm.util import UserError

logger = logging.getLogger(__name__)

LATENT_SIZE = "latent_size"  # entry of a checkpoint's state dict: height and width, (2,) int64


class DataSize(nn.Module):
    """Mixin of a diffusion model, which calls :meth:`checked` on what it denoises."""

    input_options: InputOptions
    _latent_size: tuple[int, int] | None = None  # of the training data
    _pixel_rate: int | None = None  # height of an image over that of its latent

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of what is denoised: as in the training data if known, else as in ``image_size``."""
        height, width = self._latent_size or self.input_options.size
        return self.input_options.channels, height, width

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the size of the latents of images; the first stage decodes one latent to find its downsampling.

        Raises:
            UserError: the first stage or the network does not take images of this size.
        """
        if self._pixel_rate is None:
            with torch.no_grad():
                z = torch.zeros(1, *self.latent_shape, device=self.device)
                self._pixel_rate = self.decode_first_stage(z).shape[-2] // z.shape[-2]
        self.model.check_size((height / self._pixel_rate, width / self._pixel_rate), self._pixel_rate)
        return height // self._pixel_rate, width // self._pixel_rate

    def size_of_latents(self, batch: Mapping[str, Any]) -> tuple[int, int]:
        """Return the size of the latents of a batch's images."""
        shape = batch_value(batch, self.first_stage_key).shape[1:]
        return self.latent_size(*(shape[1:] if is_channel_first(shape) else shape[:2]))

    def checked(self, z: Tensor, pixels: Sequence[int]) -> Tensor:
        """Return latents z (B, C, h, w) of images of H x W pixels; in training, their size becomes that of the model.

        Raises:
            UserError: the channels, the size, or the size of images without a first stage do not fit the model.
        """
        options, size, pixels = self.input_options, tuple(z.shape[-2:]), tuple(pixels)
        if z.shape[1] != options.channels:
            raise UserError(
                f"model.params.channels: expected the {z.shape[1]} channels of the data, got {options.channels}. Make "
                "channels, and in_channels and out_channels of unet_config, match them"
            )
        self.model.check_channels(options.channels)
        if size == pixels and size != options.size:
            raise UserError(
                f"model.params.image_size: expected {size[0]} x {size[1]}, the size of the images, because this model "
                f"works on pixels, got {' x '.join(map(str, options.size))}. Set image_size to {list(size)}, or resize "
                "the images (data.params.*.params.size)"
            )
        self._pixel_rate = pixels[0] // size[0]
        self.model.check_size(size, self._pixel_rate)
        if self.training and self._latent_size is None and size != options.size:
            logger.info("latents of %d x %d for images of %d x %d; image_size is not used", *size, *pixels)
        if self.training:
            self._latent_size = size
        return z

    def on_save_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        """Add the size to a checkpoint, if it is not that of ``image_size``."""
        if self._latent_size not in (None, self.input_options.size):
            checkpoint["state_dict"][LATENT_SIZE] = torch.tensor(self._latent_size)


def read_size(module: DataSize, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Take the size out of a state dict; a hook for ``register_load_state_dict_pre_hook``."""
    size = state_dict.pop(prefix + LATENT_SIZE, None)
    module._latent_size = module._latent_size if size is None else tuple(size.tolist())
