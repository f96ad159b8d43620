"""Convolutions of feature maps, with a faster gradient of the weights where oneDNN's is slow.

On CPUs, oneDNN computes the gradient of the weights of a wide convolution on a small map in bfloat16 at a fraction
of the speed of a matrix product (512 to 256 channels, 96 maps, one thread: 33 and 7 ms at 4 x 4, 24 and 2 ms at 2 x 2).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_SMALL_MAP = 4 * 4  # most positions of a map for which the matrix product is faster


class _SmallMapConvolution(torch.autograd.Function):
    """3 x 3 convolution with padding 1, whose gradient with respect to the weights is one matrix product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Convolve in ``dtype``."""
        half, narrow = x.to(dtype), weight.to(dtype)
        ctx.save_for_backward(half, narrow)
        return F.conv2d(half, narrow, None if bias is None else bias.to(dtype), padding=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients; those of weight and bias in float32."""
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        grad_x = torch.nn.grad.conv2d_input(x.shape, weight, grad, padding=1) if needs_x else None
        grad_weight = _weight_gradient(x, grad) if needs_weight else None
        return grad_x, grad_weight, grad.sum(dim=(0, 2, 3), dtype=torch.float32) if needs_bias else None, None


def _weight_gradient(x: Tensor, grad: Tensor) -> Tensor:
    """Return the gradient (O, I, 3, 3) float32 of x (B, I, H, W) and of the output's gradient (B, O, H, W)."""
    batch, channels, height, width = x.shape
    padded = x.new_zeros(batch, height + 2, width + 2, channels)
    padded[:, 1:-1, 1:-1] = x.permute(0, 2, 3, 1)
    taps = [padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    rows = grad.permute(1, 0, 2, 3).flatten(1)  # (O, B H W)
    gradient = rows @ torch.cat(taps, dim=-1).flatten(0, 2)  # (O, 9 I)
    result = gradient.new_empty(len(rows), channels, 9, dtype=torch.float32)
    return result.copy_(gradient.view(-1, 9, channels).transpose(1, 2)).unflatten(2, (3, 3))


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, ...] = (1, 1), padding: Any = (0, 0)
) -> Tensor:
    """Convolve x (B, I, H, W) with weight (O, I, h, w); same as ``F.conv2d`` up to rounding."""
    if x.device.type == "cpu" and torch.is_autocast_enabled("cpu") and x.shape[2] * x.shape[3] <= _SMALL_MAP:
        if weight.shape[2:] == (3, 3) and tuple(stride) == tuple(padding) == (1, 1):
            return _SmallMapConvolution.apply(x, weight, bias, torch.get_autocast_dtype("cpu"))
    return F.conv2d(x, weight, bias, stride, padding)


class Conv2d(nn.Conv2d):
    """``torch.nn.Conv2d`` by :func:`convolve`, for ungrouped convolutions that pad with zeros."""

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (B, I, H, W) to (B, O, H', W')."""
        return convolve(x, self.weight, self.bias, self.stride, self.padding)
