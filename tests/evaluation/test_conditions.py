"""Samples of class- and text-conditional models: what is asked for, and guidance towards it."""

import numpy as np
import pytest
import torch
from golden_recipe import fill
from stand_ins import TINY_UNET, vq_config

from ldm.evaluation.sampling.conditions import Request
from ldm.evaluation.sampling.job import Sampler
from ldm.modules.encoders.tokenizer import WordTokenizer
from ldm.runs.load import Trained
from ldm.util import UserError, instantiate_from_config

ENCODERS = "ldm.modules.encoders.modules"


def build(stage, **params):
    torch.manual_seed(0)
    model = instantiate_from_config(
        {
            "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
            "params": {
                "image_size": 8,
                "channels": 4,
                "timesteps": 20,
                "first_stage_config": vq_config(),
                "use_ema": False,
                "conditioning_key": "crossattn",
                "cond_stage_config": stage,
                **params,
                "unet_config": {
                    "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
                    "params": {**TINY_UNET, "use_spatial_transformer": True, "context_dim": 6},
                },
            },
        }
    ).eval()
    fill(model.model.diffusion_model)
    fill(model.first_stage_model)
    return model


@pytest.fixture
def by_class():
    stage = {"target": f"{ENCODERS}.ClassEmbedder", "params": {"embed_dim": 6, "n_classes": 4, "key": "class_label"}}
    model = build(stage, cond_stage_key="class_label")
    model.cond_stage_model.embedding.weight.data.mul_(20)
    return model


@pytest.fixture
def by_text(tmp_path):
    WordTokenizer(["red", "blue", "cube"], context_length=20).save(tmp_path / "words.json")
    params = {"n_embed": 6, "n_layer": 1, "vocab_size": 30, "max_seq_len": 5, "tokenizer": str(tmp_path)}
    return build({"target": f"{ENCODERS}.BERTEmbedder", "params": params}, cond_stage_key="caption")


def sampler(model, **options):
    trained = Trained(model, config=None, checkpoint=None, folder=None)
    return Sampler(trained, Request(**{"count": 3, "batch_size": 2, "num_steps": 2, "eta": 0.0, **options}))


def noise(count=3):
    torch.manual_seed(23)
    return torch.randn(count, 4, 8, 8)


def shown(model, latent):
    return model.decode_first_stage(latent).clamp(-1, 1)


@torch.no_grad()
def test_classes_are_taken_in_turn(by_class):
    found = sampler(by_class, classes=(2, 0)).samples()
    cond = by_class.cond_stage_model(torch.tensor([2, 0, 2]))
    torch.testing.assert_close(found, shown(by_class, by_class.sample(noise(), cond, 2, 0.0)), atol=1e-3, rtol=0)
    assert (found[1] - sampler(by_class, classes=(2,)).samples()[1]).abs().mean() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("parameterization", ["eps", "x0"])
def test_guidance_goes_beyond_the_condition_by_its_scale(by_class, parameterization):
    model, t = by_class, torch.tensor([5, 5])
    model.parameterization = parameterization
    x, none, cond = noise(2), *(model.cond_stage_model(torch.tensor([label] * 2)) for label in (3, 1))
    at_none, at_cond = (model.denoiser(one)(x, t) for one in (none, cond))
    for scale in (0.0, 1.0, 3.0):
        guided = model.denoiser(cond, unconditional_guidance_scale=scale, unconditional_conditioning=none)(x, t)
        torch.testing.assert_close(guided, at_none + scale * (at_cond - at_none), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(at_none, at_cond, atol=1e-3)


@torch.no_grad()
def test_the_last_class_is_no_class(by_class):
    found = sampler(by_class, classes=(1,), guidance=3.0)
    none, cond = (by_class.cond_stage_model(torch.tensor([label] * 3)) for label in (3, 1))
    guidance = {"unconditional_guidance_scale": 3.0, "unconditional_conditioning": none}
    expected = shown(by_class, by_class.sample(noise(), cond, 2, 0.0, **guidance))
    torch.testing.assert_close(found.samples(), expected, atol=1e-3, rtol=0)
    assert found.total_steps == 4  # one call of the network per step and batch


@torch.no_grad()
def test_texts_and_the_empty_text(by_text):
    found = sampler(by_text, texts=(("red cube",),), guidance=4.0).samples()
    stage = by_text.cond_stage_model
    guidance = {"unconditional_guidance_scale": 4.0, "unconditional_conditioning": stage([""] * 3)}
    expected = shown(by_text, by_text.sample(noise(), stage(["red cube"] * 3), 2, 0.0, **guidance))
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)
    vanilla = sampler(by_text, texts=(("red cube",),), guidance=4.0, num_steps=None, count=1).samples()
    assert np.isfinite(vanilla.numpy()).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"texts": (("red",),)}, "does not sample from texts"),
        ({"classes": (4,)}, "--class 4: the model knows 0 to 3"),
        ({"unit": 0}, "has no units"),
    ],
)
def test_what_a_model_of_classes_cannot_do(by_class, options, message):
    with pytest.raises(UserError, match=message):
        sampler(by_class, **options)


def test_what_a_model_of_tokens_cannot_do():
    params = {"n_embed": 6, "n_layer": 1, "vocab_size": 30, "max_seq_len": 5, "use_tokenizer": False}
    model = build({"target": f"{ENCODERS}.BERTEmbedder", "params": params}, cond_stage_key="objects_bbox")
    with pytest.raises(UserError, match="does not sample from texts"):
        sampler(model, texts=(("red",),))
    with pytest.raises(UserError, match="no condition on texts or classes"):
        sampler(model, guidance=2.0)


def test_what_a_model_of_texts_cannot_do(by_text):
    with pytest.raises(UserError, match="does not sample from classes"):
        sampler(by_text, classes=(1,))
    with pytest.raises(UserError, match="one text per sample"):
        sampler(by_text, texts=(("red", "cube"),))
    with pytest.raises(UserError, match="one tensor"):
        by_text.denoiser([torch.zeros(1)], unconditional_guidance_scale=2.0, unconditional_conditioning=torch.zeros(1))
