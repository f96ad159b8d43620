"""Pieces every network here is made of: normalisation, timestep embedding, n-d layers, checkpointing."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm.util import ConfigError

NUM_GROUPS = 32

_CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_AVERAGE_POOLS = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}


def at_least_float32(x: Tensor) -> Tensor:
    """``x`` itself, or its float32 copy if it is in half precision."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


class GroupNorm32(nn.GroupNorm):
    """Group normalisation computed in at least float32 whatever the input's precision, returned in the latter."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x: (B, C, ...)`` per sample and group."""
        return group_norm32(x, self.num_groups, self.weight, self.bias, self.eps)


def group_norm32(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """``F.group_norm`` in at least float32, so that half precision loses nothing in the statistics."""
    wide = at_least_float32(x)
    return F.group_norm(wide, num_groups, weight.to(wide.dtype), bias.to(wide.dtype), eps).to(x.dtype)


def normalization(channels: int, eps: float = 1e-5) -> GroupNorm32:
    """Group normalisation with 32 groups.

    Raises:
        ConfigError: the channels do not divide into 32 groups.
    """
    if channels % NUM_GROUPS:
        raise ConfigError(
            f"a layer has {channels} channels, but group normalisation needs a multiple of {NUM_GROUPS}: make the "
            f"base width (`model_channels` or `ch`) times each entry of the multipliers a multiple of {NUM_GROUPS}."
        )
    return GroupNorm32(NUM_GROUPS, channels, eps=eps)


def conv_nd(dims: int, *args: Any, **kwargs: Any) -> nn.Module:
    """A convolution over ``dims`` (1, 2 or 3) axes."""
    return _of_dims(_CONVOLUTIONS, dims)(*args, **kwargs)


def avg_pool_nd(dims: int, *args: Any, **kwargs: Any) -> nn.Module:
    """An average pooling over ``dims`` (1, 2 or 3) axes."""
    return _of_dims(_AVERAGE_POOLS, dims)(*args, **kwargs)


def _of_dims(layers: dict[int, type[nn.Module]], dims: int) -> type[nn.Module]:
    if dims not in layers:
        raise ConfigError(f"`dims` is {dims}; expected 1, 2 or 3 (2 for images).")
    return layers[dims]


def zero_module(module: nn.Module) -> nn.Module:
    """Set all parameters to zero: the branch that ends here starts as no change at all."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """Sinusoidal embedding, cosines first ("Attention is all you need" §3.5).

    Args:
        timesteps: (B,) steps, integers or fractions.
        dim: width of the embedding; an odd width ends in one zero column.
        max_period: longest wavelength over 2 pi.

    Returns:
        (B, dim) float32 in [-1, 1].
    """
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    frequencies = torch.exp(-math.log(max_period) * exponents)
    angles = timesteps[:, None].float() * frequencies[None]  # (B, half)
    embedding = torch.cat([angles.cos(), angles.sin()], dim=-1)
    return F.pad(embedding, (0, 1)) if dim % 2 else embedding


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scaled dot-product attention, softmax in at least float32.

    The fused kernels take a contiguous last axis only; for any other torch falls back to slow arithmetic without a
    word. On a CPU half precision is slower than float32 here, so it is left.

    Args:
        q, k, v: (B, heads, L or S, width).

    Returns:
        (B, heads, L, width).
    """
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v)
    with torch.autocast("cpu", enabled=False):
        wide = (at_least_float32(x) for x in (q, k, v))
        return F.scaled_dot_product_attention(*wide).to(q.dtype)


def run_checkpointed(function: Callable[..., Any], use_checkpoint: bool, *inputs: Any) -> Any:
    """Call ``function``; with ``use_checkpoint`` its activations are recomputed in the backward pass."""
    if use_checkpoint and torch.is_grad_enabled():
        return checkpoint(function, *inputs, use_reentrant=False)
    return function(*inputs)
