"""Transformer over the positions of a picture with cross-attention to tokens (Rombach et al. 2022, §3.3).

Legend: B batch, C channels, L positions, S tokens.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ldm.modules.diffusionmodules.util import attend, normalization, run_checkpointed, zero_module

GROUP_NORM_EPS = 1e-6


class GEGLU(nn.Module):
    """Gated linear unit: one half of a projection times the GELU of the other (Shazeer 2020)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.proj = nn.Linear(in_channels, 2 * out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in_channels) -> (..., out_channels)."""
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """Two-layer perceptron with a gated hidden layer four times as wide."""

    def __init__(self, channels: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(channels, 4 * channels), nn.Dropout(dropout), nn.Linear(4 * channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., channels) -> the same shape."""
        return self.net(x)


class CrossAttention(nn.Module):
    """Multi-head attention from positions to tokens, or among positions if there is no context."""

    def __init__(
        self, query_dim: int, context_dim: int | None = None, heads: int = 8, dim_head: int = 64, dropout: float = 0.0
    ) -> None:
        super().__init__()
        inner = heads * dim_head
        self.heads = heads
        self.to_q = nn.Linear(query_dim, inner, bias=False)
        self.to_k = nn.Linear(context_dim or query_dim, inner, bias=False)
        self.to_v = nn.Linear(context_dim or query_dim, inner, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner, query_dim), nn.Dropout(dropout))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Attend.

        Args:
            x: (B, L, query_dim).
            context: (B, S, context_dim), or (B, context_dim) for a single token; None attends to ``x``.

        Returns:
            (B, L, query_dim).
        """
        source = x if context is None else context
        source = source[:, None] if source.ndim == 2 else source
        q, k, v = (
            layer(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, L or S, dim_head)
            for layer, tokens in ((self.to_q, x), (self.to_k, source), (self.to_v, source))
        )
        h = attend(q, k, v)
        return self.to_out(h.transpose(1, 2).flatten(2))


class BasicTransformerBlock(nn.Module):
    """Self-attention (if wanted), cross-attention and feed-forward, each normalised before and residual."""

    def __init__(
        self,
        channels: int,
        num_heads: int,
        dim_head: int,
        dropout: float = 0.0,
        context_dim: int | None = None,
        use_checkpoint: bool = False,
        use_self_attention: bool = True,
    ) -> None:
        super().__init__()
        self.use_checkpoint = use_checkpoint
        self.use_self_attention = use_self_attention
        if use_self_attention:
            self.attn1 = CrossAttention(channels, None, num_heads, dim_head, dropout)
        self.ff = FeedForward(channels, dropout)
        self.attn2 = CrossAttention(channels, context_dim, num_heads, dim_head, dropout)
        if use_self_attention:
            self.norm1 = nn.LayerNorm(channels)
        self.norm2 = nn.LayerNorm(channels)
        self.norm3 = nn.LayerNorm(channels)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """x: (B, L, C), context: (B, S, context_dim) -> (B, L, C)."""
        return run_checkpointed(self._forward, self.use_checkpoint, x, context)

    def _forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        if self.use_self_attention:
            x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the positions of a picture; starts as the identity.

    Args:
        in_channels: width of the picture.
        num_heads, dim_head: the transformer's width is their product.
        depth: number of transformer blocks.
        dropout: probability inside the blocks.
        context_dim: width of the tokens attended to; None attends to the picture itself.
        use_checkpoint: recompute the activations in the backward pass.
        use_self_attention: False leaves the attention among positions out: its cost grows with their square.
    """

    def __init__(
        self,
        in_channels: int,
        num_heads: int,
        dim_head: int,
        depth: int = 1,
        dropout: float = 0.0,
        context_dim: int | None = None,
        use_checkpoint: bool = False,
        use_self_attention: bool = True,
    ) -> None:
        super().__init__()
        inner = num_heads * dim_head
        self.norm = normalization(in_channels, GROUP_NORM_EPS)
        self.proj_in = nn.Conv2d(in_channels, inner, 1)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(inner, num_heads, dim_head, dropout, context_dim, use_checkpoint, use_self_attention)
            for _ in range(depth)
        )
        self.proj_out = zero_module(nn.Conv2d(inner, in_channels, 1))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """x: (B, C, H, W), context: (B, S, context_dim) or (B, context_dim) -> (B, C, H, W)."""
        h = self.proj_in(self.norm(x))
        size = h.shape[2:]
        h = h.flatten(2).transpose(1, 2)  # (B, L, inner)
        for block in self.transformer_blocks:
            h = block(h, context)
        return x + self.proj_out(h.transpose(1, 2).unflatten(2, size))
