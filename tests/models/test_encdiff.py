"""EncDiff: what trains, what units do to images, pictures, errors."""

from __future__ import annotations

import pytest
import torch
from stand_ins import TINY_UNET, vq_config

from ldm.diffusion.samplers import DDIMSampler
from ldm.models.diffusion.methods.encdiff.attention import CrossAttentionMaps, light_up
from ldm.models.diffusion.methods.encdiff.model import EncDiff
from ldm.models.diffusion.traversal import traversed_codes, unit_captions, unit_path
from ldm.util import ConfigError, instantiate_from_config

MODULE = "ldm.modules.diffusionmodules.openaimodel_enc"
ENCODER = {"target": f"{MODULE}.Encoder4", "params": {"d": 8, "context_dim": 5, "latent_unit": 3, "image_size": 32}}
UNITS = {"use_spatial_transformer": True, "context_dim": 5, "latent_unit": 3, "attention_resolutions": [1, 2]}
UNET = {"target": f"{MODULE}.UNetModel", "params": {**TINY_UNET, **UNITS}}


def build(**params):
    torch.manual_seed(0)
    defaults = {"image_size": 8, "channels": 4, "timesteps": 20, "monitor": None}
    return EncDiff(
        first_stage_config=vq_config(), **{"unet_config": UNET, "cond_stage_config": ENCODER, **defaults, **params}
    )


def wake_up(model):
    """Give the layers that start at zero weights, so that units change images."""
    torch.manual_seed(1)
    for parameter in model.model.parameters():
        if parameter.abs().sum() == 0:
            torch.nn.init.normal_(parameter, std=0.1)
    if model.use_ema:
        model.model_ema.restart(model.model)
    return model.eval()


def batch(count=4, size=32):
    generator = torch.Generator().manual_seed(1)
    return {"image": torch.randint(0, 256, (count, size, size, 3), generator=generator, dtype=torch.uint8)}


def images(count=4):
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(2)) * 2 - 1


def test_gradients_reach_encoder_and_network_and_nothing_else():
    model = wake_up(build()).train()
    loss, _, _ = model.shared_step(batch())
    loss.backward()
    trained = {id(parameter) for parameter in model.trained_parameters()}
    for name, parameter in model.named_parameters():
        is_trained = name.startswith(("model.", "cond_stage_model."))
        assert (id(parameter) in trained) == is_trained == parameter.requires_grad, name
        if is_trained:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    assert not model.first_stage_model.training


def test_a_frozen_encoder_is_not_trained():
    model = build(cond_stage_trainable=False)
    trained = {id(parameter) for parameter in model.trained_parameters()}
    assert not trained & {id(parameter) for parameter in model.cond_stage_model.parameters()}


def test_units_are_scalars_in_full_precision():
    model = build().eval()
    expected = model.encode_units(images())
    with torch.autocast("cpu", torch.bfloat16):
        codes = model.encode_units(images())
    assert codes.shape == (4, model.latent_unit) and codes.dtype == torch.float32
    assert torch.equal(codes, expected)
    assert torch.equal(model.test_step(batch(), 0), model.encode_representation(batch()))


def test_a_unit_changes_the_image_and_the_noise_does_not_move():
    model = wake_up(build())
    codes, x_T = model.encode_units(images()), torch.randn(4, *model.latent_shape)
    before = model.decode_units(codes, x_T, sampler=DDIMSampler(3))
    assert before.shape == (4, 3, 32, 32) and before.abs().max() <= 1
    assert torch.equal(before, model.decode_units(codes, x_T, sampler=DDIMSampler(3)))
    codes[:2, 1] += 3.0
    after = model.decode_units(codes, x_T, sampler=DDIMSampler(3))
    assert not torch.allclose(before[:2], after[:2])
    torch.testing.assert_close(before[2:], after[2:])


def test_only_one_unit_is_attended_to():
    model = wake_up(build())
    codes, x_T = model.encode_units(images(2)), torch.randn(2, *model.latent_shape)
    only = torch.tensor([0, 2])
    alone = model.decode_units(codes, x_T, sampler=DDIMSampler(3), only=only)
    others = codes + 1.0
    others[[0, 1], only] = codes[[0, 1], only]
    torch.testing.assert_close(model.decode_units(others, x_T, sampler=DDIMSampler(3), only=only), alone)


def test_state_dict_goes_round_and_has_the_family_s_keys():
    model = build(scale_by_std=True)
    state = model.state_dict()
    assert {"cond_stage_model.encoder.0.weight", "cond_stage_model.net.2.4.bias", "scale_factor"} <= set(state)
    assert "model_ema.diffusion_modeltime_embed0weight" in state
    other = wake_up(build(scale_by_std=True))
    other.load_state_dict(state)
    torch.testing.assert_close(other.encode_units(images()), model.eval().encode_units(images()))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"eval_name": "shapes3"}, "shapes3d"),
        ({"cond_stage_config": {**ENCODER, "params": {**ENCODER["params"], "latent_unit": 4}}}, "latent_unit"),
        ({"cond_stage_config": {**ENCODER, "params": {**ENCODER["params"], "context_dim": 4}}}, "context_dim"),
        ({"cond_stage_config": {"target": "ldm.modules.encoders.modules.Encoder4", "params": {"d": 8}}}, "Encoder4"),
    ],
)
def test_what_cannot_be_is_said(changes, words):
    with pytest.raises(ConfigError, match=words):
        build(**changes)


