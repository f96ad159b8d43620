"""Encoder and decoder of the first-stage autoencoders (Rombach et al. 2022, appendix G).

Legend: B batch, C channels, H W space, L = H * W positions, z latent channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.modules.diffusionmodules.blocks import Upsample
from ldm.modules.diffusionmodules.convolution import Conv2d
from ldm.modules.diffusionmodules.shapes import AutoencoderShape
from ldm.modules.diffusionmodules.util import at_least_float32, normalization

GROUP_NORM_EPS = 1e-6


def swish(x: Tensor) -> Tensor:
    """Return ``x * sigmoid(x)``.

    Without gradients the product is computed explicitly, as in LDM: ``F.silu`` rounds differently, which can change the
    nearest code of a vector. In training the fused ``F.silu`` is used, which is faster.
    """
    return F.silu(x) if x.requires_grad else x * torch.sigmoid(x)


class Downsample(nn.Module):
    """Downsampling by 2: a strided convolution padded on the right and bottom only, or average pooling."""

    def __init__(self, channels: int, with_conv: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2) if with_conv else None

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (B, C, H, W) to (B, C, H/2, W/2)."""
        if self.conv is None:
            return F.avg_pool2d(x, 2)
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class ResnetBlock(nn.Module):
    """Residual block of two normalized 3x3 convolutions, without a timestep."""

    def __init__(self, in_channels: int, out_channels: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = normalization(in_channels, GROUP_NORM_EPS)
        self.conv1 = Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = normalization(out_channels, GROUP_NORM_EPS)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = Conv2d(out_channels, out_channels, 3, padding=1)
        is_same = in_channels == out_channels
        self.nin_shortcut = nn.Identity() if is_same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (B, in_channels, H, W) to (B, out_channels, H, W)."""
        h = self.conv1(swish(self.norm1(x)))
        h = self.conv2(self.dropout(swish(self.norm2(h))))
        return self.nin_shortcut(x) + h


class AttnBlock(nn.Module):
    """Residual single-head self-attention over all positions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = normalization(channels, GROUP_NORM_EPS)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (B, C, H, W) to (B, C, H, W)."""
        h = self.norm(x)
        q, k, v = (rearrange(layer(h), "b c h w -> b c (h w)") for layer in (self.q, self.k, self.v))
        scores = torch.bmm(rearrange(q, "b c l -> b l c"), k) * q.shape[1] ** -0.5  # (B, L queries, L keys)
        weights = torch.softmax(at_least_float32(scores), dim=2).to(v.dtype)
        h = torch.bmm(v, rearrange(weights, "b q k -> b k q"))  # (B, C, L)
        return x + self.proj_out(h.reshape(x.shape))


class _Level(nn.Module):
    """Blocks of one resolution, with optional attention after each, and resampling."""

    def __init__(
        self,
        widths: Sequence[int],
        shape: AutoencoderShape,
        level: int,
        name: str,
        resample: Callable[[int, bool], nn.Module],
    ) -> None:
        super().__init__()
        pairs = list(zip(widths[:-1], widths[1:]))
        self.block = nn.ModuleList(ResnetBlock(before, after, shape.dropout) for before, after in pairs)
        self.attn = nn.ModuleList()
        if shape.has_attention(level, is_decoder=name == "upsample"):
            self.attn.extend(AttnBlock(after) for _, after in pairs)
        self.resample_name = name  # downsample or upsample, as in LDM's checkpoints
        self.add_module(name, resample(widths[-1], shape.resamp_with_conv))

    def forward(self, h: Tensor) -> Tensor:
        """Map ``h`` (B, C, H, W) to (B, C', H', W')."""
        for index, block in enumerate(self.block):
            h = block(h)
            if len(self.attn):
                h = self.attn[index](h)
        return self.get_submodule(self.resample_name)(h)


class _Middle(nn.Module):
    """Block, attention and block at the coarsest resolution."""

    def __init__(self, channels: int, shape: AutoencoderShape) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, shape.dropout)
        self.attn_1 = nn.Identity() if shape.attn_type == "none" else AttnBlock(channels)
        self.block_2 = ResnetBlock(channels, channels, shape.dropout)

    def forward(self, h: Tensor) -> Tensor:
        """Map ``h`` (B, C, H, W) to the same shape."""
        return self.block_2(self.attn_1(self.block_1(h)))


class Encoder(nn.Module):
    """Network from images to latents, or to the moments of latents; takes the fields of :class:`AutoencoderShape`.

    Example:
        >>> encoder = Encoder(ch=32, ch_mult=[1, 2], resolution=16, in_channels=3, out_ch=3, z_channels=4,
        ...                   num_res_blocks=1, double_z=False)
        >>> encoder(torch.zeros(1, 3, 16, 16)).shape
        torch.Size([1, 4, 8, 8])
    """

    def __init__(self, **ddconfig: Any) -> None:
        super().__init__()
        shape = AutoencoderShape.from_config(ddconfig)
        self.shape = shape
        widths = [shape.ch * mult for mult in shape.ch_mult]
        self.conv_in = nn.Conv2d(shape.in_channels * shape.patch_size**2, shape.ch, 3, padding=1)
        self.down = nn.ModuleList()
        for level, (before, after) in enumerate(zip([shape.ch, *widths], widths)):
            level_widths = [before] + [after] * shape.num_res_blocks
            resample = nn.Identity if level == len(widths) - 1 else Downsample
            self.down.append(_Level(level_widths, shape, level, "downsample", resample))
        self.mid = _Middle(widths[-1], shape)
        self.norm_out = normalization(widths[-1], GROUP_NORM_EPS)
        self.conv_out = nn.Conv2d(widths[-1], shape.z_channels * (1 + shape.double_z), 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``x`` (B, in_channels, H, W) in [-1, 1] to latents (B, z, h, w).

        With ``double_z``, the result is (B, 2z, h, w): means, then log-variances.
        """
        h = self.conv_in(F.pixel_unshuffle(x, self.shape.patch_size))
        for level in self.down:
            h = level(h)
        return self.conv_out(swish(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """Network from latents to images, with the arguments of :class:`Encoder`.

    Levels are stored finest first (``up.0``) and run coarsest first.
    """

    def __init__(self, **ddconfig: Any) -> None:
        super().__init__()
        shape = AutoencoderShape.from_config(ddconfig)
        self.shape = shape
        widths = [shape.ch * mult for mult in shape.ch_mult]
        self.conv_in = nn.Conv2d(shape.z_channels, widths[-1], 3, padding=1)
        self.mid = _Middle(widths[-1], shape)
        self.up = nn.ModuleList()
        for level, (after, before) in enumerate(zip(widths, [*widths[1:], widths[-1]])):
            level_widths = [before] + [after] * (shape.num_res_blocks + 1)
            resample = Upsample if level else nn.Identity
            self.up.append(_Level(level_widths, shape, level, "upsample", resample))
        self.norm_out = normalization(widths[0], GROUP_NORM_EPS)
        self.conv_out = nn.Conv2d(widths[0], shape.out_ch * shape.patch_size**2, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """Map latents ``z`` (B, z, h, w) to (B, out_ch, H, W), about in [-1, 1]; exactly with ``tanh_out``."""
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
        h = F.pixel_shuffle(self.conv_out(swish(self.norm_out(h))), self.shape.patch_size)
        return torch.tanh(h) if self.shape.tanh_out else h
