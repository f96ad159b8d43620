"""Blocks of the diffusion U-Nets (Dhariwal & Nichol 2021, appendix; Rombach et al. 2022).

Legend: B batch, U units folded into the batch (unit-major: row u*B + b), C channels, E embedding width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.modules.attention import SpatialTransformer
from ldm.modules.diffusionmodules.util import (
    attend,
    avg_pool_nd,
    conv_nd,
    group_norm32,
    normalization,
    run_checkpointed,
    zero_module,
)
from ldm.util import ConfigError

_CONVOLVE = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}  # by the axes of a batch


def repeat_for_units(x: Tensor, batch: int) -> Tensor:
    """Repeat a tensor all units share: (B, ...) -> (batch, ...) with batch = U*B, unit-major."""
    repeats = batch // x.shape[0]
    return x if repeats == 1 else x.repeat(repeats, *[1] * (x.ndim - 1))


class Upsample(nn.Module):
    """Nearest-neighbour doubling (of height and width only in 3-d), then an optional convolution."""

    def __init__(self, channels: int, use_conv: bool, dims: int = 2) -> None:
        super().__init__()
        self.factors = (1.0, 2.0, 2.0) if dims == 3 else (2.0,) * dims
        self.conv = conv_nd(dims, channels, channels, 3, padding=1) if use_conv else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W) -> (B, C, 2H, 2W)."""
        return self.conv(F.interpolate(x, scale_factor=self.factors, mode="nearest"))


