"""Condition stages of Stable Diffusion against open_clip and plain formulas, and the search of their weights."""

from __future__ import annotations

import json
import logging

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from ldm.modules.encoders import clip_loading
from ldm.modules.encoders.clip_loading import build_clip
from ldm.modules.encoders.modules import (
    FrozenCLIPEmbedder,
    FrozenCLIPImageEmbedder,
    FrozenClipImageEmbedder,
    FrozenCLIPTextEmbedder,
    FrozenOpenCLIPEmbedder,
)
from ldm.modules.encoders.tokenizer import WordTokenizer
from ldm.util import ConfigError, UserError

WIDTH, LENGTH, DEPTH = 16, 10, 3
WORDS = WordTokenizer(["a", "red", "blue", "cube", "ball"], context_length=LENGTH)
CONFIG = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 64, "patch_size": 8},
    "text_cfg": {"context_length": LENGTH, "vocab_size": WORDS.vocab_size, "width": WIDTH, "heads": 2, "layers": DEPTH},
    "quick_gelu": True,
}
TEXTS = ["a red cube", "ball"]


@pytest.fixture(autouse=True)
def bare_machine(monkeypatch, tmp_path):
    """No weights anywhere but in the folders of the test."""
    monkeypatch.delenv(clip_loading.WEIGHTS_VARIABLE, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(clip_loading, "OPENAI_CACHE", str(tmp_path / "openai"))


@pytest.fixture
def clip():
    torch.manual_seed(0)
    return build_clip(CONFIG).eval()


@pytest.fixture
def folder(clip, tmp_path):
    """The CLIP as open_clip stores it."""
    path = tmp_path / "clip"
    path.mkdir()
    save_file(clip.state_dict(), path / "open_clip_model.safetensors")
    (path / "open_clip_config.json").write_text(json.dumps({"model_cfg": CONFIG, "preprocess_cfg": {}}))
    WORDS.save(path / "words.json")
    return path


@pytest.fixture
def hub_folder(folder, tmp_path):
    """The same text tower as transformers stores it."""
    path = tmp_path / "hub_layout"
    path.mkdir()
    text = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_attention_heads": 2}
    text |= {"num_hidden_layers": DEPTH, "vocab_size": WORDS.vocab_size, "max_position_embeddings": LENGTH}
    (path / "config.json").write_text(json.dumps({"text_config": {**text, "hidden_act": "quick_gelu"}}))
    tower = FrozenCLIPEmbedder(str(folder)).transformer
    state = {key: value.clone() for key, value in tower.state_dict().items()}
    torch.save({**state, "vision_model.class_embedding": torch.zeros(1)}, path / "pytorch_model.bin")
    WORDS.save(path / "words.json")
    return path


def padded(texts, end_token):
    """Token ids, padded by zeros, or by the end token after the first one."""
    rows = WORDS(texts)
    for row in rows if end_token else ():
        row[row.tolist().index(WORDS.eot_token_id) :] = WORDS.eot_token_id
    return rows


def hidden_states(clip, tokens):
    """Outputs of open_clip's layers, of the embeddings first."""
    mask = torch.full((LENGTH, LENGTH), float("-inf")).triu(1)
    states = [clip.token_embedding(tokens) + clip.positional_embedding]
    for layer in clip.transformer.resblocks:
        states.append(layer(states[-1], attn_mask=mask))
    return states


def plain_tower(state, tokens, heads=2):
    """A text tower from its equations, with the weights by transformers' names."""

    def linear(name, x):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(name, x):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        return x * state[f"{name}.weight"] + state[f"{name}.bias"]

    x = state["embeddings.token_embedding.weight"][tokens] + state["embeddings.position_embedding.weight"]
    for number in range(DEPTH):
        layer = f"encoder.layers.{number}"
        h = norm(f"{layer}.layer_norm1", x)
        q, k, v = (linear(f"{layer}.self_attn.{n}_proj", h).unflatten(-1, (heads, -1)) for n in "qkv")
        scores = torch.einsum("blhd,bshd->bhls", q, k) / (WIDTH // heads) ** 0.5
        scores = scores.masked_fill(torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1), float("-inf"))
        h = torch.einsum("bhls,bshd->blhd", scores.softmax(-1), v).flatten(-2)
        x = x + linear(f"{layer}.self_attn.out_proj", h)
        h = linear(f"{layer}.mlp.fc1", norm(f"{layer}.layer_norm2", x))
        x = x + linear(f"{layer}.mlp.fc2", h * torch.sigmoid(1.702 * h))
    return norm("final_layer_norm", x)


def test_last_hidden_states_equal_a_plain_tower(folder):
    stage = FrozenCLIPEmbedder(str(folder), device="cuda:99")
    for parameter in stage.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)  # biases and normalizations that have an effect
    expected = plain_tower(stage.transformer["text_model"].state_dict(), padded(TEXTS, True))
    found = stage.encode(TEXTS)
    assert found.shape == (2, LENGTH, WIDTH) and stage.width == WIDTH
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["folder", "hub_folder"])
def test_layers_equal_open_clips(kind, request, clip):
    path = str(request.getfixturevalue(kind))
    tokens = padded(TEXTS, True)
    states = hidden_states(clip, tokens)
    expected = {"last": clip.ln_final(states[-1]), "penultimate": clip.ln_final(states[-2])}
    for layer, value in expected.items():
        assert torch.allclose(FrozenCLIPEmbedder(path, layer=layer)(TEXTS), value, atol=1e-5)
    for index in (0, 2, -1, -DEPTH - 1):
        found = FrozenCLIPEmbedder(path, layer="hidden", layer_idx=index)(TEXTS)
        assert torch.allclose(found, states[index], atol=1e-5)
    pooled = FrozenCLIPEmbedder(path, layer="pooled")(TEXTS)
    end = [row.tolist().index(WORDS.eot_token_id) for row in tokens]
    assert pooled.shape == (2, 1, WIDTH)
    assert torch.allclose(pooled[:, 0], clip.ln_final(states[-1])[range(2), end], atol=1e-5)


