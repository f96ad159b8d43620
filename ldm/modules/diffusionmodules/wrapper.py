"""How a condition reaches the denoising network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.util import ConfigError, instantiate_from_config

CONDITIONING_KEYS = (None, "concat", "crossattn", "hybrid", "adm")


class DiffusionWrapper(nn.Module):
    """The denoising network under the state-dict prefix ``diffusion_model.``."""

    def __init__(self, diff_model_config: Mapping[str, Any], conditioning_key: str | None) -> None:
        """Build the network.

        Args:
            diff_model_config: ``{target, params}`` of the network.
            conditioning_key: None; ``concat`` on the channels; ``crossattn`` as context; ``hybrid`` both; ``adm`` as
                one vector per sample.

        Raises:
            ConfigError: unknown ``conditioning_key``.
        """
        super().__init__()
        if conditioning_key not in CONDITIONING_KEYS:
            known = ", ".join(str(key) for key in CONDITIONING_KEYS)
            raise ConfigError(f"model.params.conditioning_key '{conditioning_key}' is unknown; choose one of {known}")
        self.diffusion_model = instantiate_from_config(diff_model_config)
        self.conditioning_key = conditioning_key

    def forward(
        self, x: Tensor, t: Tensor, c_concat: Sequence[Tensor] = (), c_crossattn: Sequence[Tensor] = (), **kwargs: Any
    ) -> Any:
        """Run the network.

        Args:
            x: (B, C, H, W) noisy latent.
            t: (B,) int64 time steps.
            c_concat: (B, c, H, W) conditions for the channels.
            c_crossattn: (B, tokens, width) conditions for attention, or the vector of ``adm``.
            **kwargs: passed on to the network.

        Returns:
            what the network returns, for most (B, C, H, W).
        """
        if self.conditioning_key in ("concat", "hybrid"):
            x = torch.cat([x, *c_concat], dim=1)
        if self.conditioning_key in ("crossattn", "hybrid"):
            kwargs["context"] = torch.cat(list(c_crossattn), dim=1)
        elif self.conditioning_key == "adm":
            kwargs["y"] = c_crossattn[0]
        return self.diffusion_model(x, t, **kwargs)
