"""Convolutions of small maps in bfloat16."""

import pytest
import torch

from ldm.modules.diffusionmodules.convolution import Conv2d


def gradients(conv, x, weights, half):
    """Return the output, and the gradients of its weighted sum with respect to input, weight and bias."""
    conv.zero_grad()
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        out = conv(x)
    (out.float() * weights).sum().backward()
    return [out, x.grad, conv.weight.grad, *([] if conv.bias is None else [conv.bias.grad])]


@pytest.mark.parametrize(
    ("size", "options"),
    [
        ((4, 4), {"padding": 1}),
        ((2, 2), {"padding": 1, "bias": False}),
        ((1, 3), {"padding": 1}),
        ((4, 4), {"padding": 0}),
        ((4, 4), {"padding": 1, "stride": 2}),
        ((8, 8), {"padding": 1}),
    ],
)
def test_gradients_are_those_of_float32_up_to_rounding(size, options):
    torch.manual_seed(0)
    conv, x = Conv2d(8, 16, 3, **options), torch.randn(6, 8, *size)
    weights = torch.randn_like(conv(x))
    for narrow, wide in zip(gradients(conv, x, weights, half=True), gradients(conv, x, weights, half=False)):
        assert narrow.shape == wide.shape and (narrow - wide).abs().max() <= 0.02 * wide.abs().max()
    assert conv.weight.grad.dtype == torch.float32


def test_frozen_weights_have_no_gradient():
    conv = Conv2d(4, 4, 3, padding=1).requires_grad_(False)
    x = torch.randn(2, 4, 4, 4, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        conv(x).sum().backward()
    assert x.grad is not None and conv.weight.grad is None
