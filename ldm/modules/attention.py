"""Transformer blocks over the positions of a feature map, with cross-attention to tokens (Rombach et al. 2022, §3.3).

Legend: B batch, C channels, L = H * W positions, S tokens.
"""

from __future__ import annotations

from collections import OrderedDict

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.modules.diffusionmodules.util import (
    GatedGELU,
    attend_multi_head,
    normalization,
    run_checkpointed,
    sequence_in,
    zero_module,
)
from ldm.util import UserError

GROUP_NORM_EPS = 1e-6


def feed_forward(channels: int, dropout: float = 0.0) -> nn.Sequential:
    """Return a two-layer perceptron with a gated hidden layer of four times the width."""
    hidden = nn.Sequential(OrderedDict(proj=GatedGELU(channels, 4 * channels)))
    return sequence_in("net", hidden, nn.Dropout(dropout), nn.Linear(4 * channels, channels))


class CrossAttention(nn.Module):
    """Multi-head attention from positions to tokens, or among positions without a context."""

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
        """Attend to the context.

        Args:
            x: (B, L, query_dim).
            context: (B, S, context_dim), or (B, context_dim) for a single token; None attends to ``x``.

        Returns:
            (B, L, query_dim).

        Raises:
            UserError: the tokens have another width.
        """
        source = x if context is None else context
        source = source[:, None] if source.ndim == 2 else source
        if source.shape[-1] != self.to_k.in_features:
            kind = "no tokens" if context is None else f"tokens of width {source.shape[-1]}"
            raise UserError(
                f"cross-attention: expected tokens of width {self.to_k.in_features} (unet_config.params.context_dim), "
                f"got {kind} from the condition stage. Set context_dim to the width of the condition stage "
                "(cond_stage_config), or choose another condition stage."
            )
        return self.to_out(attend_multi_head(self.to_q(x), self.to_k(source), self.to_v(source), self.heads))


class BasicTransformerBlock(nn.Module):
    """Optional self-attention, cross-attention and feed-forward, each pre-normalized and residual.

    With ``disable_self_attn``, the first attention attends to the context too; without ``use_self_attention``, it is
    left out.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int,
        dim_head: int,
        dropout: float = 0.0,
        context_dim: int | None = None,
        use_checkpoint: bool = False,
        use_self_attention: bool = True,
        disable_self_attn: bool = False,
    ) -> None:
        super().__init__()
        self.use_checkpoint = use_checkpoint
        self.use_self_attention, self.disable_self_attn = use_self_attention, disable_self_attn
        if use_self_attention:
            width = context_dim if disable_self_attn else None
            self.attn1 = CrossAttention(channels, width, num_heads, dim_head, dropout)
        self.ff = feed_forward(channels, dropout)
        self.attn2 = CrossAttention(channels, context_dim, num_heads, dim_head, dropout)
        if use_self_attention:
            self.norm1 = nn.LayerNorm(channels)
        self.norm2 = nn.LayerNorm(channels)
        self.norm3 = nn.LayerNorm(channels)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Map ``x`` (B, L, C) to (B, L, C), with ``context`` (B, S, context_dim)."""
        return run_checkpointed(self._forward, self.use_checkpoint, x, context)

    def _forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        if self.use_self_attention:
            x = x + self.attn1(self.norm1(x), context if self.disable_self_attn else None)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the positions of a feature map; initialized to the identity.

    Args:
        in_channels: channels of the feature map.
        num_heads, dim_head: the width of the transformer is their product.
        depth: number of transformer blocks.
        dropout: dropout probability inside the blocks.
        context_dim: width of the tokens; None attends to the feature map itself.
        use_checkpoint: recompute the activations in the backward pass.
        use_self_attention: include self-attention among positions, whose cost is quadratic in their number.
        disable_self_attn: attend to the tokens where positions would attend to each other (Stable Diffusion 2).
        use_linear: project by linear layers instead of 1x1 convolutions, whose weights have two further axes.
    """

    stage_inputs = ("context",)

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
        disable_self_attn: bool = False,
        use_linear: bool = False,
    ) -> None:
        super().__init__()
        inner = num_heads * dim_head
        self.norm = normalization(in_channels, GROUP_NORM_EPS)
        self.proj_in = nn.Linear(in_channels, inner) if use_linear else nn.Conv2d(in_channels, inner, 1)
        options = dropout, context_dim, use_checkpoint, use_self_attention, disable_self_attn
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(inner, num_heads, dim_head, *options) for _ in range(depth)
        )
        self.proj_out = zero_module(nn.Linear(inner, in_channels) if use_linear else nn.Conv2d(inner, in_channels, 1))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Map ``x`` (B, C, H, W) to (B, C, H, W), with ``context`` (B, S, context_dim) or (B, context_dim)."""
        h = _project(self.proj_in, rearrange(self.norm(x), "b c h w -> b (h w) c"))
        for block in self.transformer_blocks:
            h = block(h, context)
        return x + rearrange(_project(self.proj_out, h), "b (h w) c -> b c h w", h=x.shape[2])


def _project(layer: nn.Linear | nn.Conv2d, h: Tensor) -> Tensor:
    """Apply a linear layer or a 1x1 convolution to h (B, L, C).

    The convolution would leave its channels apart in memory, and the layers that follow would copy them.
    """
    return F.linear(h, layer.weight.flatten(1), layer.bias)
