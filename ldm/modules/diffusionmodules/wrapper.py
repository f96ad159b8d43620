"""Wrapper of the denoising network that passes the condition in the way the config selects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.data.options import require_choice
from ldm.modules.diffusionmodules.shapes import CLIPGuidedShape, UNetConfig
from ldm.util import UserError, instantiate_from_config

CONDITIONING_KEYS = (None, "concat", "crossattn", "hybrid", "adm", "hybrid-adm", "crossattn-adm")


class DiffusionWrapper(nn.Module):
    """Denoising network under the state-dict prefix ``diffusion_model.``."""

    def __init__(self, diff_model_config: Mapping[str, Any], conditioning_key: str | None) -> None:
        """Build the network.

        Args:
            diff_model_config: ``{target, params}`` of the network.
            conditioning_key: None; ``concat``: concatenate to the channels; ``crossattn``: pass as context; ``hybrid``:
                both; ``adm``: pass as ``y``, one class label or float vector per sample; ``crossattn-adm`` and
                ``hybrid-adm``: ``y`` as well.

        Raises:
            ConfigError: ``conditioning_key`` is unknown.
        """
        super().__init__()
        require_choice("model.params.conditioning_key", conditioning_key, CONDITIONING_KEYS)
        self.diffusion_model = instantiate_from_config(diff_model_config)
        self.conditioning_key = conditioning_key
        config = vars(self.diffusion_model).get("config")
        known = vars(config) if isinstance(config, UNetConfig) else {}  # of networks of this package
        self.in_channels = known.get("in_channels")  # those of conditions included
        self.out_channels = known.get("out_channels")
        self.num_classes = known["num_classes"] if isinstance(known.get("num_classes"), int) else None  # of labels y
        shape = vars(self.diffusion_model).get("shape")
        self.cond_width = shape.c_embed_dim if isinstance(shape, CLIPGuidedShape) else known.get("adm_in_channels")
        self.factor = 2 ** (len(known.get("channel_mult", "1")) - 1)  # divides height and width of the input

    @property
    def concatenates(self) -> bool:
        """Whether conditions are concatenated to the channels."""
        return self.conditioning_key in ("concat", "hybrid", "hybrid-adm")

    @property
    def attends(self) -> bool:
        """Whether conditions are passed as context."""
        return self.conditioning_key in ("crossattn", "hybrid", "crossattn-adm", "hybrid-adm")

    def check_channels(self, channels: int) -> None:
        """Raise a ``UserError`` if the network does not map an input of so many channels to the same number."""
        own = {"out_channels": self.out_channels, "in_channels": None if self.concatenates else self.in_channels}
        for name, count in own.items():
            if count not in (None, channels):
                raise UserError(
                    f"model.params.unet_config.params.{name}: expected {channels}, the channels of the data, got "
                    f"{count}. Make them match"
                )

    def check_size(self, size: Sequence[float], rate: int | None = None) -> None:
        """Raise a ``UserError`` if the network cannot halve an input of this size as often as it has to.

        ``rate`` is the downsampling of the first stage, for the message.
        """
        if any(side % self.factor for side in size):
            shown, advice = " x ".join(f"{side:g}" for side in size), "Choose another size"
            if rate is not None:
                shown += f" for images of {' x '.join(f'{side * rate:g}' for side in size)} pixels"
                advice = f"Their height and width have to be multiples of {self.factor} x {rate} = {self.factor * rate}"
            raise UserError(
                f"U-Net: expected an input whose height and width are multiples of {self.factor} (2 for each "
                f"downsampling of unet_config.params.channel_mult), got {shown}. {advice}"
            )

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        c_concat: Sequence[Tensor] = (),
        c_crossattn: Sequence[Tensor] = (),
        c_adm: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the network.

        Args:
            x: (B, C, H, W) noisy latent.
            t: (B,) int64 time steps.
            c_concat: (B, c, H, W) conditions to concatenate.
            c_crossattn: (B, S, width) conditions for cross-attention, or for ``adm`` (B,) labels or (B, D) vectors.
            c_adm: (B,) labels or (B, D) vectors, for ``crossattn-adm`` and ``hybrid-adm``.
            **kwargs: further arguments of the network.

        Returns:
            Output of the network, usually (B, C, H, W).
        """
        self.check_size(x.shape[2:])
        if self.concatenates:
            x = self._concatenated(x, c_concat)
        if self.attends:
            kwargs["context"] = torch.cat(list(c_crossattn), dim=1)
        elif self.conditioning_key == "adm":
            kwargs["y"] = c_crossattn[0]
        if c_adm is not None:
            kwargs["y"] = c_adm
        return self.diffusion_model(x, t, **kwargs)

    def _concatenated(self, x: Tensor, maps: Sequence[Tensor]) -> Tensor:
        """Return x (B, C, H, W) and maps (B, c, H, W) along the channels."""
        for part in maps:
            if part.shape[2:] != x.shape[2:]:
                raise UserError(
                    f"conditioning_key {self.conditioning_key}: expected conditions of the input's size "
                    f"{tuple(x.shape[2:])}, got {tuple(part.shape[2:])}. Sample at the size of the data, let the data "
                    "set deliver them in that size, or resize them (cond_stage_config: "
                    "ldm.modules.encoders.modules.SpatialRescaler)"
                )
        counts = [part.shape[1] for part in (x, *maps)]
        if self.in_channels not in (None, sum(counts)):
            raise UserError(
                f"conditioning_key {self.conditioning_key}: expected {self.in_channels} channels "
                f"(unet_config.params.in_channels), got {sum(counts)} ({' + '.join(map(str, counts))}: the input, then "
                "its conditions). Make them match"
            )
        return torch.cat([x, *maps], dim=1)