def test_open_clips_tower_is_padded_with_zeros(folder, clip):
    states = hidden_states(clip, padded(TEXTS, False))
    for layer, value in (("last", states[-1]), ("penultimate", states[-2])):
        stage = FrozenOpenCLIPEmbedder(str(folder), layer=layer)
        assert stage.width == WIDTH
        assert torch.allclose(stage.encode(TEXTS), clip.ln_final(value), atol=1e-5)


def test_tokens_of_stable_diffusion(tmp_path):
    """49406 starts a text, 49407 ends and pads it; open_clip's stage pads with 0. Long texts keep their end."""
    small = {"hidden_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1, "intermediate_size": 8}
    (tmp_path / "config.json").write_text(json.dumps(small))
    stage = FrozenCLIPEmbedder(str(tmp_path))
    stage.missing_weights, seen = None, []
    tower = stage.transformer["text_model"]
    tower.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    stage(["a photo of a cat", "", "a" + " a" * 100])
    assert seen[0].shape == (3, 77)
    assert seen[0][0, :8].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407, 49407]
    assert seen[0][1].tolist() == [49406] + [49407] * 76
    assert seen[0][2].tolist() == [49406] + [320] * 75 + [49407]
    assert FrozenCLIPEmbedder(str(tmp_path), max_length=20).max_length == 20
    assert FrozenCLIPEmbedder(str(tmp_path), max_length=200).max_length == 77


def test_empty_texts_are_no_condition(folder):
    for stage in (FrozenCLIPEmbedder(str(folder)), FrozenOpenCLIPEmbedder(str(folder))):
        assert stage.takes_texts
        none = stage.unconditional(2)
        assert none.shape == (2, LENGTH, WIDTH) and torch.equal(none, stage(["", ""])) and none.any()


def test_long_texts_warn_once(folder, caplog):
    stage = FrozenCLIPEmbedder(str(folder))
    with caplog.at_level(logging.WARNING):
        stage(["red " * 8])
        assert not caplog.records
        stage(["red " * 9])
        stage(["blue " * 9])
    assert len([record for record in caplog.records if "truncated" in record.message]) == 1


def test_other_inputs_are_refused(folder):
    stage = FrozenCLIPEmbedder(str(folder))
    for wrong in ("a cube", torch.zeros(2, 3), [["a"], ["cube"]], [1]):
        with pytest.raises(UserError, match="expected a list of texts.*cond_stage_key"):
            stage(wrong)