def test_pictures():
    model = wake_up(build())
    model.unit_names = ["floor_hue", "", "shape"]
    pictures = model.log_images(batch(4), N=2, ddim_steps=2, points=3)
    assert {"inputs", "reconstruction", "samples", "samples_swapping", "traversals", "attention"} == set(pictures)
    swaps, traversals, attention = (pictures[key] for key in ("samples_swapping", "traversals", "attention"))
    assert swaps.rows[2:] == traversals.rows == ["unit 1: floor hue", "unit 2", "unit 3: shape"]
    assert len(swaps.images) == len(swaps.rows) * 2
    assert len(traversals.images) == 3 * 3
    assert len(attention.images) == 2 * 4 and attention.columns[1].startswith("unit 1: floor hue\n")
    shares = [int(column.rpartition("\n")[2].rstrip("%")) for column in attention.columns[1:]]
    assert sum(shares) == pytest.approx(100, abs=2)
    assert list(model.log_images(batch(4), N=2, ddim_steps=2, return_keys=["attention"])) == ["attention"]
    other = build(image_size=16).eval().log_images(batch(4), N=2, ddim_steps=2, points=3)  # latents are 8 x 8
    assert other["attention"].images.shape == attention.images.shape
    few = model.log_images(
        batch(4),
        N=2,
        ddim_steps=2,
        plot_swapped_concepts=False,
        plot_traversals=False,
        plot_attention=False,
        plot_diffusion_rows=True,
    )
    assert set(few) == {"inputs", "reconstruction", "samples", "diffusion_row"}


def test_attention_maps_are_those_of_the_layers():
    """One layer, attention by hand."""
    from ldm.modules.attention import SpatialTransformer

    torch.manual_seed(0)
    layer = SpatialTransformer(32, num_heads=2, dim_head=16, context_dim=5, use_self_attention=False)
    x, context = torch.randn(2, 32, 4, 4), torch.randn(2, 3, 5)
    with CrossAttentionMaps(layer, (4, 4)) as maps:
        expected = layer(x, context)
    torch.testing.assert_close(layer(x, context), expected)  # watching changes nothing, and has ended
    block = layer.transformer_blocks[0]
    queries = block.attn2.to_q(block.norm2(layer.proj_in(layer.norm(x)).flatten(2).transpose(1, 2)))
    keys = block.attn2.to_k(context)
    by_head = [
        torch.softmax(q @ k.transpose(1, 2) / 4.0, dim=-1) for q, k in zip(queries.split(16, 2), keys.split(16, 2))
    ]
    weights = torch.stack(by_head).mean(dim=0).transpose(1, 2).unflatten(2, (4, 4))
    torch.testing.assert_close(maps.mean(), weights)
    torch.testing.assert_close(maps.mean().sum(dim=1), torch.ones(2, 4, 4))
    with pytest.raises(RuntimeError, match="within the context"):
        CrossAttentionMaps(layer, (4, 4)).mean()


def test_light_falls_where_the_map_is_high():
    white = torch.ones(1, 3, 4, 4)
    spot = torch.zeros(1, 4, 4)
    spot[0, 1, 2] = 0.01
    lit = light_up(white, spot, floor=0.25)
    assert lit[0, 0, 1, 2] == 1.0
    assert lit[0, 0, 3, 0] == pytest.approx(-0.5)


def test_path_of_a_scalar_and_of_a_vector():
    codes = torch.linspace(-1, 1, 101).unsqueeze(1).repeat(1, 2)
    path = unit_path(codes, 1, 5)
    torch.testing.assert_close(path, torch.linspace(-0.96, 0.96, 5))
    direction = torch.tensor([0.6, -0.8])
    vectors = torch.stack([torch.zeros(101, 2), codes[:, :1] * direction + 1.0], dim=1)
    torch.testing.assert_close(unit_path(vectors, 1, 3)[[0, 2]], 1.0 + torch.tensor([[0.96], [-0.96]]) * direction)
    moved = traversed_codes(vectors[:2], unit_path(vectors, 1, 3), 1)
    assert moved.shape == (6, 2, 2)
    assert torch.equal(moved[:3, 1], moved[3:, 1]) and torch.equal(moved[0, 0], vectors[0, 0])


def test_captions_without_names():
    assert unit_captions(build(), [0, 2]) == ["unit 1", "unit 3"]


def test_config_builds_it():
    config = {
        "target": "ldm.models.diffusion.methods.encdiff.model.EncDiff",
        "params": {
            "first_stage_config": vq_config(),
            "unet_config": UNET,
            "cond_stage_config": ENCODER,
            "image_size": 8,
            "channels": 4,
            "timesteps": 20,
            "eval_name": "shapes3d",
        },
    }
    assert instantiate_from_config(config).eval_space.num_factors == 6
