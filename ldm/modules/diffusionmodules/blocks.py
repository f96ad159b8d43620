"""Layers of the diffusion U-Nets and the stages they are grouped in (Dhariwal & Nichol 2021; Rombach et al. 2022).

A layer declares in ``stage_inputs`` the names of the inputs that it takes beside the feature map.

Legend: B batch, U units folded into the batch (unit-major: row u*B + b), C channels, E embedding width, L positions.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from ldm.modules.diffusionmodules.convolution import convolve
from ldm.modules.diffusionmodules.util import (
    AVERAGE_POOLS,
    CONVOLUTIONS,
    attend,
    group_norm32,
    normalization,
    run_checkpointed,
    zero_module,
)
from ldm.util import ConfigError

_CONVOLVE = {3: F.conv1d, 4: convolve, 5: F.conv3d}  # by the number of axes of a batch


def repeat_for_units(x: Tensor, batch: int) -> Tensor:
    """Repeat a tensor shared by all units: (B, ...) to (batch, ...) with batch = U*B, unit-major."""
    units = batch // x.shape[0]
    return x if units == 1 else repeat(x, "b ... -> (u b) ...", u=units)


class Upsample(nn.Module):
    """Nearest-neighbour upsampling by 2 (of height and width only in 3-d) with an optional convolution."""

    stage_inputs = ()

    def __init__(self, channels: int, use_conv: bool, dims: int = 2) -> None:
        super().__init__()
        self.factors = (1.0, 2.0, 2.0) if dims == 3 else (2.0,) * dims
        self.conv = CONVOLUTIONS[dims](channels, channels, 3, padding=1) if use_conv else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (B, C, H, W) to (B, C, 2H, 2W)."""
        return self.conv(F.interpolate(x, scale_factor=self.factors, mode="nearest"))


