"""U-Net of the CLIP-guided DDPM for small images, in the two layouts of its published checkpoints.

The condition multiplies the features of the decoder, and the time step is added to them. The bottleneck is a
multilayer perceptron over the whole feature map, so that the network takes images of one size only.

Dimensions: B batch, D width of the condition, H W pixels.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from einops.layers.torch import Rearrange
from torch import Tensor, nn

from ldm.modules.diffusionmodules.shapes import NUM_GROUPS, SMALL_GROUPS, CLIPGuidedShape
from ldm.util import UserError


class UNet(nn.Module):
    """The network eps(x, t, c).

    Args:
        T: number of time steps; the network sees t / T.
        img_ch: channels of the images.
        img_size: height and width of the images, a multiple of 4.
        down_chs: channels of the three levels, finest first.
        t_embed_dim: width of the sinusoidal embedding of t / T.
        c_embed_dim: D, width of the condition.
        arch: ``package`` is the layout of the published package; ``dli`` that of NVIDIA's course on diffusion models:
            other key names, one more layer in the bottleneck, ReLU in bottleneck and output, and a first block without
            a projection.

    Raises:
        ConfigError: a size is not supported.
    """

    def __init__(
        self,
        T: int,
        img_ch: int = 3,
        img_size: int = 32,
        down_chs: Sequence[int] = (256, 256, 512),
        t_embed_dim: int = 8,
        c_embed_dim: int = 512,
        arch: str = "package",
    ) -> None:
        super().__init__()
        self.shape = CLIPGuidedShape(T, img_ch, img_size, tuple(down_chs), t_embed_dim, c_embed_dim, arch)
        fine, middle, coarse = self.shape.down_chs
        is_course = arch == "dli"
        self.down0 = FirstBlock(arch, img_ch, fine)
        self.down1 = _down_block(arch, fine, middle)
        self.down2 = _down_block(arch, middle, coarse)
        self.to_vec = nn.Sequential(nn.Flatten(), nn.GELU()) if is_course else nn.Flatten()
        self.dense_emb = _bottleneck(arch, coarse * (img_size // 4) ** 2, middle)
        # The order of the parameters is that of the published optimizers' states.
        self._time_names = ("temb_1", "temb_2") if is_course else ("t_emb1", "t_emb2")
        for name, width in zip(self._time_names, (coarse, middle)):
            self.add_module(name, _embed_block(t_embed_dim, width))
        self.c_embed1, self.c_embed2 = _embed_block(c_embed_dim, coarse), _embed_block(c_embed_dim, middle)
        up0 = _conv_block(arch, coarse, coarse)
        self.up0 = nn.Sequential(nn.Identity(), up0) if is_course else up0
        self.up1, self.up2 = _up_block(arch, coarse, middle), _up_block(arch, middle, fine)
        self.out = nn.Sequential(
            nn.Conv2d(2 * fine, fine, 3, padding=1),
            nn.GroupNorm(SMALL_GROUPS, fine),
            nn.ReLU() if is_course else nn.GELU(),
            nn.Conv2d(fine, img_ch, 3, padding=1),
        )
        if is_course:
            self.register_load_state_dict_pre_hook(_rename_time)

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None, c_mask: Tensor | None = None) -> Tensor:
        """Predict the noise.

        Args:
            x: (B, img_ch, img_size, img_size) noisy images.
            timesteps: (B,) t in [0, T).
            y: (B, D) condition; zeros, or None, for no condition.
            c_mask: (B, 1) or (B, D) factors of the condition.

        Returns:
            (B, img_ch, img_size, img_size).

        Raises:
            UserError: the images or the condition have another size.
        """
        y = x.new_zeros(len(x), self.shape.c_embed_dim) if y is None else y.to(x)
        self._check(x, y)
        y = y if c_mask is None else y * c_mask
        angles = self._sinusoids(timesteps).to(x)
        time1, time2 = (self.get_submodule(name)(angles) for name in self._time_names)
        down0 = self.down0(x)
        down1 = self.down1(down0)
        down2 = self.down2(down1)
        up0 = self.up0(self.dense_emb(self.to_vec(down2)).view_as(down2))
        up1 = self.up1(torch.cat([self.c_embed1(y) * up0 + time1, down2], dim=1))
        up2 = self.up2(torch.cat([self.c_embed2(y) * up1 + time2, down1], dim=1))
        return self.out(torch.cat([up2, down0], dim=1))

    def _sinusoids(self, timesteps: Tensor) -> Tensor:
        """Return sines and cosines of t / T, (B, t_embed_dim)."""
        half = self.shape.t_embed_dim // 2
        frequencies = torch.exp(torch.arange(half, device=timesteps.device) * (-math.log(10000) / (half - 1)))
        angles = (timesteps.float() / self.shape.T)[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    def _check(self, x: Tensor, y: Tensor) -> None:
        expected = (self.shape.img_ch, self.shape.img_size, self.shape.img_size)
        if tuple(x.shape[1:]) != expected:
            raise UserError(
                f"U-Net: expected inputs of shape {expected}, got {tuple(x.shape[1:])}. Set img_ch and img_size of "
                "model.params.unet_config.params to the size of the images (of the latents with a first stage)"
            )
        if tuple(y.shape[1:]) != (self.shape.c_embed_dim,):
            raise UserError(
                f"U-Net: expected conditions of shape (B, {self.shape.c_embed_dim}), got {tuple(y.shape)}. Set "
                "model.params.unet_config.params.c_embed_dim to the width of the CLIP embeddings"
            )


class FirstBlock(nn.Module):
    """A convolution, and a second one around which features are passed (``package``: a projection of the input)."""

    def __init__(self, arch: str, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = _conv_block(arch, in_channels, out_channels, SMALL_GROUPS)
        self.conv2 = _conv_block(arch, out_channels, out_channels, SMALL_GROUPS)
        self.shortcut = None
        if arch == "package":
            self.shortcut = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) to (B, out_channels, H, W)."""
        h = self.conv1(x)
        return (h if self.shortcut is None else self.shortcut(x)) + self.conv2(h)