def test_image_embedding_equals_open_clips(folder, clip):
    stage, frozen = FrozenCLIPImageEmbedder(str(folder)), FrozenClipImageEmbedder(str(folder))
    x = torch.rand(2, 3, 20, 16) * 2 - 1
    assert torch.allclose(stage(x), clip.encode_image(frozen.preprocess(x)), atol=1e-5)
    assert torch.allclose(stage(x), frozen(x), atol=1e-5) and torch.equal(stage.encode(x), stage(x)[:, None])
    assert stage.encode(x).shape == (2, 1, 8) and stage.width == 8 and not stage.takes_texts
    assert "mean" not in stage.state_dict()


@pytest.mark.parametrize("kind", [FrozenCLIPEmbedder, FrozenOpenCLIPEmbedder, FrozenCLIPImageEmbedder])
def test_weights_are_part_of_the_state(kind, folder):
    stage = kind(str(folder))
    parent = nn.ModuleDict({"cond": kind(str(folder))})
    for parameter in parent.parameters():
        nn.init.zeros_(parameter)
    state = {f"cond.{key}": value for key, value in stage.state_dict().items()}
    assert len(state) > 10
    parent.load_state_dict(state)
    assert all(torch.equal(parent.state_dict()[key], value) for key, value in state.items())


def test_freezing_is_optional(folder):
    for kind in (FrozenCLIPEmbedder, FrozenOpenCLIPEmbedder):
        assert not any(parameter.requires_grad for parameter in kind(str(folder)).parameters())
        stage = kind(str(folder), freeze=False)
        stage(TEXTS).square().sum().backward()
        assert stage.state_dict() and sum(p.grad is not None for p in stage.parameters()) > 30


@pytest.mark.parametrize("kind", [FrozenCLIPEmbedder, FrozenOpenCLIPEmbedder, FrozenCLIPImageEmbedder])
def test_stages_are_built_without_weights_and_filled_by_checkpoints(kind, folder):
    given = torch.zeros(1, 3, 16, 16) if kind is FrozenCLIPImageEmbedder else TEXTS
    expected = kind(str(folder)).encode(given)
    state = kind(str(folder)).state_dict()
    (folder / "open_clip_model.safetensors").unlink()
    stage = kind(str(folder))
    assert all((parameter == 0).all() for parameter in stage.parameters())
    with pytest.raises(UserError, match=f"{kind.__name__}.*open_clip_model.safetensors.*\n.*ckpt_path"):
        stage.encode(given)
    part = dict(list(state.items())[-3:])
    stage.load_state_dict(part, strict=False)
    with pytest.raises(UserError, match="missing"):
        stage.encode(given)
    stage.load_state_dict(state)
    assert torch.equal(stage.encode(given), expected)


def test_unused_weights_may_be_missing_in_checkpoints(folder):
    state = FrozenOpenCLIPEmbedder(str(folder)).state_dict()
    (folder / "open_clip_model.safetensors").unlink()
    stage = FrozenOpenCLIPEmbedder(str(folder))
    stage.load_state_dict({key: value for key, value in state.items() if "text_projection" not in key}, strict=False)
    assert stage(TEXTS).any()


def test_default_names_are_built_on_any_machine():
    with torch.device("meta"):
        stages = FrozenCLIPEmbedder(), FrozenOpenCLIPEmbedder(), FrozenCLIPImageEmbedder()
        assert FrozenCLIPEmbedder("ViT-L/14@336px").width == 768
    assert [stage.width for stage in stages] == [768, 1024, 768]
    assert "ViT-L-14.pt" in stages[0].missing_weights and "CLIP-ViT-H-14-laion2B" in stages[1].missing_weights


def test_weights_by_path_and_from_the_hub_cache(folder, hub_folder, tmp_path):
    expected = FrozenCLIPEmbedder(str(folder))(TEXTS)
    (folder / "open_clip_model.safetensors").rename(tmp_path / "text.safetensors")
    by_path = FrozenCLIPEmbedder(str(folder), weights=str(tmp_path / "text.safetensors"))
    assert torch.equal(by_path(TEXTS), expected)
    config_only = tmp_path / "config_only"
    config_only.mkdir()
    for name in ("config.json", "words.json"):
        (config_only / name).write_text((hub_folder / name).read_text())
    for weights in (hub_folder, hub_folder / "pytorch_model.bin", tmp_path / "text.safetensors"):
        assert torch.allclose(FrozenCLIPEmbedder(str(config_only), weights=str(weights))(TEXTS), expected, atol=1e-6)
    repository = tmp_path / "hub" / "models--someone--clip"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    (repository / "snapshots").mkdir()
    hub_folder.rename(repository / "snapshots" / "abc")
    assert torch.allclose(FrozenCLIPEmbedder("someone/clip")(TEXTS), expected, atol=1e-6)


