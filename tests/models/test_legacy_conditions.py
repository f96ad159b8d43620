"""LDM's conditional families: labels, texts, images on the channels, and how a condition reaches the network."""

from __future__ import annotations

import pytest
import torch
from golden_recipe import fill
from stand_ins import TINY_UNET, vq_config
from torch import nn

from ldm.diffusion.samplers import DDIMSampler
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.encoders.tokenizer import WordTokenizer
from ldm.pictures.grid import CaptionedGrid
from ldm.util import ConfigError, instantiate_from_config

ENCODERS = "ldm.modules.encoders.modules"
CROSS = {"use_spatial_transformer": True, "context_dim": 6}


class BothWays(nn.Module):
    """A condition stage for the hybrid key: a map for the channels, a sequence for attention."""

    def forward(self, value):
        return {"c_concat": [value], "c_crossattn": [value.flatten(2).transpose(1, 2)[..., :2].repeat(1, 1, 3)]}


def config(stage, unet=None, **params):
    defaults = {"image_size": 8, "channels": 4, "timesteps": 10, "monitor": None, "first_stage_config": vq_config()}
    network = {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": {**TINY_UNET, **(unet or {})}}
    return {
        "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
        "params": {**defaults, "unet_config": network, "cond_stage_config": stage, **params},
    }


def item(index):
    generator = torch.Generator().manual_seed(index)
    return {
        "image": torch.randint(0, 256, (32, 32, 3), generator=generator, dtype=torch.uint8),
        "LR_image": torch.randint(0, 256, (8, 8, 3), generator=generator, dtype=torch.uint8),
        "segmentation": torch.rand(32, 32, 5, generator=generator),
        "class_label": index % 3,
        "caption": ("red cube", "blue cube")[index % 2],
        "coordinates_bbox": torch.arange(4) + index,
        "depth": torch.rand(8, 8, generator=generator),
    }


def collate(items):
    stacked = {key: [one[key] for one in items] for key in items[0]}
    return {
        key: torch.stack(values)
        if isinstance(values[0], torch.Tensor)
        else torch.tensor(values)
        if isinstance(values[0], int)
        else values
        for key, values in stacked.items()
    }


BATCH = collate([item(index) for index in range(2)])
SR = {"in_channels": 7, "out_channels": 4}
BERT = {"n_embed": 6, "n_layer": 1, "vocab_size": 30, "max_seq_len": 5}
FAMILIES = {
    "class": (
        {"target": f"{ENCODERS}.ClassEmbedder", "params": {"embed_dim": 6, "n_classes": 3, "key": "class_label"}},
        CROSS,
        {"cond_stage_key": "class_label", "conditioning_key": "crossattn", "cond_stage_trainable": True},
    ),
    "label": (
        {"target": "torch.nn.Identity"},
        {"num_classes": 3},
        {"cond_stage_key": "class_label", "conditioning_key": "adm"},
    ),
    "text": (
        {"target": f"{ENCODERS}.BERTEmbedder", "params": {**BERT, "tokenizer": "WORDS"}},
        CROSS,
        {"cond_stage_key": "caption", "conditioning_key": "crossattn", "cond_stage_trainable": True},
    ),
    "layout": (
        {"target": f"{ENCODERS}.BERTEmbedder", "params": {**BERT, "use_tokenizer": False}},
        CROSS,
        {"cond_stage_key": "coordinates_bbox", "conditioning_key": "crossattn", "cond_stage_trainable": True},
    ),
    "super-resolution": ({"target": "torch.nn.Identity"}, SR, {"cond_stage_key": "LR_image", "concat_mode": True}),
    "segmentation": (
        {"target": f"{ENCODERS}.SpatialRescaler", "params": {"n_stages": 2, "in_channels": 5, "out_channels": 3}},
        SR,
        {"cond_stage_key": "segmentation", "concat_mode": True, "cond_stage_trainable": True},
    ),
    "map": ({"target": "torch.nn.Identity"}, {"in_channels": 5}, {"cond_stage_key": "depth"}),
    "first stage": ("__is_first_stage__", {"in_channels": 8}, {"cond_stage_key": "image", "concat_mode": True}),
    "hybrid": (
        {"target": "test_legacy_conditions.BothWays"},
        {"in_channels": 7, **CROSS},
        {"cond_stage_key": "LR_image", "conditioning_key": "hybrid"},
    ),
}


@pytest.fixture
def words(tmp_path):
    WordTokenizer(["red", "blue", "cube"], context_length=20).save(tmp_path / "words.json")
    return str(tmp_path)


def build(name, words, **more):
    torch.manual_seed(0)
    stage, unet, params = FAMILIES[name]
    if isinstance(stage, dict) and stage.get("params", {}).get("tokenizer") == "WORDS":
        stage = {**stage, "params": {**stage["params"], "tokenizer": words}}
    return instantiate_from_config(config(stage, unet, **{**params, **more}))


@pytest.mark.parametrize("name", FAMILIES)
def test_legacy_conditional_models_train_and_sample(name, words):
    model = build(name, words).train()
    assert type(model) is LatentDiffusion
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = model.configure_optimizers()
    for _ in range(2):
        loss, _, _ = model.shared_step(BATCH)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {key for key, value in model.state_dict().items() if not torch.equal(before[key], value)}
    assert any(key.startswith("model.diffusion_model") for key in moved)
    assert not any(key.startswith("first_stage_model") for key in moved)
    trained = any(key.startswith("cond_stage_model") for key in moved)
    assert trained == (model.cond_stage_trainable and any(True for _ in model.cond_stage_model.parameters()))
    model.eval()
    sample = model.sample(torch.randn(2, 4, 8, 8), model.get_condition(BATCH), sampler=DDIMSampler(2, eta=1.0))
    assert sample.shape == (2, 4, 8, 8) and torch.isfinite(sample).all()


@pytest.mark.parametrize("name", ["class", "label", "text", "super-resolution", "segmentation", "hybrid"])
def test_the_condition_matters(name, words):
    model = build(name, words).eval()
    fill(model.model.diffusion_model)  # as it is built, the zeros at the ends of branches would hide it
    x, t = torch.randn(1, 4, 8, 8).expand(2, -1, -1, -1), torch.tensor([5, 5])
    with torch.no_grad():
        first, second = model.apply_model(x, t, model.get_condition(BATCH))
    assert not torch.allclose(first, second, atol=1e-5)


def test_pictures_show_what_was_asked_for(words):
    options = {"ddim_steps": 2, "inpaint": False, "plot_diffusion_rows": False, "plot_progressive_rows": False}
    text = build("text", words).eval().log_images(BATCH, N=2, plot_swapped_concepts=True, **options)["conditioning"]
    assert isinstance(text, CaptionedGrid)
    assert text.rows == ["red cube", "blue cube"] and len(text.images) == 4
    small = build("super-resolution", words).eval().log_images(BATCH, N=2, **options)
    assert small["conditioning"].shape == (2, 3, 8, 8)
    labels = build("class", words).eval().log_images(BATCH, N=1, **options)["conditioning"]
    assert labels.rows == ["0"]
    named = {**BATCH, "human_label": ["cat", "dog"]}
    assert build("class", words).eval().log_images(named, N=2, **options)["conditioning"].rows == ["cat", "dog"]
    text = build("text", words).eval().log_images(named, N=2, **options)["conditioning"]
    assert text.rows == ["red cube", "blue cube"]  # the texts of a model of texts, even beside labels
    maps = build("segmentation", words).eval().log_images(BATCH, N=2, **options)["conditioning"]
    again = build("segmentation", words).eval().log_images(BATCH, N=2, **options)["conditioning"]
    assert maps.shape == (2, 3, 32, 32) and torch.equal(maps, again)
    assert maps.min() == -1 and maps.max() == 1
    only = build("class", words).eval().log_images(BATCH, N=1, return_keys=["samples"], **options)
    assert set(only) == {"samples"}


def test_unknown_options_of_pictures_are_named(words):
    with pytest.raises(ConfigError, match="'plot_diffusion_row'.*'plot_diffusion_rows'"):
        build("class", words).log_images(BATCH, plot_diffusion_row=True)


def test_noised_conditions(words):
    model = build("class", words, num_timesteps_cond=3)
    assert model.cond_timesteps.tolist() == [0, 4, 9, *[9] * 7]
    torch.manual_seed(1)
    noisy = model.condition_at(BATCH, torch.tensor([0, 9])).value
    clean = model.get_condition(BATCH).value
    near, far = ((noisy - clean).flatten(1).norm(dim=1) / clean.flatten(1).norm(dim=1)).tolist()
    assert 0 < near < far
    assert torch.equal(build("class", words).condition_at(BATCH, torch.tensor([0, 9])).value, clean)
    with pytest.raises(ConfigError, match="num_timesteps_cond.*got 11"):
        build("class", words, num_timesteps_cond=11)
    with pytest.raises(ConfigError, match="one float tensor"):
        build("label", words, num_timesteps_cond=2).condition_at(BATCH, torch.tensor([0, 9]))


def test_a_method_that_the_stage_has_not(words):
    with pytest.raises(ConfigError, match="method of ClassEmbedder, got 'embed'"):
        build("class", words, cond_stage_forward="embed").get_condition(BATCH)
