"""Shared parts of the networks: normalization, timestep embedding, n-d layers, attention, checkpointing."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from einops import rearrange
from torch import Tensor, nn

from ldm import util
from ldm.modules.diffusionmodules.convolution import Conv2d
from ldm.modules.diffusionmodules.shapes import NUM_GROUPS, require_groups

__getattr__ = util.__getattr__  # for functions that scripts import from this module

# Layers by the number of spatial axes.
CONVOLUTIONS = {1: nn.Conv1d, 2: Conv2d, 3: nn.Conv3d}
AVERAGE_POOLS = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}


def at_least_float32(x: Tensor) -> Tensor:
    """Return ``x``, converted to float32 if it has half precision."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


class GroupNorm32(nn.GroupNorm):
    """Group normalization computed in at least float32 and returned in the input's precision."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``x`` (B, C, ...) per sample and group."""
        return group_norm32(x, self.num_groups, self.weight, self.bias, self.eps)


def group_norm32(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Compute ``F.group_norm`` with statistics in at least float32.

    The CPU kernel computes bfloat16 inputs in float32 itself, without the two copies of a conversion.
    """
    if x.device.type == "cpu" and x.dtype == torch.bfloat16:
        return F.group_norm(x, num_groups, weight.float(), bias.float(), eps)
    wide = at_least_float32(x)
    return F.group_norm(wide, num_groups, weight.to(wide.dtype), bias.to(wide.dtype), eps).to(x.dtype)


def normalization(channels: int, eps: float = 1e-5) -> GroupNorm32:
    """Return a group normalization with 32 groups.

    Raises:
        ConfigError: ``channels`` is not a multiple of 32.
    """
    require_groups(channels, "group normalization")
    return GroupNorm32(NUM_GROUPS, channels, eps=eps)


class GatedGELU(nn.Linear):
    """Linear layer whose first half of outputs is multiplied by the GELU of the second half (Shazeer 2020, GEGLU).

    The halves are computed by two products: slices of one output are not contiguous, and their backward pass
    concatenates the gradients.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, 2 * out_features)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (..., in_features) to (..., out_features)."""
        (weight, gate_weight), (bias, gate_bias) = self.weight.chunk(2), self.bias.chunk(2)
        return F.linear(x, weight, bias) * F.gelu(F.linear(x, gate_weight, gate_bias))


def sequence_in(name: str, *layers: nn.Module) -> nn.Sequential:
    """Return layers in sequence whose names in the state dict start with ``<name>.``."""
    return nn.Sequential(OrderedDict({name: nn.Sequential(*layers)}))


def zero_module(module: nn.Module) -> nn.Module:
    """Set all parameters to zero, so that a residual branch that ends in ``module`` starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """Return sinusoidal embeddings, cosines first (Vaswani et al. 2017, §3.5).

    Args:
        timesteps: (B,) time steps, integer or fractional.
        dim: width of the embedding; an odd width is padded with a column of zeros.
        max_period: longest wavelength divided by 2 pi.

    Returns:
        (B, dim) float32 in [-1, 1].
    """
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    frequencies = torch.exp(-math.log(max_period) * exponents)
    angles = timesteps[:, None].float() * frequencies[None]  # (B, half)
    embedding = torch.cat([angles.cos(), angles.sin()], dim=-1)
    return F.pad(embedding, (0, 1)) if dim % 2 else embedding


def attend(q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False) -> Tensor:
    """Map q (B, heads, L, width) and k, v (B, heads, S, width) to attention outputs (B, heads, L, width).

    With ``is_causal``, position i attends to positions 0 to i only.

    The softmax is computed in at least float32. The fused CUDA kernels need a contiguous last axis; other layouts fall
    back to a slow implementation. On CPU, half precision is slower than float32, so inputs are converted.
    """
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
    with torch.autocast("cpu", enabled=False):
        wide = (at_least_float32(x) for x in (q, k, v))
        return F.scaled_dot_product_attention(*wide, is_causal=is_causal).to(q.dtype)


def attend_multi_head(q: Tensor, k: Tensor, v: Tensor, num_heads: int, is_causal: bool = False) -> Tensor:
    """Apply :func:`attend` to heads that are adjacent in the last axis of q (B, L, C) and k, v (B, S, C)."""
    h = attend(*(rearrange(t, "b s (h d) -> b h s d", h=num_heads) for t in (q, k, v)), is_causal)
    return rearrange(h, "b h l d -> b l (h d)")


def run_checkpointed(function: Callable[..., Any], use_checkpoint: bool, *inputs: Any) -> Any:
    """Call ``function``; with ``use_checkpoint``, recompute its activations in the backward pass."""
    if use_checkpoint and torch.is_grad_enabled():
        return torch.utils.checkpoint.checkpoint(function, *inputs, use_reentrant=False)
    return function(*inputs)
