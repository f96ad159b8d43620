"""Attention maps of the units: cross-attention averaged over layers, heads and time steps.

Dimensions: B batch, S tokens (units), L positions of a layer, H W the latent.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.modules.attention import BasicTransformerBlock, CrossAttention


class CrossAttentionMaps:
    """Context manager that averages the attention of each position to each token.

    Args:
        network: network whose spatial transformers are recorded; its results do not change.
        size: height and width to which the maps of all layers are resized.

    Example:
        >>> from ldm.modules.attention import SpatialTransformer
        >>> layer = SpatialTransformer(32, num_heads=4, dim_head=8, context_dim=5)
        >>> with CrossAttentionMaps(layer, (4, 4)) as maps:
        ...     _ = layer(torch.randn(2, 32, 4, 4), torch.randn(2, 3, 5))
        >>> maps.mean().shape
        torch.Size([2, 3, 4, 4])
    """

    def __init__(self, network: nn.Module, size: tuple[int, int]) -> None:
        self._network, self._size = network, size
        self._hooks: list[Any] = []
        self._sum: Tensor | None = None
        self._count = 0

    def __enter__(self) -> CrossAttentionMaps:
        for module in self._network.modules():
            if isinstance(module, BasicTransformerBlock):
                self._hooks.append(module.attn2.register_forward_pre_hook(self._record))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    @torch.no_grad()
    def _record(self, layer: CrossAttention, inputs: tuple[Tensor, Tensor | None]) -> None:
        """Recompute the layer's attention weights and add them."""
        x, context = inputs
        if context is None:
            return
        height, width = self._size
        rows = round((x.shape[1] * height / width) ** 0.5)
        q, k = (
            projection(tokens).unflatten(-1, (layer.heads, -1)).transpose(1, 2).float()  # (B, heads, L or S, width)
            for projection, tokens in ((layer.to_q, x), (layer.to_k, context))
        )
        weights = torch.softmax(q @ k.transpose(2, 3) * q.shape[-1] ** -0.5, dim=-1).mean(dim=1)  # (B, L, S)
        layer_maps = weights.transpose(1, 2).unflatten(2, (rows, -1))  # (B, S, h, w)
        layer_maps = F.interpolate(layer_maps, self._size, mode="bilinear", align_corners=False)
        self._sum = layer_maps if self._sum is None else self._sum + layer_maps
        self._count += 1

    def mean(self) -> Tensor:
        """Return (B, S, H, W) in [0, 1]; at each position the tokens' shares sum to 1.

        Raises:
            RuntimeError: no cross-attention was recorded.
        """
        if self._sum is None:
            raise RuntimeError("attention maps: expected a forward pass with tokens within the context, got none")
        return self._sum / self._count


def light_up(images: Tensor, maps: Tensor, floor: float = 0.12) -> Tensor:
    """Return images lit where a map is high; each map is divided by its own maximum.

    Args:
        images: (N, 3, H, W) in [-1, 1].
        maps: (N, h, w), not negative.
        floor: brightness where a map is zero.

    Returns:
        (N, 3, H, W) in [-1, 1].
    """
    light = maps / maps.amax(dim=(1, 2), keepdim=True).clamp(min=torch.finfo(maps.dtype).tiny)
    light = F.interpolate(light.unsqueeze(1), images.shape[-2:], mode="bilinear", align_corners=False)
    return (images + 1) * (floor + (1 - floor) * light) - 1