def _named(**parts: nn.Module) -> nn.Sequential:
    """Return the modules in a row under their names."""
    return nn.Sequential(OrderedDict(parts))


def _conv_block(arch: str, in_channels: int, out_channels: int, groups: int = NUM_GROUPS) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)
    norm = nn.GroupNorm(groups, out_channels)
    if arch == "package":
        return _named(conv=conv, norm=norm, act=nn.GELU())
    return _named(model=nn.Sequential(conv, norm, nn.GELU()))


def _down_block(arch: str, in_channels: int, out_channels: int) -> nn.Sequential:
    """Return two convolutions, and one of the pixels of each 2 x 2 patch: (B, c, H, W) to (B, C, H / 2, W / 2)."""
    fold = Rearrange("b c (h p1) (w p2) -> b (c p1 p2) h w", p1=2, p2=2)
    pool = _named(rearrange=fold, conv=_conv_block(arch, 4 * out_channels, out_channels))
    blocks = [_conv_block(arch, width, out_channels) for width in (in_channels, out_channels)]
    return _named(model=nn.Sequential(*blocks, pool))


def _up_block(arch: str, in_channels: int, out_channels: int) -> nn.Sequential:
    """Return the map from features and skipped features (B, 2 c, H, W) to (B, C, 2 H, 2 W)."""
    grow = nn.ConvTranspose2d(2 * in_channels, out_channels, 2, stride=2)
    return _named(model=nn.Sequential(grow, *(_conv_block(arch, out_channels, out_channels) for _ in range(4))))


def _embed_block(in_width: int, width: int) -> nn.Sequential:
    """Return a perceptron from vectors (B, in_width) to factors (B, width, 1, 1) of features."""
    layers = nn.Linear(in_width, width), nn.GELU(), nn.Linear(width, width), nn.Unflatten(1, (width, 1, 1))
    return _named(model=nn.Sequential(*layers))


def _bottleneck(arch: str, width: int, hidden: int) -> nn.Sequential:
    """Return the perceptron over a flat feature map (B, width)."""
    if arch == "package":
        return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width), nn.GELU())
    layers = nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, width)
    return nn.Sequential(*layers, nn.ReLU())


def _rename_time(module: UNet, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Accept the names ``t_emb1`` and ``t_emb2``, which versions of the course's network with a condition use."""
    for old, new in zip(("t_emb1", "t_emb2"), ("temb_1", "temb_2")):
        for key in [key for key in state if key.startswith(f"{prefix}{old}.")]:
            state[prefix + new + key.removeprefix(prefix + old)] = state.pop(key)
