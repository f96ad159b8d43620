"""Encoder and decoder of the first-stage autoencoders (Rombach et al. 2022, appendix G).

Legend: B batch, C channels, H W space, z latent channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.modules.diffusionmodules.util import at_least_float32, normalization
from ldm.util import ConfigError

GROUP_NORM_EPS = 1e-6
_ATTENTION_TYPES = ("vanilla", "none")


@dataclass(frozen=True)
class AutoencoderShape:
    """The ``ddconfig`` of an autoencoder: one description for its encoder and its decoder.

    ``resolution`` is that of the image, in pixels. With ``patch_size`` p the image is first folded into patches
    (pixel-unshuffle), so the networks work at ``resolution / p`` and the latent has
    ``resolution / p / 2**(len(ch_mult) - 1)`` rows; ``attn_resolutions`` are resolutions of feature maps, counted
    after the folding.
    """

    ch: int  # base width
    out_ch: int  # channels the decoder returns
    resolution: int  # image height and width, pixels
    in_channels: int  # channels the encoder takes
    z_channels: int  # latent channels
    num_res_blocks: int  # per level in the encoder; the decoder has one more
    attn_resolutions: Sequence[int] = ()  # feature-map resolutions with attention
    ch_mult: Sequence[int] = (1, 2, 4, 8)  # width of each level in units of ch
    double_z: bool = True  # the encoder returns mean and log-variance
    dropout: float = 0.0
    resamp_with_conv: bool = True  # convolution beside the down- and upsampling
    attn_type: str = "vanilla"  # vanilla | none; none also removes the attention of the middle
    tanh_out: bool = False  # squash the decoder's output into [-1, 1]
    patch_size: int = 1  # side of the patches folded into channels; 1 folds nothing

    def __post_init__(self) -> None:
        factor = self.patch_size * 2 ** (len(self.ch_mult) - 1)
        if self.attn_type not in _ATTENTION_TYPES:
            raise ConfigError(f"ddconfig.attn_type is {self.attn_type!r}; expected one of {_ATTENTION_TYPES}.")
        if self.patch_size < 1 or self.resolution % factor:
            raise ConfigError(
                f"ddconfig.resolution {self.resolution} does not divide by {factor} (patch_size {self.patch_size} "
                f"times 2 for each of the {len(self.ch_mult) - 1} downsamplings): change ddconfig.resolution, "
                "ddconfig.patch_size or ddconfig.ch_mult."
            )

    @classmethod
    def from_config(cls, ddconfig: dict[str, Any]) -> AutoencoderShape:
        """Check the keys of a ``ddconfig`` and build the description.

        Raises:
            ConfigError: a key is unknown or a required one is missing.
        """
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(ddconfig) - known)
        if unknown:
            raise ConfigError(f"unknown keys in ddconfig: {unknown}; expected some of {sorted(known)}.")
        try:
            return cls(**ddconfig)
        except TypeError as error:
            raise ConfigError(f"ddconfig is incomplete: {error}; found {sorted(ddconfig)}.") from error

    def feature_resolution(self, level: int) -> int:
        """Rows of the feature maps of a level; level 0 is the finest."""
        return self.resolution // self.patch_size // 2**level

    def has_attention(self, level: int) -> bool:
        """Whether the blocks of a level are each followed by attention."""
        return self.feature_resolution(level) in self.attn_resolutions


def swish(x: Tensor) -> Tensor:
    """x times its sigmoid.

    Without gradients it is written out, because ``F.silu`` rounds differently from what the family's figures
    were made with, and a rounding can flip the nearest code of a vector; in training the fused form is faster.
    """
    return F.silu(x) if x.requires_grad else x * torch.sigmoid(x)


class Upsample(nn.Module):
    """Nearest-neighbour doubling of height and width, then an optional convolution."""

    def __init__(self, channels: int, with_conv: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if with_conv else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W) -> (B, C, 2H, 2W)."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Downsample(nn.Module):
    """Halve height and width: a strided convolution padded right and below only, or an average."""

    def __init__(self, channels: int, with_conv: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2) if with_conv else None

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W) -> (B, C, H/2, W/2)."""
        if self.conv is None:
            return F.avg_pool2d(x, 2)
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class ResnetBlock(nn.Module):
    """Two normalised 3x3 convolutions beside a shortcut; no timestep."""

    def __init__(self, in_channels: int, out_channels: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = normalization(in_channels, GROUP_NORM_EPS)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = normalization(out_channels, GROUP_NORM_EPS)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)
        else:
            self.nin_shortcut = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, in_channels, H, W) -> (B, out_channels, H, W)."""
        h = self.conv1(swish(self.norm1(x)))
        h = self.conv2(self.dropout(swish(self.norm2(h))))
        return self.nin_shortcut(x) + h


class AttnBlock(nn.Module):
    """Single-head self-attention over all positions, residual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = normalization(channels, GROUP_NORM_EPS)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W) -> (B, C, H, W)."""
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2) for layer in (self.q, self.k, self.v))  # each (B, C, HW)
        scores = torch.bmm(q.transpose(1, 2), k) * q.shape[1] ** -0.5  # (B, HW queries, HW keys)
        weights = torch.softmax(at_least_float32(scores), dim=2).to(v.dtype)
        h = torch.bmm(v, weights.transpose(1, 2))  # (B, C, HW)
        return x + self.proj_out(h.reshape(x.shape))


class _Level(nn.Module):
    """One resolution: blocks, each followed by attention where the level has it, and a change of resolution.

    The last is named as in the checkpoints of the family: ``downsample`` or ``upsample``.
    """

    def __init__(
        self, widths: Sequence[int], shape: AutoencoderShape, level: int, resample_name: str, is_last: bool
    ) -> None:
        super().__init__()
        self.resample_name = resample_name
        pairs = list(zip(widths[:-1], widths[1:]))
        self.block = nn.ModuleList(ResnetBlock(before, after, shape.dropout) for before, after in pairs)
        self.attn = nn.ModuleList()
        if shape.has_attention(level) and shape.attn_type != "none":
            self.attn.extend(AttnBlock(after) for _, after in pairs)
        if not is_last:
            resample = {"downsample": Downsample, "upsample": Upsample}[resample_name]
            self.add_module(resample_name, resample(widths[-1], shape.resamp_with_conv))

    def forward(self, h: Tensor) -> Tensor:
        """h: (B, C, H, W) -> (B, C', H', W')."""
        for index, block in enumerate(self.block):
            h = block(h)
            if len(self.attn):
                h = self.attn[index](h)
        return getattr(self, self.resample_name, nn.Identity())(h)


class _Middle(nn.Module):
    """Block, attention, block at the coarsest resolution."""

    def __init__(self, channels: int, shape: AutoencoderShape) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, shape.dropout)
        self.attn_1 = nn.Identity() if shape.attn_type == "none" else AttnBlock(channels)
        self.block_2 = ResnetBlock(channels, channels, shape.dropout)

    def forward(self, h: Tensor) -> Tensor:
        """h: (B, C, H, W) -> the same shape."""
        return self.block_2(self.attn_1(self.block_1(h)))


