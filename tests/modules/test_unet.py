"""The U-Net: reference figures, layout, options and errors."""

from __future__ import annotations

import pytest
import torch
from golden_recipe import UNET_CONFIG, assert_stat, fill, inp, load_golden
from stand_ins import PLAIN_UNET

from ldm.modules.attention import SpatialTransformer
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.modules.diffusionmodules.util import timestep_embedding
from ldm.util import ConfigError, UserError

GOLDEN = load_golden("modules")
STEPS = torch.tensor([7, 912])


def predict(**changes):
    unet = fill(UNetModel(**{**PLAIN_UNET, **changes}))
    return unet, unet(inp((2, 4, 8, 8)), STEPS)


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_timestep_embedding_figure():
    assert_stat(timestep_embedding(STEPS, 64), GOLDEN["timestep_embedding_64"])
    assert timestep_embedding(STEPS, 5).shape == (2, 5)


def test_unet_figure_and_size():
    unet = UNetModel(**UNET_CONFIG)
    assert count(unet) == 29_422_467
    with torch.no_grad():
        assert_stat(fill(unet)(inp((2, 3, 16, 16)), STEPS), GOLDEN["unet"])


def test_cross_attention_unet_figure_and_size():
    unet = UNetModel(**UNET_CONFIG, use_spatial_transformer=True, context_dim=16)
    assert count(unet) == GOLDEN["encdiff"]["n_params_unet"]
    tokens = inp((2, 320), 0.5).view(2, 20, 16)
    with torch.no_grad():
        assert_stat(fill(unet)(inp((2, 3, 16, 16)), STEPS, tokens), GOLDEN["encdiff"]["encdiff_unet"])


@pytest.mark.parametrize(
    "changes",
    [
        {"resblock_updown": True},
        {"use_scale_shift_norm": True},
        {"use_new_attention_order": True},
        {"conv_resample": False},
        {"num_heads": -1, "num_head_channels": 16},
        {"num_heads_upsample": 2},
        {"channel_mult": [1, 1, 2], "num_res_blocks": 2, "attention_resolutions": [1, 4]},
        {"channel_mult": [2, 3]},
        {"legacy": False, "num_heads_upsample": 2},
    ],
)
def test_variants_train(changes):
    unet, out = predict(**changes)
    assert out.shape == (2, 4, 8, 8)
    out.square().mean().backward()
    assert all(parameter.grad is not None for parameter in unet.parameters())


def test_attention_layouts_differ():
    assert not torch.allclose(predict()[1], predict(use_new_attention_order=True)[1])
    assert not torch.allclose(predict()[1], predict(num_heads_upsample=2)[1])
    assert torch.equal(predict(legacy=False)[1], predict(legacy=False, num_heads_upsample=2)[1])


def test_checkpointing_changes_no_gradient():
    plain, out = predict()
    recomputed, same_out = predict(use_checkpoint=True)
    out.sum().backward()
    same_out.sum().backward()
    for parameter, twin in zip(plain.parameters(), recomputed.parameters()):
        torch.testing.assert_close(parameter.grad, twin.grad)


def test_class_labels():
    unet = fill(UNetModel(**PLAIN_UNET, num_classes=3))
    x = inp((2, 4, 8, 8))
    assert not torch.equal(unet(x, STEPS, y=torch.tensor([0, 1])), unet(x, STEPS, y=torch.tensor([2, 1])))
    with pytest.raises(UserError, match=r"integer labels y of shape \(2,\), got none"):
        unet(x, STEPS)
    with pytest.raises(UserError, match=r"got torch.float32 of shape \(2, 3\)"):
        unet(x, STEPS, y=torch.zeros(2, 3))
    with pytest.raises(UserError, match="num_classes is not set"):
        predict()[0](x, STEPS, y=torch.tensor([0, 1]))


def test_float_vectors_enter_beside_the_timestep():
    """The key layout is that of Stable Diffusion 2.1 unclip."""
    unet = fill(UNetModel(**PLAIN_UNET, num_classes="sequential", adm_in_channels=5))
    shapes = {name: tuple(p.shape) for name, p in unet.named_parameters() if name.startswith("label_emb")}
    assert shapes == {
        "label_emb.0.0.weight": (128, 5),
        "label_emb.0.0.bias": (128,),
        "label_emb.0.2.weight": (128, 128),
        "label_emb.0.2.bias": (128,),
    }
    x, y = inp((2, 4, 8, 8)), inp((2, 5), 0.4).double().requires_grad_()
    _, _, embedding = unet.encode(x, STEPS, y=y)
    expected = unet.time_embed(timestep_embedding(STEPS, 32)) + unet.label_emb(y.float())
    torch.testing.assert_close(embedding, expected)
    unet(x, STEPS, y=y).square().mean().backward()
    assert y.grad.any() and unet.label_emb[0][0].weight.grad.any()
    for wrong in (torch.zeros(2, 4), torch.zeros(2, 5, dtype=torch.long), torch.tensor([0, 1]), None):
        with pytest.raises(UserError, match=r"expected float vectors y of shape \(2, 5\)"):
            unet(x, STEPS, y=wrong)


@pytest.mark.parametrize(
    "params", [{"num_classes": "sequential"}, {"num_classes": 3, "adm_in_channels": 5}, {"num_classes": "words"}]
)
def test_float_vectors_need_their_width(params):
    with pytest.raises(ConfigError, match="unet_config.params.num_classes.*adm_in_channels"):
        UNetModel(**PLAIN_UNET, **params)


def test_code_prediction_head():
    assert predict(n_embed=11)[1].shape == (2, 11, 8, 8)


@pytest.mark.parametrize("dims", [1, 3])
def test_other_dimensions(dims):
    unet = UNetModel(**{**PLAIN_UNET, "in_channels": 2, "out_channels": 2}, dims=dims)
    x = torch.randn(2, 2, *[8] * dims)
    assert unet(x, STEPS).shape == x.shape


def test_bfloat16_stays_close():
    unet, out = predict(use_scale_shift_norm=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = unet(inp((2, 4, 8, 8)), STEPS)
    assert (half.float() - out).norm() < 0.05 * out.norm()


def test_single_token_context():
    layer = fill(SpatialTransformer(32, 4, 8, context_dim=6))
    x, token = inp((2, 32, 4, 4)), inp((2, 6))
    assert torch.equal(layer(x, token), layer(x, token[:, None]))


def test_config_errors_name_the_key(caplog):
    with pytest.raises(ConfigError, match="num_head_channels"):
        UNetModel(**{**PLAIN_UNET, "num_heads": -1})
    with pytest.raises(ConfigError, match="context_dim"):
        UNetModel(**PLAIN_UNET, use_spatial_transformer=True)
    with pytest.raises(ConfigError, match="multiple of 32"):
        UNetModel(**{**PLAIN_UNET, "model_channels": 24})
    with pytest.raises(ConfigError, match="5 heads"):
        UNetModel(**{**PLAIN_UNET, "num_heads": 5})
    with pytest.raises(ConfigError, match="num_hedas"):
        UNetModel(**PLAIN_UNET, num_hedas=4)
    with pytest.raises(ConfigError, match="dims: expected 1, 2, 3, got 4"):
        UNetModel(**PLAIN_UNET, dims=4)
    UNetModel(**PLAIN_UNET, use_fp16=True)
    assert "use_fp16" in caplog.text
