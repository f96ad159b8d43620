"""Samples of class- and text-conditional models, and guidance."""

import numpy as np
import pytest
import torch
from golden_recipe import fill
from stand_ins import TINY_UNET, vq_config

from ldm.config.loading import Config
from ldm.diffusion.samplers import DDIMSampler, DDPMSampler
from ldm.evaluation.sampling.job import SamplingJob
from ldm.evaluation.sampling.request import Request
from ldm.modules.encoders.tokenizer import WordTokenizer
from ldm.runs.load import LoadedRun
from ldm.util import UserError, instantiate_from_config

ENCODERS = "ldm.modules.encoders.modules"
DDIM = DDIMSampler(2)


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


def job(model, **options):
    run = LoadedRun(model, config=Config({}), checkpoint=None, folder=None)
    return SamplingJob(run, Request(**{"count": 3, "batch_size": 2, "sampler": DDIM, **options}))


def noise(count=3):
    torch.manual_seed(23)
    return torch.randn(count, 4, 8, 8)


def shown(model, latent):
    return model.decode_first_stage(latent).clamp(-1, 1)


def classes(model, *labels):
    return model.cond_stage_model.encode_classes(torch.tensor(labels))


@torch.no_grad()
def test_classes_are_used_in_turn(by_class):
    found = job(by_class, classes=(2, 0)).samples()
    expected = shown(by_class, by_class.sample(noise(), classes(by_class, 2, 0, 2), DDIM))
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)
    assert (found[1] - job(by_class, classes=(2,)).samples()[1]).abs().mean() > 1e-3


@torch.no_grad()
def test_the_last_class_is_the_null_class(by_class):
    found = job(by_class, classes=(1,), guidance=3.0)
    none, cond = (classes(by_class, *[label] * 3) for label in (3, 1))
    expected = shown(by_class, by_class.sample(noise(), cond, DDIM, guidance_scale=3.0, null=none))
    torch.testing.assert_close(found.samples(), expected, atol=1e-3, rtol=0)
    assert found.total_steps == 4  # one call of the network per step and batch


@torch.no_grad()
def test_texts_and_the_empty_text(by_text):
    found = job(by_text, texts=(("red cube",),), guidance=4.0).samples()
    stage = by_text.cond_stage_model
    cond, none = stage.encode_texts(["red cube"] * 3), stage.encode_texts([""] * 3)
    expected = shown(by_text, by_text.sample(noise(), cond, DDIM, guidance_scale=4.0, null=none))
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)
    vanilla = job(by_text, texts=(("red cube",),), guidance=4.0, sampler=DDPMSampler(), count=1).samples()
    assert np.isfinite(vanilla.numpy()).all()


@torch.no_grad()
def test_without_data_classes_are_drawn_and_the_text_is_empty(by_class, by_text):
    """LDM's cin256-v2.yaml and txt2img-1p4B-eval.yaml have no ``data``."""
    drawn = job(by_class)
    assert len(set(drawn.source.given)) > 1 and set(drawn.source.given) <= {0, 1, 2}
    torch.testing.assert_close(drawn.samples(), job(by_class, classes=tuple(drawn.source.given)).samples())
    torch.testing.assert_close(job(by_text).samples(), job(by_text, texts=(("",),)).samples())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"texts": (("red",),)}, "sampling from texts: expected a condition stage that encodes a list of texts"),
        ({"classes": (4,)}, "expected 0 to 3, got .*4"),
        ({"unit": 0}, "--unit: .* a condition without units"),
    ],
)
def test_options_that_do_not_fit_a_model_of_classes(by_class, options, message):
    with pytest.raises(UserError, match=message):
        job(by_class, **options)


def test_options_that_do_not_fit_a_model_of_tokens():
    params = {"n_embed": 6, "n_layer": 1, "vocab_size": 30, "max_seq_len": 5, "use_tokenizer": False}
    model = build({"target": f"{ENCODERS}.BERTEmbedder", "params": params}, cond_stage_key="objects_bbox")
    with pytest.raises(UserError, match="sampling from texts: expected a condition stage that encodes a list of texts"):
        job(model, texts=(("red",),))
    with pytest.raises(UserError, match="without units, but the config has no `data`"):
        job(model)
    model.model.conditioning_key = "hybrid"
    with pytest.raises(UserError, match="with maps of the data, but the config has no `data`"):
        job(model)


def test_options_that_do_not_fit_a_model_of_texts(by_text):
    with pytest.raises(UserError, match="sampling from classes: expected"):
        job(by_text, classes=(1,))
    with pytest.raises(UserError, match="one text per sample"):
        job(by_text, texts=(("red", "cube"),))