class Encoder(nn.Module):
    """Image to latent moments.

    Args:
        ddconfig: keywords of :class:`AutoencoderShape`.

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
            is_last = level == len(widths) - 1
            self.down.append(_Level(level_widths, shape, level, "downsample", is_last))
        self.mid = _Middle(widths[-1], shape)
        self.norm_out = normalization(widths[-1], GROUP_NORM_EPS)
        self.conv_out = nn.Conv2d(widths[-1], shape.z_channels * (1 + shape.double_z), 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Encode.

        Args:
            x: (B, in_channels, H, W) in [-1, 1].

        Returns:
            (B, z, h, w), or (B, 2z, h, w) with ``double_z`` (mean, then log-variance).
        """
        h = self.conv_in(F.pixel_unshuffle(x, self.shape.patch_size))
        for level in self.down:
            h = level(h)
        return self.conv_out(swish(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """Latent to image; levels are stored finest first (``up.0``) and run coarsest first.

    Args:
        ddconfig: keywords of :class:`AutoencoderShape`, the same as the encoder's.
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
            self.up.append(_Level(level_widths, shape, level, "upsample", is_last=level == 0))
        self.norm_out = normalization(widths[0], GROUP_NORM_EPS)
        self.conv_out = nn.Conv2d(widths[0], shape.out_ch * shape.patch_size**2, 3, padding=1)

    @property
    def last_layer(self) -> Tensor:
        """The weight whose gradients balance the adversarial loss (:class:`VQLPIPSWithDiscriminator`)."""
        return self.conv_out.weight

    def forward(self, z: Tensor) -> Tensor:
        """Decode.

        Args:
            z: (B, z, h, w) latent.

        Returns:
            (B, out_ch, H, W), about [-1, 1] (exactly within only with ``tanh_out``).
        """
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
        h = F.pixel_shuffle(self.conv_out(swish(self.norm_out(h))), self.shape.patch_size)
        return torch.tanh(h) if self.shape.tanh_out else h