class Downsample(nn.Module):
    """Halving (of height and width only in 3-d) by a strided convolution or an average."""

    def __init__(self, channels: int, use_conv: bool, dims: int = 2) -> None:
        super().__init__()
        stride = (1, 2, 2) if dims == 3 else 2
        if use_conv:
            self.op = conv_nd(dims, channels, channels, 3, stride=stride, padding=1)
        else:
            self.op = avg_pool_nd(dims, kernel_size=stride, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W) -> (B, C, H/2, W/2)."""
        return self.op(x)


class ResBlock(nn.Module):
    """Residual block modulated by the timestep embedding and, with ``cond_channels``, by a second embedding.

    With ``use_scale_shift_norm`` the embeddings scale and shift the normalised features, the timestep first:
    ``(GN(h)(1 + s_t) + b_t)(1 + s_c) + b_c`` (PDAE, Zhang et al. 2022, Eq. 13); without, they are added.

    Args:
        channels: width of the input, including a skip.
        emb_channels: width E of the timestep embedding.
        out_channels: width of the output.
        dropout: probability before the last convolution.
        cond_channels: width of the second embedding; None for none.
        dims: axes of the picture.
        use_scale_shift_norm: see above.
        use_checkpoint: recompute the activations in the backward pass.
        up, down: double or halve the resolution inside the block.
    """

    def __init__(
        self,
        channels: int,
        emb_channels: int,
        out_channels: int,
        dropout: float = 0.0,
        cond_channels: int | None = None,
        dims: int = 2,
        use_scale_shift_norm: bool = False,
        use_checkpoint: bool = False,
        up: bool = False,
        down: bool = False,
    ) -> None:
        super().__init__()
        self.use_scale_shift_norm = use_scale_shift_norm
        self.use_checkpoint = use_checkpoint
        self.resample: nn.Module = nn.Identity()
        if up or down:
            self.resample = (Upsample if up else Downsample)(channels, use_conv=False, dims=dims)
        emb_width = out_channels * (1 + use_scale_shift_norm)
        self.in_layers = nn.Sequential(
            normalization(channels), nn.SiLU(), conv_nd(dims, channels, out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, emb_width))
        self.cond_emb_layers = None
        if cond_channels is not None:
            self.cond_emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(cond_channels, emb_width))
        self.out_layers = nn.Sequential(
            normalization(out_channels),
            nn.SiLU(),
            nn.Dropout(dropout),
            zero_module(conv_nd(dims, out_channels, out_channels, 3, padding=1)),
        )
        if channels == out_channels:
            self.skip_connection: nn.Module = nn.Identity()
        else:
            self.skip_connection = conv_nd(dims, channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor, cond: Tensor | None = None, skip: Tensor | None = None) -> Tensor:
        """Apply the block.

        Args:
            x: (U*B, C, H, W), or (B, C, H, W) if all units share it.
            emb: (U*B, E) timestep embedding (per unit, if there are units).
            cond: (U*B, cond_channels), only with ``cond_channels``.
            skip: (U*B, Cs, H, W) or (B, Cs, H, W): channels to append to ``x``.

        Returns:
            (U*B, out_channels, H', W').
        """
        return run_checkpointed(self._forward, self.use_checkpoint, x, emb, cond, skip)

    def _forward(self, x: Tensor, emb: Tensor, cond: Tensor | None, skip: Tensor | None) -> Tensor:
        if skip is not None and skip.shape[0] < emb.shape[0]:
            h, residual = self._enter_with_shared_skip(repeat_for_units(x, emb.shape[0]), skip)
        else:
            x = x if skip is None else torch.cat([x, skip], dim=1)
            h = self.in_layers[-1](self.resample(self.in_layers[:-1](x)))
            residual = self.skip_connection(self.resample(x))
        h = self._modulate(h, emb, cond)
        return repeat_for_units(residual, emb.shape[0]) + h

    def _enter_with_shared_skip(self, x: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
        """First normalisation and convolutions on ``cat(x, skip)`` with the skip's part computed once.

        A convolution over a concatenation is a sum of two, and a group that lies in the skip alone is normalised
        alike for every unit. The skip's channels that share a group with ``x`` go with ``x``.
        """
        norm, activation, conv = self.in_layers
        group = (x.shape[1] + skip.shape[1]) // norm.num_groups
        cut = math.ceil(x.shape[1] / group) * group
        mixed = cut - x.shape[1]
        if mixed:
            x = torch.cat([x, repeat_for_units(skip[:, :mixed], x.shape[0])], dim=1)
            skip = skip[:, mixed:]
        h, residual = 0, 0
        for part, channels in ((x, slice(None, cut)), (skip, slice(cut, None))):
            weight, bias = norm.weight[channels], norm.bias[channels]
            normed = activation(group_norm32(part, part.shape[1] // group, weight, bias, norm.eps))
            is_first = channels.start is None
            h = h + repeat_for_units(_convolve(conv, normed, channels, with_bias=is_first), x.shape[0])
            if not isinstance(self.skip_connection, nn.Identity):
                part = _convolve(self.skip_connection, part, channels, with_bias=is_first)
            residual = residual + repeat_for_units(part, x.shape[0])
        return h, residual

    def _modulate(self, h: Tensor, emb: Tensor, cond: Tensor | None) -> Tensor:
        """Bring the embeddings in and finish: (B or U*B, C, H, W) -> (U*B, C, H, W)."""
        embeddings = [self.emb_layers(emb)]
        if self.cond_emb_layers is not None:
            embeddings.append(self.cond_emb_layers(cond))
        embeddings = [e.to(h.dtype).view(*e.shape, *[1] * (h.ndim - 2)) for e in embeddings]
        norm, rest = self.out_layers[0], self.out_layers[1:]
        if not self.use_scale_shift_norm:
            return rest(norm(repeat_for_units(h, emb.shape[0]) + sum(embeddings)))
        h = repeat_for_units(norm(h), emb.shape[0])
        for embedding in embeddings:
            scale, shift = embedding.chunk(2, dim=1)
            h = h * (1 + scale) + shift
        return rest(h)


def _convolve(conv: nn.Module, x: Tensor, channels: slice, with_bias: bool) -> Tensor:
    """The part of a convolution that reads ``channels`` of its input; ``x`` holds only these."""
    bias = conv.bias if with_bias else None
    return _CONVOLVE[x.ndim](x, conv.weight[:, channels], bias, conv.stride, conv.padding)


class AttentionBlock(nn.Module):
    """Multi-head self-attention over all positions, residual; starts as the identity.

    Args:
        channels: width.
        num_heads: heads the channels are divided among.
        use_checkpoint: recompute the activations in the backward pass.
        use_new_attention_order: the projection's channels lie as [q, k, v][head] instead of [head][q, k, v].
    """

    def __init__(
        self, channels: int, num_heads: int, use_checkpoint: bool = False, use_new_attention_order: bool = False
    ) -> None:
        super().__init__()
        if channels % num_heads:
            raise ConfigError(
                f"attention over {channels} channels does not divide into {num_heads} heads: change `num_heads`, "
                "`num_head_channels` or `model_channels`."
            )
        self.num_heads = num_heads
        self.use_checkpoint = use_checkpoint
        self.use_new_attention_order = use_new_attention_order
        self.norm = normalization(channels)
        self.qkv = nn.Conv1d(channels, channels * 3, 1)
        self.proj_out = zero_module(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W) -> (B, C, H, W)."""
        return run_checkpointed(self._forward, self.use_checkpoint, x)

    def _forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(2)  # (B, C, L)
        qkv = self.qkv(self.norm(flat))  # (B, 3C, L)
        if self.use_new_attention_order:
            split = qkv.unflatten(1, (3, self.num_heads, -1)).transpose(1, 2)
        else:
            split = qkv.unflatten(1, (self.num_heads, 3, -1))
        q, k, v = split.transpose(-1, -2).contiguous().unbind(2)  # each (B, heads, L, C/heads)
        h = attend(q, k, v)
        h = h.transpose(-1, -2).reshape(flat.shape)  # (B, C, L)
        return (flat + self.proj_out(h)).view(x.shape)


class TimestepEmbedSequential(nn.Sequential):
    """A sequence that hands each layer what it takes: embeddings and skip, context, or nothing."""

    def forward(
        self,
        x: Tensor,
        emb: Tensor,
        context: Tensor | None = None,
        cond: Tensor | None = None,
        skip: Tensor | None = None,
    ) -> Tensor:
        """Run the layers; shapes as in :class:`ResBlock`, context (B, tokens, context_dim)."""
        for layer in self:
            if isinstance(layer, ResBlock):
                x, skip = layer(x, emb, cond, skip), None
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            else:
                x = layer(x)
        return x
