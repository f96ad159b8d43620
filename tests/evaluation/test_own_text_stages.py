"""Texts for a condition stage without a base class or contract of the package: sampling, guidance, dropout."""

from __future__ import annotations

import pytest
import torch
from condition_parts import TEXTS, OwnWords, Pictures, batch, data, diffusion, sampled, train
from golden_recipe import fill
from stand_ins import TINY_UNET, vq_config
from torch import nn

from ldm.config.loading import Config
from ldm.diffusion.samplers import DDIMSampler
from ldm.evaluation.sampling.job import SamplingJob
from ldm.evaluation.sampling.request import Request
from ldm.runs.load import LoadedRun
from ldm.util import ConfigError, UserError, instantiate_from_config

WORDS = {"conditioning_key": "crossattn", "cond_stage_key": "txt"}
DDIM = DDIMSampler(2)


class Called(OwnWords):
    """A stage without ``encode``, as ``forward`` alone."""

    encode = None

    def forward(self, texts):
        return OwnWords.encode(self, texts)


class Named(nn.Module):
    """A stage with a method of another name."""

    def __init__(self):
        super().__init__()
        self.words = OwnWords()

    def read(self, texts):
        return self.words.encode(texts)


class Uneven(nn.Module):
    """A stage that does not pad its texts."""

    def encode(self, texts):
        return torch.ones(len(texts), max(len(text) for text in texts), 8)


class Augmented(Pictures):
    """Pictures that draw a number when they are read."""

    def __getitem__(self, index):
        torch.rand(1)
        return super().__getitem__(index)


def build(stage="condition_parts.OwnWords", **params):
    torch.manual_seed(0)
    options = {**WORDS, "cond_stage_config": {"target": stage}, **params}
    model = instantiate_from_config(diffusion(unet=TEXTS, use_ema=False, **options)).eval()
    fill(model.model.diffusion_model)
    return model


def job(model, **options):
    run = LoadedRun(model, config=Config({}), checkpoint=None, folder=None)
    return SamplingJob(run, Request(**{"count": 2, "batch_size": 2, "sampler": DDIM, **options}))


def noise():
    torch.manual_seed(23)
    return torch.randn(2, 4, 8, 8)


@torch.no_grad()
@pytest.mark.parametrize(
    ("stage", "options"),
    [
        ("condition_parts.OwnWords", {}),
        ("condition_parts.OwnWords", {"cond_stage_trainable": True}),
        ("test_own_text_stages.Called", {}),
        ("test_own_text_stages.Named", {"cond_stage_forward": "read"}),
    ],
)
def test_guidance_is_relative_to_the_empty_text(stage, options):
    model = build(stage, **options)
    read = OwnWords().encode
    found = job(model, texts=(("a hill",),), guidance=3.0, size=None).samples()
    latent = model.sample(noise(), read(["a hill"] * 2), DDIM, guidance_scale=3.0, null=read([""] * 2))
    torch.testing.assert_close(found, model.decode_first_stage(latent).clamp(-1, 1))
    negative = job(model, texts=(("a hill",),), guidance=3.0, negative_text="a cube").samples()
    latent = model.sample(noise(), read(["a hill"] * 2), DDIM, guidance_scale=3.0, null=read(["a cube"] * 2))
    torch.testing.assert_close(negative, model.decode_first_stage(latent).clamp(-1, 1))
    assert (negative - found).abs().max() > 1e-4


def test_the_noise_does_not_depend_on_what_reading_the_data_draws():
    model, sections = build(), data()
    sections["params"]["validation"] = {"target": "test_own_text_stages.Augmented"}
    config = Config({"model": diffusion(), "data": sections})
    request = Request(count=2, batch_size=2, sampler=DDIM)
    _, x_T = next(SamplingJob(LoadedRun(model, config, None, None), request)._conditions())
    assert torch.equal(x_T, noise())


def test_dropped_texts_are_empty_in_training():
    model = build(cond_drop_prob=1.0).train()
    cond = model.condition_at(batch(), torch.zeros(2, dtype=torch.long))
    assert torch.equal(cond.value, OwnWords().encode(["", ""]))
    loss, _, _ = model.shared_step(batch())
    assert torch.isfinite(loss)
    assert torch.equal(model.eval().condition_at(batch(), torch.zeros(2)).value, OwnWords().encode(batch()["txt"]))


def test_texts_of_different_lengths_are_named():
    model = build("test_own_text_stages.Uneven")
    with pytest.raises(UserError, match=r"empty condition of shape \(6, 8\), .* got \(0, 8\)"):
        job(model, texts=(("a hill",),), guidance=2.0).samples()


@pytest.mark.parametrize(
    "stage",
    [
        {"target": "torch.nn.Identity"},
        {"target": "torch.nn.Flatten"},
        {"target": "ldm.modules.encoders.modules.SpatialRescaler"},
        {"target": "ldm.modules.encoders.modules.ClassEmbedder", "params": {"embed_dim": 8, "key": "class_label"}},
        "__is_first_stage__",
    ],
)
def test_stages_that_do_not_take_texts_are_named(stage):
    model = instantiate_from_config(diffusion(unet=TEXTS, **WORDS, cond_stage_config=stage))
    with pytest.raises(UserError, match="sampling from texts: expected a condition stage that encodes a list of texts"):
        job(model, texts=(("a hill",),))


def test_a_negative_text_needs_guidance_and_a_model_of_texts():
    with pytest.raises(ConfigError, match="--negative_text: expected a --guidance_scale other than 1"):
        Request(negative_text="a cube")
    with pytest.raises(ConfigError, match="--class: expected either --text or --class, got both"):
        Request(texts=(("a cube",),), classes=(1,))
    plain = instantiate_from_config(diffusion())
    with pytest.raises(UserError, match="--guidance_scale"):
        job(plain, negative_text="a cube", guidance=2.0)


def test_from_training_to_samples(tmp_path, capsys):
    model = diffusion(unet=TEXTS, **WORDS, cond_stage_config={"target": "condition_parts.OwnWords"}, cond_drop_prob=0.5)
    run = train(tmp_path, model, data(size=(32, 48)))
    texts = ["--text", "a hill", "--text", "a cube", "--guidance_scale", "2", "--negative_text", "blurred"]
    assert sampled(capsys, run, "-n", "4", *texts) == (4, 32, 48, 3)


@torch.no_grad()
def test_units_of_texts_sample_images_that_are_not_square():
    unet = {**TINY_UNET, "latent_unit": 6, "repre_emb_channels": 16, "seprate_decoder": True, "orth_emb": True}
    model = instantiate_from_config(
        {
            "target": "ldm.models.diffusion.methods.clip_disdiff.model.CLIPDisDiff",
            "params": {
                "image_size": [8, 12],
                "channels": 4,
                "timesteps": 10,
                "first_stage_config": vq_config(),
                "unet_config": {"target": "ldm.modules.diffusionmodules.openaimodel_shift.UNetModel", "params": unet},
                "cond_stage_config": {
                    "text_encoder": {"target": "stand_ins.HashedText"},
                    "image_encoder": {"target": "stand_ins.LinearImage"},
                },
            },
        }
    ).eval()
    texts = (("red floor", "", "", "", "cube", ""),)
    assert job(model, texts=texts).samples().shape == (2, 3, 32, 48)
    assert job(model, texts=texts, size=(48, 32)).samples().shape == (2, 3, 48, 32)
    swaps = job(model, texts=texts, swap=True, unit=0).swaps()
    assert swaps.images.shape == (4, 3, 32, 48)