class Downsample(nn.Module):
    """Downsampling by 2 (of height and width only in 3-d) by a strided convolution or average pooling."""

    stage_inputs = ()

    def __init__(self, channels: int, use_conv: bool, dims: int = 2) -> None:
        super().__init__()
        stride = (1, 2, 2) if dims == 3 else 2
        if use_conv:
            self.op = CONVOLUTIONS[dims](channels, channels, 3, stride=stride, padding=1)
        else:
            self.op = AVERAGE_POOLS[dims](kernel_size=stride, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (B, C, H, W) to (B, C, H/2, W/2)."""
        return self.op(x)


class ResBlock(nn.Module):
    """Residual block modulated by the timestep embedding and, with ``cond_channels``, by a second embedding.

    With ``use_scale_shift_norm`` the embeddings scale and shift the normalized features, the timestep first:
    ``(GN(h)(1 + s_t) + b_t)(1 + s_c) + b_c`` (PDAE, Zhang et al. 2022, Eq. 13); otherwise they are added.

    Args:
        channels: input channels, including those of a skip connection.
        emb_channels: width E of the timestep embedding.
        out_channels: output channels.
        dropout: dropout probability before the last convolution.
        cond_channels: width of the second embedding; None for a block without one.
        dims: number of spatial axes.
        use_scale_shift_norm: scale and shift instead of adding.
        use_checkpoint: recompute the activations in the backward pass.
        up, down: double or halve the resolution inside the block.
    """

    stage_inputs = ("emb", "cond", "skip")

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
            normalization(channels), nn.SiLU(), CONVOLUTIONS[dims](channels, out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, emb_width))
        self.cond_emb_layers = None
        if cond_channels is not None:
            self.cond_emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(cond_channels, emb_width))
        self.out_layers = nn.Sequential(
            normalization(out_channels),
            nn.SiLU(),
            nn.Dropout(dropout),
            zero_module(CONVOLUTIONS[dims](out_channels, out_channels, 3, padding=1)),
        )
        self.has_projection = channels != out_channels
        self.skip_connection = CONVOLUTIONS[dims](channels, out_channels, 1) if self.has_projection else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor, cond: Tensor | None = None, skip: Tensor | None = None) -> Tensor:
        """Apply the block.

        Args:
            x: (U*B, C, H, W), or (B, C, H, W) if shared by all units.
            emb: (U*B, E) timestep embedding, per unit if there are units.
            cond: (U*B, cond_channels); required with ``cond_channels``.
            skip: (U*B, Cs, H, W) or (B, Cs, H, W) channels to append to ``x``.

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
        """Normalize and convolve ``cat(x, skip)``, computing the part of the shared skip once for all units.

        A convolution of a concatenation is the sum of two convolutions, and normalization groups that contain only
        skip channels are equal for all units. Skip channels that share a group with ``x`` are processed with ``x``.
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
            if self.has_projection:
                part = _convolve(self.skip_connection, part, channels, with_bias=is_first)
            residual = residual + repeat_for_units(part, x.shape[0])
        return h, residual

    def _modulate(self, h: Tensor, emb: Tensor, cond: Tensor | None) -> Tensor:
        """Apply the embeddings and the output layers: (B or U*B, C, H, W) to (U*B, C, H, W)."""
        embeddings = [self.emb_layers(emb)]
        if self.cond_emb_layers is not None:
            embeddings.append(self.cond_emb_layers(cond))
        embeddings = [e.to(h.dtype).view(*e.shape, *[1] * (h.ndim - 2)) for e in embeddings]
        norm, rest = self.out_layers[0], self.out_layers[1:]
        if not self.use_scale_shift_norm:
            return rest(norm(repeat_for_units(h, emb.shape[0]) + sum(embeddings)))
        scale, shift = 1.0, 0.0
        for embedding in embeddings:  # small; the features are read once
            own_scale, own_shift = embedding.chunk(2, dim=1)
            scale, shift = scale * (1 + own_scale), shift * (1 + own_scale) + own_shift
        h = torch.addcmul(shift, repeat_for_units(norm(h), emb.shape[0]), scale)
        return rest(h)


def _convolve(conv: nn.Module, x: Tensor, channels: slice, with_bias: bool) -> Tensor:
    """Convolve with the weights of the input channels ``channels``; ``x`` holds only these channels."""
    bias = conv.bias if with_bias else None
    return _CONVOLVE[x.ndim](x, conv.weight[:, channels], bias, conv.stride, conv.padding)


class AttentionBlock(nn.Module):
    """Residual multi-head self-attention over all positions; initialized to the identity.

    Args:
        channels: number of channels, a multiple of ``num_heads``.
        num_heads: number of heads.
        use_checkpoint: recompute the activations in the backward pass.
        use_new_attention_order: order the channels of the projection as [q, k, v][head] instead of [head][q, k, v].
    """

    stage_inputs = ()

    def __init__(
        self, channels: int, num_heads: int, use_checkpoint: bool = False, use_new_attention_order: bool = False
    ) -> None:
        super().__init__()
        if channels % num_heads:
            raise ConfigError(
                f"attention: expected channels that divide into {num_heads} heads, got {channels}. Change `num_heads`, "
                "`num_head_channels` or `model_channels`."
            )
        self.num_heads = num_heads
        self.use_checkpoint = use_checkpoint
        order = "(n h d)" if use_new_attention_order else "(h n d)"
        self.split_pattern = f"b l {order} -> n b h l d"
        self.norm = normalization(channels)
        self.qkv = nn.Conv1d(channels, channels * 3, 1)
        self.proj_out = zero_module(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (B, C, H, W) to (B, C, H, W)."""
        return run_checkpointed(self._forward, self.use_checkpoint, x)

    def _forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(2)  # (B, C, L)
        rows = F.linear(self.norm(flat).transpose(1, 2), self.qkv.weight.squeeze(-1), self.qkv.bias)  # (B, L, 3 C)
        h = attend(*rearrange(rows, self.split_pattern, n=3, h=self.num_heads).contiguous().unbind())
        h = rearrange(h, "b h l d -> b l (h d)")  # from (B, heads, L, C/heads)
        h = F.linear(h, self.proj_out.weight.squeeze(-1), self.proj_out.bias)
        return (flat + h.transpose(1, 2)).view(x.shape)


class UNetStage(nn.Sequential):
    """Layers that run in sequence and share the inputs of the U-Net."""

    def forward(
        self,
        x: Tensor,
        emb: Tensor,
        context: Tensor | None = None,
        cond: Tensor | None = None,
        skip: Tensor | None = None,
    ) -> Tensor:
        """Run the layers; shapes as in :class:`ResBlock`, ``context`` (B, S, context_dim)."""
        inputs = {"emb": emb, "context": context, "cond": cond, "skip": skip}
        for layer in self:
            x = layer(x, *[inputs[name] for name in layer.stage_inputs])
            inputs["skip"] = None
        return x


class InputStage(UNetStage):
    """The first convolution of a U-Net, which takes the picture only."""

    def forward(self, x: Tensor, *_: Tensor | None) -> Tensor:
        """Map ``x`` (B, in_channels, H, W) to (B, C, H, W)."""
        return self[0](x)
