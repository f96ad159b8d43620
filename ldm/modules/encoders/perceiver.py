"""Encoders of DisDiff that map images or vectors to units by cross-attention (Perceiver, Jaegle et al. 2021).

Legend: B batch, U units, D width of a unit's query, P positions, C width of a position.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor, nn

from ldm.modules.diffusionmodules.util import GatedGELU, attend_multi_head, sequence_in
from ldm.modules.encoders.base import ConditionStageBase
from ldm.modules.encoders.image import ImageEncoder, ResBlock
from ldm.ranges import Count, PositiveFloat


class Attention(nn.Module):
    """Multi-head attention with one projection for keys and values."""

    def __init__(self, query_dim: int, context_dim: Count, heads: int, dim_head: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(query_dim, heads * dim_head, bias=False)
        self.to_kv = nn.Linear(context_dim, 2 * heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, query_dim)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Map ``x`` (B, n, query_dim) to the same shape; ``context`` (B, m, context_dim), None for ``x`` itself."""
        keys, values = self.to_kv(x if context is None else context).chunk(2, dim=-1)
        return self.to_out(attend_multi_head(self.to_q(x), keys, values, self.heads))


class PreNorm(nn.Module):
    """Pre-normalized residual block; with ``context_dim``, the context is normalized too."""

    def __init__(self, width: int, block: nn.Module, context_dim: Count | None = None) -> None:
        super().__init__()
        self.fn = block
        self.norm = nn.LayerNorm(width)
        self.norm_context = None if context_dim is None else nn.LayerNorm(context_dim)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Map ``x`` (B, n, C) to (B, n, C), with ``context`` (B, m, context_dim)."""
        if self.norm_context is None:
            return x + self.fn(self.norm(x))
        return x + self.fn(self.norm(x), self.norm_context(context))


def _pair(width: int, heads: int, dim_head: int, context_dim: int | None = None) -> nn.ModuleList:
    """Return attention (cross-attention with ``context_dim``) and feed-forward blocks."""
    attention = Attention(width, context_dim or width, heads, dim_head)
    hidden = GatedGELU(width, 4 * width), nn.Identity()  # the last layer is net.2 in published checkpoints
    feed_forward = sequence_in("net", *hidden, nn.Linear(4 * width, width))
    return nn.ModuleList([PreNorm(width, attention, context_dim), PreNorm(width, feed_forward)])


def _stack(count: int, make: Callable[[], nn.ModuleList], is_tied: bool) -> nn.ModuleList:
    """Return ``count`` pairs; tied pairs share one set of weights under several names."""
    if not is_tied or not count:
        return nn.ModuleList(make() for _ in range(count))
    shared = make()
    return nn.ModuleList([shared] * count)


def _append_positions(data: Tensor, max_freq: float, num_bands: int) -> Tensor:
    """Append grid coordinates in [-1, 1], their sines and cosines: (B, P, C) to (B, P, C + 2 (2 num_bands + 1))."""
    axis = torch.linspace(-1.0, 1.0, math.isqrt(data.shape[1]))
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), dim=-1).unsqueeze(-1)  # (side, side, 2, 1)
    waves = grid * torch.linspace(1.0, max_freq / 2, num_bands) * math.pi
    positions = rearrange(torch.cat([waves.sin(), waves.cos(), grid], dim=-1), "h w xy band -> (h w) (xy band)")
    return torch.cat([data, positions.to(data).expand(len(data), -1, -1)], dim=-1)


class PerceiverEncoder(ImageEncoder):
    """Layers of cross-attention from learned queries to convolutional features of an image.

    Args:
        index_num: width of a unit's code.
        depth: number of layers.
        dim: width of the features; equal to ``latent_dim``.
        z_index_dim: number of units U.
        latent_dim: width of a query.
        cross_heads, latent_heads: heads of the cross-attention and of the self-attention of the features.
        cross_dim_head, latent_dim_head: widths of these heads.
        weight_tie_layers: share the weights of the self-attention layers.
        max_freq, num_freq_bands: maximal frequency and number of the Fourier features of the positions.
    """

    def __init__(
        self,
        *,
        index_num: Count = 32,
        depth: Count = 4,
        dim: Count = 32,
        z_index_dim: Count = 10,
        latent_dim: Count = 32,
        cross_heads: Count = 1,
        latent_heads: Count = 3,
        cross_dim_head: Count = 32,
        latent_dim_head: Count = 32,
        weight_tie_layers: bool = False,
        max_freq: PositiveFloat = 10,
        num_freq_bands: Count = 6,
    ) -> None:
        super().__init__()
        self.latent_dim = z_index_dim * index_num  # of the output, as in ImageEncoder
        self.max_freq, self.num_freq_bands = max_freq, num_freq_bands
        half = latent_dim // 2
        self.encoder = nn.Sequential(
            nn.Conv2d(3, half, 4, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(half),
            nn.ReLU(),
            nn.Conv2d(half, latent_dim, 4, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(latent_dim),
            nn.ReLU(),
            ResBlock(latent_dim, True),
            nn.BatchNorm2d(latent_dim),
            ResBlock(latent_dim, True),
        )
        width = dim + 2 * (2 * num_freq_bands + 1)
        self.latents = nn.Parameter(torch.randn(z_index_dim, latent_dim))
        self.cs_layers = nn.ModuleList(_pair(latent_dim, cross_heads, cross_dim_head, width) for _ in range(depth))
        self.layers = _stack(depth - 1, lambda: _pair(width, latent_heads, latent_dim_head), weight_tie_layers)
        self.fc_layer = nn.Linear(dim, index_num)

    def forward(self, images: Tensor) -> Tensor:
        """Map ``images`` (B, 3, H, H) in [-1, 1] to (B, U * index_num)."""
        data = rearrange(self.encoder(images), "b c h w -> b (h w) c")
        data = _append_positions(data, self.max_freq, self.num_freq_bands)
        x = self.latents.expand(len(data), -1, -1)  # (B, U, D)
        for index, (attention, feed_forward) in enumerate(self.cs_layers):
            x = feed_forward(attention(x, data))
            if index < len(self.layers):
                self_attention, self_feed_forward = self.layers[index]
                data = self_feed_forward(self_attention(data))
        return self.fc_layer(x).flatten(1)


class PerceiverDecoder(ConditionStageBase):
    """Layers of cross-attention from learned queries to a sequence, and of self-attention of both.

    Args:
        depth: number of layers.
        index_num: width of the output.
        dim: width of the sequence; equal to ``latent_dim``.
        z_index_dim: number of queries.
        latent_dim: width of a query.
        cross_heads, latent_heads: heads of the cross-attention and of the self-attention.
        cross_dim_head, latent_dim_head: widths of these heads.
        fourier_encode_data: append the Fourier features of a square grid to the sequence; ``dim`` includes them.
        weight_tie_layers: share the weights of all self-attention layers of one kind.
        max_freq, num_freq_bands: maximal frequency and number of the Fourier features.
    """

    def __init__(
        self,
        *,
        depth: Count = 6,
        index_num: Count = 10,
        dim: Count = 256,
        z_index_dim: Count = 64,
        latent_dim: Count = 256,
        cross_heads: Count = 1,
        cross_dim_head: Count = 128,
        latent_heads: Count = 6,
        latent_dim_head: Count = 128,
        fourier_encode_data: bool = False,
        weight_tie_layers: bool = False,
        max_freq: PositiveFloat = 10,
        num_freq_bands: Count = 6,
    ) -> None:
        super().__init__()
        self.fourier_encode_data = fourier_encode_data
        self.max_freq, self.num_freq_bands = max_freq, num_freq_bands
        self.latents = nn.Parameter(torch.randn(z_index_dim, latent_dim))
        self.slayers = _stack(max(depth - 1, 0), lambda: _pair(dim, latent_heads, latent_dim_head), weight_tie_layers)
        self.cs_layers = nn.ModuleList(_pair(latent_dim, cross_heads, cross_dim_head, dim) for _ in range(depth))
        self.fc_layer = nn.Linear(dim, index_num)
        self.layers = _stack(depth, lambda: _pair(latent_dim, latent_heads, latent_dim_head), weight_tie_layers)

    def forward(self, data: Tensor) -> Tensor:
        """Map ``data`` (B, P, dim), without Fourier features, to (B, z_index_dim, index_num)."""
        if self.fourier_encode_data:
            data = _append_positions(data, self.max_freq, self.num_freq_bands)
        x = self.latents.expand(len(data), -1, -1)
        for index, (attention, feed_forward) in enumerate(self.cs_layers):
            x = feed_forward(attention(x, data))
            self_attention, self_feed_forward = self.layers[index]
            x = self_feed_forward(self_attention(x))
            if index < len(self.slayers):
                data_attention, data_feed_forward = self.slayers[index]
                data = data_feed_forward(data_attention(data))
        return self.fc_layer(x)


class MLP_layers(ConditionStageBase):
    """Separate perceptrons for all units that take the same vector.

    Args:
        z_dim: width of the vector.
        latent_dim: width of a unit's code.
        num_latents: number of units U.
    """

    def __init__(self, z_dim: Count = 512, latent_dim: Count = 256, num_latents: Count = 16) -> None:
        super().__init__()
        self.nets = nn.ModuleList(
            sequence_in("net", nn.Linear(z_dim, latent_dim), nn.GELU(), nn.Linear(latent_dim, latent_dim))
            for _ in range(num_latents)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (B, z_dim) to (B, U, latent_dim)."""
        return torch.stack([net(x) for net in self.nets], dim=1)
