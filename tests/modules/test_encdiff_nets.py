"""EncDiff's encoder, tokens and U-Net: reference figures, layout, options and errors."""

from __future__ import annotations

import pytest
import torch
from golden_recipe import UNET_CONFIG, assert_stat, fill, inp, load_golden
from torch import nn

from ldm.modules.diffusionmodules.openaimodel_enc import Encoder4, UNetModel, UnitTokens
from ldm.modules.encoders import image
from ldm.util import ConfigError

GOLDEN = load_golden("modules")["encdiff"]
TINY_UNET = {
    "latent_unit": 3,
    "image_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": 1,
    "attention_resolutions": [1, 2],
    "channel_mult": [1, 2],
    "num_heads": 4,
    "use_spatial_transformer": True,
    "context_dim": 5,
}
STEPS = torch.tensor([7, 912])


def separate_networks(num_units: int, width: int) -> nn.ModuleList:
    """The units' networks one by one, as the family's checkpoints have them."""
    sizes = ((1, 64), (64, 128), (128, width))
    return nn.ModuleList(
        nn.Sequential(nn.Linear(*sizes[0]), nn.ELU(), nn.Linear(*sizes[1]), nn.ELU(), nn.Linear(*sizes[2]))
        for _ in range(num_units)
    )


@torch.no_grad()
def test_encoder_figures_and_size():
    encoder = Encoder4(d=128, context_dim=16, latent_unit=20)
    assert sum(p.numel() for p in encoder.parameters()) == GOLDEN["n_params_enc"]
    fill(encoder)
    scalars = encoder.encoding(inp((2, 3, 64, 64)))
    assert_stat(scalars, GOLDEN["encdiff_encoding"])
    assert_stat(encoder.warp(scalars), GOLDEN["encdiff_tokens"])
    torch.testing.assert_close(encoder(inp((2, 3, 64, 64))), encoder.warp(scalars))
    torch.testing.assert_close(encoder.warp(scalars.unsqueeze(-1)), encoder.warp(scalars).view(2, 20, 16))


@torch.no_grad()
def test_unet_figure_and_size():
    unet = UNetModel(**UNET_CONFIG, use_spatial_transformer=True, context_dim=16, latent_unit=20)
    assert sum(p.numel() for p in unet.parameters()) == GOLDEN["n_params_unet"]
    tokens = inp((2, 320), 0.5)
    assert_stat(fill(unet)(inp((2, 3, 16, 16)), STEPS, [tokens]), GOLDEN["encdiff_unet"])


def test_encoder_has_the_layout_of_the_reference():
    shapes = {
        key: tuple(value.shape) for key, value in Encoder4(d=128, context_dim=16, latent_unit=20).state_dict().items()
    }
    backbone = {key: tuple(v.shape) for key, v in image.Encoder4(d=128, latent_dim=20).state_dict().items()}
    assert backbone.items() <= shapes.items()
    for unit in range(20):
        layers = [shapes.pop(f"net.{unit}.{layer}.{kind}") for layer in (0, 2, 4) for kind in ("weight", "bias")]
        assert layers == [(64, 1), (64,), (128, 64), (128,), (16, 128), (16,)]
    assert shapes.keys() == backbone.keys()


def test_units_in_one_product_are_the_units_one_by_one():
    torch.manual_seed(0)
    apart, together = separate_networks(3, 5), UnitTokens(3, 5)
    together.load_state_dict(apart.state_dict())
    scalars = torch.randn(4, 3, requires_grad=True)
    expected = torch.stack([net(scalars[:, unit : unit + 1]) for unit, net in enumerate(apart)], dim=1)
    torch.testing.assert_close(together(scalars), expected)
    same = torch.autograd.grad(together(scalars).square().sum(), scalars)[0]
    torch.testing.assert_close(same, torch.autograd.grad(expected.square().sum(), scalars)[0])
    for key, value in together.state_dict().items():
        assert torch.equal(value, apart.state_dict()[key])
    assert len(list(together.parameters())) == 6  # not 6 per unit: what an optimizer's time goes with


