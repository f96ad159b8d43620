"""Encoder and decoder of the first-stage autoencoders (Rombach et al. 2022, appendix G).

Legend: B batch, C channels, H W space, L = H * W positions, z latent channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.legacy import translate_ddconfig
from ldm.modules.diffusionmodules.blocks import Upsample
from ldm.modules.diffusionmodules.util import at_least_float32, build_dataclass, normalization
from ldm.util import ConfigError

GROUP_NORM_EPS = 1e-6


@dataclass(frozen=True)
class AutoencoderShape:
    """The ``ddconfig`` of an autoencoder, shared by its encoder and its decoder.

    Images may have any height and width that :attr:`factor` divides. ``resolution`` places attention only, as in LDM: a
    level has it where its feature map, for images of ``resolution`` pixels, has a height or width in
    ``attn_resolutions``. With ``patch_size`` p the image is first folded into patches (pixel-unshuffle), so that the
    networks work at 1 / p of its size.
    """

    ch: int  # base width
    out_ch: int  # channels of the decoder's output
    resolution: int | Sequence[int]  # height and width, or [height, width], for which attention is placed, pixels
    in_channels: int  # channels of the encoder's input
    z_channels: int  # latent channels
    num_res_blocks: int  # per level in the encoder; the decoder has one more
    attn_resolutions: Sequence[int] = ()  # feature-map resolutions with attention
    ch_mult: Sequence[int] = (1, 2, 4, 8)  # width of each level in units of ch
    double_z: bool = True  # the encoder returns mean and log-variance
    dropout: float = 0.0
    resamp_with_conv: bool = True  # use a convolution for down- and upsampling
    attn_type: Literal["vanilla", "none"] = "vanilla"  # none also removes the attention of the middle
    tanh_out: bool = False  # apply tanh to the decoder's output
    patch_size: int = 1  # side of the patches folded into channels; 1 disables the folding

    def __post_init__(self) -> None:
        if self.patch_size < 1:
            raise ConfigError(f"ddconfig.patch_size: expected at least 1, got {self.patch_size}.")
        if len(self.sides) > 2 or not all(isinstance(side, int) and side >= self.factor for side in self.sides):
            raise ConfigError(
                f"ddconfig.resolution: expected a number or [height, width], at least {self.factor} pixels, got "
                f"{self.resolution!r}."
            )

    @classmethod
    def from_config(cls, ddconfig: Mapping[str, Any]) -> AutoencoderShape:
        """Read a config's section; see :func:`build_dataclass` and :func:`translate_ddconfig` for the errors."""
        return build_dataclass(cls, translate_ddconfig(ddconfig, [field.name for field in fields(cls)]), "ddconfig")

    @property
    def sides(self) -> tuple[int, ...]:
        """The numbers of ``resolution``."""
        return tuple(self.resolution) if isinstance(self.resolution, Sequence) else (self.resolution,)

    @property
    def factor(self) -> int:
        """Height of an image over that of its latent: ``patch_size``, times 2 for each downsampling."""
        return self.patch_size * 2 ** (len(self.ch_mult) - 1)

    def has_attention(self, level: int, is_decoder: bool = False) -> bool:
        """Return whether each block of a level is followed by attention; level 0 is the finest.

        The decoder counts from the latent's size, which differs where :attr:`factor` does not divide ``resolution``.
        """
        finest = [side // self.factor * 2 ** (len(self.ch_mult) - 1) for side in self.sides] if is_decoder else None
        sizes = {side // 2**level for side in finest or (side // self.patch_size for side in self.sides)}
        return self.attn_type != "none" and not sizes.isdisjoint(self.attn_resolutions)


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
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = normalization(out_channels, GROUP_NORM_EPS)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
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
