"""CLIP text embedder with one vector for each phrase (``max_phrases``), the condition of the small text models."""

from __future__ import annotations

import pytest
import torch
from legacy_configs import save_clip

from ldm.diffusion.conditions import as_condition
from ldm.diffusion.guidance import classifier_free
from ldm.modules.encoders.modules import FrozenCLIPTextEmbedder
from ldm.util import ConfigError, UserError, instantiate_from_config

TARGET = "ldm.modules.encoders.modules.FrozenCLIPTextEmbedder"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("clip") / "clip")


@pytest.fixture
def phrases(folder):
    return FrozenCLIPTextEmbedder(str(folder), max_phrases=3)


@pytest.fixture(scope="module")
def plain(folder):
    return FrozenCLIPTextEmbedder(str(folder))


def test_a_vector_for_each_phrase_and_zeros_for_missing_ones(phrases, plain):
    found = phrases(["a red cube, a blue wall", "a red cube", "", "a, cube, red"])
    assert found.shape == (4, 3, plain.width) and found.dtype == torch.float32
    single = plain(["a red cube", "a blue wall", "", "a", "cube", "red"])
    expected = torch.stack([single[[0, 1, 2]], single[[0, 2, 2]], single[[2, 2, 2]], single[[3, 4, 5]]])
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert not found[1, 1:].any() and not found[2].any()
    torch.testing.assert_close(found[0, :2].norm(dim=1), torch.ones(2))


@pytest.mark.parametrize("text", ["a red cube,a blue wall", " a red cube ,, a blue wall ,", ",a red cube, a blue wall"])
def test_blanks_and_empty_phrases_do_not_matter(phrases, text):
    assert torch.equal(phrases([text]), phrases(["a red cube, a blue wall"]))


def test_texts_of_commas_alone_are_empty(phrases):
    assert not phrases([",", " , ,", ""]).any()


def test_too_many_phrases_are_refused(phrases):
    with pytest.raises(
        UserError, match=r"text 'a, cube, red, blue': expected at most 3 phrases .*max_phrases.*got 4\. Shorten"
    ):
        phrases(["a", "a, cube, red, blue"])
    assert phrases(["a, cube, red,,"]).all()


def test_n_repeat_beside_it_is_refused(folder):
    config = {"target": TARGET, "params": {"version": str(folder), "n_repeat": 2, "max_phrases": 3}}
    with pytest.raises(ConfigError, match=r"cond_stage_config.params: expected n_repeat or max_phrases, got both"):
        instantiate_from_config(config)


@pytest.mark.parametrize("number", [0, -1, True])
def test_a_count_below_one_is_refused(folder, number):
    with pytest.raises(ConfigError, match="max_phrases: expected an integer"):
        instantiate_from_config({"target": TARGET, "params": {"version": str(folder), "max_phrases": number}})


def test_nested_lists_are_not_divided(phrases, plain):
    nested = [["a red cube, a blue wall", "", "a", "cube"], ["a", "cube", "red", "blue, wall"]]  # of any length
    torch.testing.assert_close(phrases(nested), plain(nested), atol=1e-6, rtol=1e-5)
    assert phrases([["a, cube"]]).shape == (1, 1, plain.width)


def test_embeddings_that_are_not_kept_are_equal_and_have_gradients(phrases):
    texts = ["a red cube, a blue wall", "", "a, cube, red"]
    kept = phrases(texts)
    rows = dict(phrases._rows)
    phrases.caches_texts = False
    anew = phrases(texts)
    torch.testing.assert_close(anew, kept, atol=1e-6, rtol=1e-5)
    assert not anew[1].any() and phrases._rows == rows
    assert not phrases([""]).any() and phrases([""]).shape == (1, 3, phrases.width)
    weight = phrases.clip.token_embedding.weight.requires_grad_()
    phrases(texts)[0].sum().backward()
    assert weight.grad.abs().sum() > 0


def test_no_text_is_zeros_and_guidance_leads_away_from_it(phrases):
    assert phrases.takes_texts and torch.equal(phrases.unconditional(2), torch.zeros(2, 3, phrases.width))
    texts = ["a red cube, a blue wall", "a"]
    cond = as_condition(phrases.encode_texts(texts))
    assert torch.equal(cond.value, phrases(texts))

    def predict(x, t, cond):
        return x + cond.value.flatten(1).sum(dim=1, keepdim=True)

    none = as_condition(phrases.encode_texts([""] * 2))
    x, t = torch.zeros(2, 1), torch.zeros(2)
    guided = classifier_free(predict, cond, 3.0, none)(x, t)
    torch.testing.assert_close(guided, 3 * predict(x, t, cond), atol=1e-5, rtol=1e-5)


def test_models_sample_with_guidance(folder):
    from direction_models import MODEL

    params, stage = MODEL["params"], {"target": TARGET, "params": {"version": str(folder), "max_phrases": 3}}
    unet = {**params["unet_config"], "params": {**params["unet_config"]["params"], "context_dim": 64}}
    params = {**params, "cond_stage_config": stage, "unet_config": unet}
    torch.manual_seed(0)
    model = instantiate_from_config({"target": MODEL["target"], "params": params}).eval()
    for parameter in model.model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    x_T = torch.randn(2, 4, 8, 8)
    plain, guided = (
        model.sample(x_T, model.condition_from_texts(["a red cube, a blue wall", "a"]), guidance_scale=scale)
        for scale in (1.0, 4.0)
    )
    assert plain.isfinite().all() and guided.isfinite().all() and not torch.allclose(plain, guided)