def test_weights_start_as_linear_layers_do():
    torch.manual_seed(0)
    state = UnitTokens(50, 16).state_dict()
    for layer, bound in ((0, 1.0), (2, 1 / 8), (4, 128**-0.5)):
        values = torch.stack([state[f"{unit}.{layer}.weight"] for unit in range(50)])
        assert values.abs().max() <= bound
        assert values.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)


def test_what_does_not_fit_is_named():
    tokens = UnitTokens(2, 5)
    state = tokens.state_dict()
    del state["1.2.bias"]
    state["2.0.bias"] = torch.zeros(64)
    found = tokens.load_state_dict(state, strict=False)
    assert (found.missing_keys, found.unexpected_keys) == (["1.2.bias"], ["2.0.bias"])
    with pytest.raises(RuntimeError, match=r"0\.4\.weight: expected shape \(5, 128\), got \(5, 64\)"):
        tokens.load_state_dict({**tokens.state_dict(), "0.4.weight": torch.zeros(5, 64)})
    with pytest.raises(ValueError, match="3 units"):
        Encoder4(d=8, context_dim=5, latent_unit=3, image_size=8).warp(torch.zeros(2, 4))


@pytest.mark.parametrize("size", [8, 16, 32, 128])
def test_other_image_sizes(size):
    encoder = Encoder4(d=8, context_dim=5, latent_unit=3, image_size=size, bn=False)
    assert encoder(torch.randn(2, 3, size, size)).shape == (2, 15)
    with pytest.raises(ValueError, match=f"{size}x{size}"):
        encoder(torch.randn(2, 3, size + 1, size))


@pytest.mark.parametrize("size", [4, 48, 33])
def test_sizes_that_do_not_halve(size):
    with pytest.raises(ConfigError, match="image_size"):
        Encoder4(d=8, context_dim=5, latent_unit=3, image_size=size)


def test_unet_takes_tokens_in_any_form_and_any_number():
    unet = fill(UNetModel(**TINY_UNET))
    x, tokens = inp((2, 4, 8, 8)), inp((2, 3, 5))
    expected = unet(x, STEPS, tokens)
    assert torch.equal(unet(x, STEPS, tokens.flatten(1)), expected)
    assert torch.equal(unet(x, STEPS, [tokens.flatten(1)]), expected)
    assert not torch.allclose(unet(x, STEPS, tokens[:, :1]), expected)


def test_self_attention_only_where_asked_for():
    everywhere = {key for key in UNetModel(**TINY_UNET).state_dict() if ".attn1." in key}
    inside = {key for key in UNetModel(**TINY_UNET, self_attention_resolutions=[2]).state_dict() if ".attn1." in key}
    assert inside < everywhere
    assert not any(key.startswith("input_blocks.1.") for key in inside)
    assert any(key.startswith("middle_block.1.") for key in inside)
    unet = fill(UNetModel(**TINY_UNET, self_attention_resolutions=[]))
    unet(inp((2, 4, 8, 8)), STEPS, inp((2, 3, 5))).square().mean().backward()
    assert all(parameter.grad is not None for parameter in unet.parameters())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_spatial_transformer": False, "context_dim": None}, "cross-attention"),
        ({"use_spatial_transformer": False, "context_dim": None, "self_attention_resolutions": [1]}, "self_attention"),
    ],
)
def test_unet_without_cross_attention(changes, words):
    with pytest.raises(ConfigError, match=words):
        UNetModel(**{**TINY_UNET, **changes})


def test_bfloat16():
    torch.manual_seed(0)
    encoder, unet = Encoder4(d=8, context_dim=5, latent_unit=3, image_size=16), UNetModel(**TINY_UNET)
    with torch.autocast("cpu", torch.bfloat16):
        out = unet(torch.randn(2, 4, 8, 8), STEPS, encoder(torch.randn(2, 3, 16, 16)))
    out.float().square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for module in (encoder, unet) for p in module.parameters())
