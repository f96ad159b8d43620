"""Networks of EncDiff: an encoder of images into scalar units, and a U-Net that attends to them (Yang et al. 2024).

A separate small network maps the scalar of each unit to a token; the spatial transformers of the U-Net attend to the
tokens. No further loss is needed for the units to specialize.

Legend: B batch, U units, D width of a token, C channels, H W space.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.modules.diffusionmodules import openaimodel
from ldm.modules.encoders import image
from ldm.ranges import Count, Size
from ldm.util import ConfigError

HIDDEN_WIDTHS = (64, 128)  # of the networks from scalars to tokens


class UNetModel(openaimodel.UNetModel):
    """U-Net with cross-attention to U tokens.

    Args:
        latent_unit: number of units U.
        params: keyword arguments of :class:`~ldm.modules.diffusionmodules.shapes.UNetConfig`;
            ``use_spatial_transformer`` and ``context_dim`` are required.

    Example:
        >>> unet = UNetModel(latent_unit=3, image_size=8, in_channels=4, out_channels=4, model_channels=32,
        ...                  num_res_blocks=1, attention_resolutions=[2], channel_mult=[1, 2], num_heads=4,
        ...                  use_spatial_transformer=True, context_dim=5)
        >>> unet(torch.randn(2, 4, 8, 8), torch.tensor([3, 900]), torch.randn(2, 15)).shape
        torch.Size([2, 4, 8, 8])
    """

    def __init__(self, latent_unit: Count, **params: Any) -> None:
        super().__init__(**params)
        if not self.config.use_spatial_transformer:
            raise ConfigError(
                "unet_config.params.use_spatial_transformer: expected true, because EncDiff conditions by "
                "cross-attention, got false. Set it to true and `context_dim` to the width of a token."
            )
        self.latent_unit = latent_unit

    def forward(
        self, x: Tensor, timesteps: Tensor, context: Tensor | Sequence[Tensor], y: Tensor | None = None
    ) -> Tensor:
        """Predict.

        Args:
            x: (B, in_channels, H, W) noisy latent.
            timesteps: (B,) steps.
            context: (B, S, D) or (B, S * D) tokens, or a list whose first entry is that tensor; S is U, or less to
                attend to some units only.
            y: class labels or float vectors, with ``num_classes``.

        Returns:
            (B, out_channels, H, W).
        """
        tokens = context if isinstance(context, Tensor) else context[0]
        return super().forward(x, timesteps, tokens.reshape(len(x), -1, self.config.context_dim), y)


class UnitTokens(nn.Module):
    """U networks of three layers, each from one scalar to one token, computed as batched products.

    The state dict has the entries of U separate networks, ``<unit>.{0,2,4}.{weight,bias}``. In memory, the weights of a
    layer of all units are one tensor, because the optimizer's run time grows with the number of tensors.
    """

    def __init__(self, num_units: int, width: int) -> None:
        super().__init__()
        self.num_units = num_units
        sizes = (1, *HIDDEN_WIDTHS, width)
        self.num_layers = len(sizes) - 1
        for layer, (size_in, size_out) in enumerate(zip(sizes, sizes[1:])):
            bound = 1 / math.sqrt(size_in)  # as nn.Linear
            weight = torch.empty(num_units, size_out, size_in).uniform_(-bound, bound)
            bias = torch.empty(num_units, size_out).uniform_(-bound, bound)
            self.register_parameter(f"weight_{layer}", nn.Parameter(weight))
            self.register_parameter(f"bias_{layer}", nn.Parameter(bias))

    def forward(self, scalars: Tensor) -> Tensor:
        """Map ``scalars`` (B, U) to tokens (B, U, D)."""
        h = rearrange(scalars, "b u -> u b 1")
        for layer in range(self.num_layers):
            weight, bias = self.get_parameter(f"weight_{layer}"), self.get_parameter(f"bias_{layer}")
            h = torch.baddbmm(bias.unsqueeze(1), F.elu(h) if layer else h, weight.mT)
        return rearrange(h, "u b d -> b u d")

    def _entries(self) -> Iterator[tuple[str, nn.Parameter, int]]:
        """Yield key, parameter and unit of each entry of the state dict; odd layer numbers are activations."""
        for unit in range(self.num_units):
            for layer in range(self.num_layers):
                for kind in ("weight", "bias"):
                    yield f"{unit}.{2 * layer}.{kind}", self.get_parameter(f"{kind}_{layer}"), unit

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Add one entry per unit, layer and kind; the entries share the memory of the parameters."""
        for key, parameter, unit in self._entries():
            destination[prefix + key] = (parameter if keep_vars else parameter.detach())[unit]

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Copy the entries of the units into the parameters."""
        expected = set()
        for name, parameter, unit in self._entries():
            key = prefix + name
            expected.add(key)
            if key not in state_dict:
                missing_keys.append(key)
            elif state_dict[key].shape != parameter.shape[1:]:
                found, expected_shape = tuple(state_dict[key].shape), tuple(parameter.shape[1:])
                error_msgs.append(f"{key}: expected shape {expected_shape}, got {found}")
            else:
                with torch.no_grad():
                    parameter[unit].copy_(state_dict[key])
        unexpected_keys += [key for key in state_dict if key.startswith(prefix) and key not in expected]


class Encoder4(image.Encoder4):
    """Encoder of images into U scalars, and of each scalar into a token.

    The convolutions are those of :class:`ldm.modules.encoders.image.Encoder4` and reduce images of any supported size
    to 4x4.

    Args:
        d: channels of the convolutions.
        context_dim: width D of a token.
        latent_unit: number of units U.
        bn: use batch normalization inside the residual blocks.
        num_channels: channels of the images.
        image_size: height and width of the images: 8, 16, 32, 64, ...

    Example:
        >>> encoder = Encoder4(d=8, context_dim=5, latent_unit=3, image_size=16)
        >>> encoder.encoding(torch.randn(2, 3, 16, 16)).shape, encoder(torch.randn(2, 3, 16, 16)).shape
        (torch.Size([2, 3]), torch.Size([2, 15]))
    """

    def __init__(
        self,
        d: Count,
        context_dim: Count,
        latent_unit: Count,
        bn: bool = True,
        num_channels: Size = 3,
        image_size: Size = 64,
    ) -> None:
        super().__init__(d, bn, num_channels, latent_unit, image_size)
        self.latent_unit, self.context_dim = latent_unit, context_dim
        self.net = UnitTokens(latent_unit, context_dim)

    def encoding(self, x: Tensor) -> Tensor:
        """Map images ``x`` (B, num_channels, image_size, image_size) in [-1, 1] to scalars (B, U)."""
        return super().forward(x)

    def warp(self, scalars: Tensor) -> Tensor:
        """Map scalars (B, U) to concatenated tokens (B, U * D), and scalars (B, U, 1) to tokens (B, U, D)."""
        if scalars.shape[1:] not in ((self.latent_unit,), (self.latent_unit, 1)):
            raise ValueError(
                f"EncDiff encoder: expected scalars of {self.latent_unit} units, (B, {self.latent_unit}) or "
                f"(B, {self.latent_unit}, 1), got {tuple(scalars.shape)}"
            )
        tokens = self.net(scalars.flatten(1))
        return tokens if scalars.ndim == 3 else tokens.flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``x`` (B, num_channels, image_size, image_size) in [-1, 1] to tokens (B, U * D)."""
        return self.warp(self.encoding(x))
