"""Wrapper of the denoising network that passes the condition in the way the config selects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.util import ConfigError, instantiate_from_config

CONDITIONING_KEYS = (None, "concat", "crossattn", "hybrid", "adm")


class DiffusionWrapper(nn.Module):
    """Denoising network under the state-dict prefix ``diffusion_model.``."""

    def __init__(self, diff_model_config: Mapping[str, Any], conditioning_key: str | None) -> None:
        """Build the network.

        Args:
            diff_model_config: ``{target, params}`` of the network.
            conditioning_key: None; ``concat``: concatenate to the channels; ``crossattn``: pass as context; ``hybrid``:
                both; ``adm``: pass as ``y``, one class label or float vector per sample.

        Raises:
            ConfigError: ``conditioning_key`` is unknown.
        """
        super().__init__()
        if conditioning_key not in CONDITIONING_KEYS:
            known = ", ".join(str(key) for key in CONDITIONING_KEYS)
            raise ConfigError(f"model.params.conditioning_key: expected one of {known}, got {conditioning_key!r}.")
        self.diffusion_model = instantiate_from_config(diff_model_config)
        self.conditioning_key = conditioning_key

    @property
    def num_classes(self) -> int | None:
        """Number of classes of the labels that the network takes as ``y``; None if it takes no labels."""
        embedding = dict(self.diffusion_model.named_children()).get("label_emb")
        return embedding.num_embeddings if isinstance(embedding, nn.Embedding) else None

    def forward(
        self, x: Tensor, t: Tensor, c_concat: Sequence[Tensor] = (), c_crossattn: Sequence[Tensor] = (), **kwargs: Any
    ) -> Any:
        """Run the network.

        Args:
            x: (B, C, H, W) noisy latent.
            t: (B,) int64 time steps.
            c_concat: (B, c, H, W) conditions to concatenate.
            c_crossattn: (B, S, width) conditions for cross-attention, or for ``adm`` (B,) labels or (B, D) vectors.
            **kwargs: further arguments of the network.

        Returns:
            Output of the network, usually (B, C, H, W).
        """
        if self.conditioning_key in ("concat", "hybrid"):
            x = torch.cat([x, *c_concat], dim=1)
        if self.conditioning_key in ("crossattn", "hybrid"):
            kwargs["context"] = torch.cat(list(c_crossattn), dim=1)
        elif self.conditioning_key == "adm":
            kwargs["y"] = c_crossattn[0]
        return self.diffusion_model(x, t, **kwargs)