def test_published_names_take_weights_by_path(tmp_path, monkeypatch):
    """OpenAI's name on the hub stands for open_clip's architecture."""
    sizes = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
    config = {**CONFIG, "text_cfg": sizes}
    monkeypatch.setattr("open_clip.get_model_config", lambda _: config)
    clip = build_clip(config).eval()
    save_file(clip.state_dict(), tmp_path / "l14.safetensors")
    stage = FrozenCLIPEmbedder("openai/clip-vit-large-patch14", weights=str(tmp_path / "l14.safetensors"))
    assert torch.equal(stage.state_dict()["transformer.text_model.final_layer_norm.weight"], clip.ln_final.weight)
    stage = FrozenOpenCLIPEmbedder(version=str(tmp_path / "l14.safetensors"))
    assert torch.equal(stage.model.token_embedding.weight, clip.token_embedding.weight)


@pytest.mark.parametrize("kind", [FrozenCLIPEmbedder, FrozenOpenCLIPEmbedder, FrozenCLIPImageEmbedder])
def test_wrong_paths_are_errors_at_once(kind, folder, hub_folder, tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        kind(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="nowhere"):
        kind(str(folder), weights=str(tmp_path / "nowhere.safetensors"))
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="other.safetensors.*damaged or belongs to another model"):
        kind(str(folder), weights=str(tmp_path / "other.safetensors"))
    if kind is FrozenCLIPEmbedder:
        with pytest.raises(UserError, match="nowhere"):
            kind(str(hub_folder), weights=str(tmp_path / "nowhere.bin"))
        (hub_folder / "config.json").write_text("[")
        with pytest.raises(UserError, match="config.json"):
            kind(str(hub_folder))


def test_options_are_checked(folder, tmp_path):
    with pytest.raises(ConfigError, match="params.layer: expected one of last, penultimate, hidden, pooled"):
        FrozenCLIPEmbedder(str(folder), layer="first")
    for index in (None, DEPTH + 1, -DEPTH - 2):
        with pytest.raises(ConfigError, match=f"params.layer_idx: expected -4 to 3.*{index}"):
            FrozenCLIPEmbedder(str(folder), layer="hidden", layer_idx=index)
    with pytest.raises(ConfigError, match="params.layer: expected one of last, penultimate; got"):
        FrozenOpenCLIPEmbedder(str(folder), layer="pooled")
    (folder / "words.json").unlink()
    with pytest.raises(ConfigError, match="vocab_size above 49407, got 8.*words.json"):
        FrozenCLIPEmbedder(str(folder))


def test_frozen_clip_text_embedder_names_weights_that_it_does_not_take(folder, caplog):
    """The weights of Stable Diffusion's text tower are no weights of LDM's, although both come from one CLIP."""
    stage = nn.ModuleDict({"cond_stage_model": FrozenCLIPTextEmbedder(str(folder))})
    other = FrozenCLIPEmbedder(str(folder)).state_dict()
    with caplog.at_level(logging.WARNING):
        own = stage["cond_stage_model"].own_weights()
        stage.load_state_dict({f"cond_stage_model.{key}": value for key, value in own.items()})
        assert not caplog.records
        stage.load_state_dict({f"cond_stage_model.{key}": value for key, value in other.items()})
    assert f"{len(other)} others are ignored ({len(other)} keys of cond_stage_model.transformer.*)" in caplog.text


def test_half_precision_stays_close(folder):
    stage = FrozenCLIPEmbedder(str(folder))
    exact = stage(TEXTS)
    assert torch.allclose(stage.to(torch.bfloat16)(TEXTS).float(), exact, atol=0.1)
    assert F.cosine_similarity(stage(TEXTS).float(), exact, dim=-1).min() > 0.99
