"""Small condition stages of latent diffusion models: class labels, and images brought to the size of the latent.

Legend: B batch, C channels, H W space.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.util import ConfigError, UserError

_METHODS = ("nearest", "linear", "bilinear", "trilinear", "bicubic", "area")


class ClassEmbedder(nn.Module):
    """A learned vector per class, as a sequence of one token for cross-attention (Rombach et al. 2022).

    Args:
        embed_dim: width of a vector.
        n_classes: number of classes.
        key: entry of the batch that holds the labels.
    """

    def __init__(self, embed_dim: int, n_classes: int = 1000, key: str = "class") -> None:
        super().__init__()
        self.key = key
        self.embedding = nn.Embedding(n_classes, embed_dim)

    def forward(self, batch: Mapping[str, Any] | Tensor, key: str | None = None) -> Tensor:
        """Embed.

        Args:
            batch: a batch with labels (B,) int64, or the labels.
            key: entry to take instead of the usual one.

        Returns:
            (B, 1, embed_dim).

        Raises:
            UserError: the batch has no such entry.
        """
        if isinstance(batch, Tensor):
            return self.embedding(batch[:, None])
        key = key or self.key
        if key not in batch:
            raise UserError(
                f"ClassEmbedder reads labels from batch['{key}'], but the batch has only {', '.join(sorted(batch))}: "
                "set cond_stage_config.params.key, or choose a data set with labels"
            )
        return self.embedding(batch[key][:, None])

    def unconditional_input(self, count: int) -> Tensor:
        """Labels (count,) that say nothing in models trained for guidance: by LDM's convention the last class."""
        weight = self.embedding.weight
        return torch.full((count,), len(weight) - 1, device=weight.device)


class SpatialRescaler(nn.Module):
    """Resize an image or a map several times, then mix its channels if asked to.

    Args:
        n_stages: how often to resize.
        method: interpolation, one of torch's names.
        multiplier: factor of height and width each time.
        in_channels: channels of the input, for the mixing.
        out_channels: channels of the output; None leaves them as they are.
        bias: the mixing adds a constant.
    """

    def __init__(
        self,
        n_stages: int = 1,
        method: str = "bilinear",
        multiplier: float = 0.5,
        in_channels: int = 3,
        out_channels: int | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__()
        if n_stages < 0:
            raise ConfigError(f"SpatialRescaler: n_stages is {n_stages}; expected 0 or more")
        if method not in _METHODS:
            raise ConfigError(f"SpatialRescaler: method is {method!r}; expected one of {', '.join(_METHODS)}")
        self.n_stages, self.method, self.multiplier = n_stages, method, multiplier
        self.channel_mapper = None if out_channels is None else nn.Conv2d(in_channels, out_channels, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, in_channels, H, W) -> (B, out_channels or in_channels, H m^n, W m^n), m multiplier, n n_stages."""
        for _ in range(self.n_stages):
            x = F.interpolate(x, scale_factor=self.multiplier, mode=self.method)
        return x if self.channel_mapper is None else self.channel_mapper(x)

    def encode(self, x: Tensor) -> Tensor:
        """Same as :meth:`forward`."""
        return self(x)
