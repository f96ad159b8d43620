"""Frozen CLIP towers: shapes, caching, gradients, and their absence from checkpoints."""

import json
import logging

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from ldm.data.world import world_vocabulary
from ldm.modules.encoders.clip_embedders import ClipTextStage
from ldm.modules.encoders.clip_loading import build_clip, import_open_clip
from ldm.modules.encoders.modules import FrozenClipImageEmbedder, FrozenCLIPTextEmbedder
from ldm.modules.encoders.tokenizer import WordTokenizer
from ldm.util import UserError

WIDTH = 8
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A CLIP folder with random weights, as a run writes it."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("clip")
    tokenizer = WordTokenizer(world_vocabulary().all_words(), context_length=10)
    text = {"context_length": 10, "vocab_size": tokenizer.vocab_size, "width": 16, "heads": 2, "layers": 1}
    vision = {"image_size": 16, "layers": 1, "width": 16, "patch_size": 8, "head_width": 8}
    config = {"embed_dim": WIDTH, "vision_cfg": vision, "text_cfg": text}
    save_file(build_clip(config).state_dict(), path / "open_clip_model.safetensors")
    preprocess = {"mean": MEAN, "std": STD}
    (path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    tokenizer.save(path / "words.json")
    return path


@pytest.fixture(scope="module")
def full_clip(folder):
    """The same CLIP as open_clip itself loads it."""
    import open_clip

    return open_clip.create_model(f"local-dir:{folder}").eval()


@pytest.fixture
def text(folder):
    return FrozenCLIPTextEmbedder(str(folder), device="cuda:99")


@pytest.fixture
def image(folder):
    return FrozenClipImageEmbedder(str(folder), device="cuda:99")


def test_texts_equal_open_clips(text, full_clip):
    words = ["red floor", "the shape is a cube"]
    expected = full_clip.encode_text(text.tokenizer(words), normalize=True)
    assert torch.allclose(text.encode(words), expected, atol=1e-6)


def test_nested_and_flat_lists(text):
    flat = text(["red floor", "cube", ""])
    assert flat.shape == (3, WIDTH) and flat.dtype == torch.float32
    assert torch.allclose(flat.norm(dim=1), torch.tensor([1.0, 1.0, 0.0]))
    nested = text([["cube", "red floor"], ["", "cube"]])
    assert nested.shape == (2, 2, WIDTH)
    assert torch.equal(nested[0], flat[[1, 0]]) and torch.equal(nested[1], flat[[2, 1]])
    assert text([["cube"]]).shape == (1, 1, WIDTH)


def test_n_repeat_and_normalize(folder):
    embedder = FrozenCLIPTextEmbedder(str(folder), n_repeat=3, normalize=False)
    out = embedder(["cube", "sphere"])
    assert out.shape == (2, 3, WIDTH) and not torch.allclose(out.norm(dim=-1), torch.ones(2, 3))
    assert FrozenCLIPTextEmbedder(str(folder), n_repeat=1)(["cube", "sphere"]).shape == (2, 1, WIDTH)
    assert embedder.takes_texts and torch.equal(embedder.encode_texts(["cube", "sphere"]), out)
    none = embedder.unconditional(2)
    assert none.shape == (2, 3, WIDTH) and torch.equal(none, embedder(["", ""])) and none.any()


def test_no_text_of_units_is_zero(text, image):
    assert text.takes_texts and not image.takes_texts
    assert torch.equal(text.unconditional(2), torch.zeros(2, WIDTH))


def test_ragged_and_single_texts_are_refused(text):
    with pytest.raises(UserError, match="same number"):
        text([["cube"], ["cube", "red floor"]])
    with pytest.raises(UserError, match="list"):
        text("cube")


def test_each_string_is_encoded_once(text, monkeypatch):
    seen = []
    original = text.clip.encode_text
    monkeypatch.setattr(text.clip, "encode_text", lambda tokens: seen.append(len(tokens)) or original(tokens))
    first = text([["cube", "red floor"], ["cube", "green wall"]])
    second = text([["green wall", "cube"]])
    assert seen == [3] and torch.equal(second[0], first[1].flip(0))
    text(["sphere", "cube"])
    assert seen == [3, 1]


def test_order_of_arrival_does_not_matter(folder, text):
    other = FrozenCLIPTextEmbedder(str(folder))
    other(["cube"])
    assert torch.allclose(other(["red floor", "cube"]), text(["red floor", "cube"]), atol=1e-6)


def test_texts_first_seen_in_inference_mode_can_be_trained_with(text):
    with torch.inference_mode():
        text(["cube"])
    weight = nn.Parameter(torch.ones(WIDTH))
    (text(["cube"]) * weight).sum().backward()
    assert weight.grad is not None


def test_long_texts_warn_once(text, caplog):
    with caplog.at_level(logging.WARNING):
        text(["the shape is a cube"])
        assert not caplog.records
        for shape in ("cube", "sphere"):
            text(["the view is from the far left, the shape is a " + shape])
    assert len([r for r in caplog.records if "truncated" in r.message]) == 1


def test_clip_guided_prompts_name_the_end_that_is_cut_off(caplog):
    stage = ClipTextStage()
    stage.tokenizer, stage.max_length = import_open_clip().get_tokenizer("ViT-B-32"), 10
    assert stage.tokenize(["one two three four five six seven eight", ""]).shape == (2, 10) and not caplog.records
    for text, end in {
        "one two three four five six seven  eight nine, ten": "nine, ten",
        "one two three four five six seven incomprehensibilities": "incomprehensibilities",
        "x" * 200: "x" * 10,
        "これは赤い球と青い壁と緑の床の絵です": "です",
    }.items():
        caplog.clear()
        stage._has_warned = False
        stage.tokenize(["short", text])
        assert len(caplog.records) == 1 and f"{end}' (shown once)" in caplog.text
    caplog.clear()
    stage._has_warned = False
    stage.tokenize(["one " * 20 + str(k) for k in range(9)])
    assert "7', ... (shown once)" in caplog.text


def test_vocabulary_embeddings(text):
    vocabulary = text.vocabulary_embeddings(world_vocabulary().words[3:5])
    assert [tuple(v.shape) for v in vocabulary] == [(4, WIDTH), (4, WIDTH)]
    assert text.logit_scale == pytest.approx(1 / 0.07, rel=1e-4)


def test_image_embedding_equals_open_clips(image, full_clip):
    x = torch.rand(3, 3, 16, 16) * 2 - 1
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    expected = full_clip.encode_image(((x + 1) / 2 - mean) / std)
    assert torch.allclose(image(x), expected, atol=1e-5)


def test_image_is_resized_bicubically_with_aligned_corners(image):
    x = torch.rand(2, 3, 24, 20) * 2 - 1
    resized = F.interpolate(x, (16, 16), mode="bicubic", align_corners=True)
    assert torch.equal(image.preprocess(x), image.preprocess(resized))


def test_antialias_changes_shrinking_only(folder):
    smooth = FrozenClipImageEmbedder(str(folder), antialias=True)
    plain = FrozenClipImageEmbedder(str(folder))
    large, right = torch.rand(1, 3, 64, 64), torch.rand(1, 3, 16, 16)
    assert not torch.allclose(smooth.preprocess(large), plain.preprocess(large))
    assert torch.equal(smooth.preprocess(right), plain.preprocess(right))


def test_gradient_reaches_the_image_but_no_weight(image):
    x = torch.zeros(2, 3, 32, 32, requires_grad=True)
    image(x).square().sum().backward()
    assert x.grad.abs().sum() > 0
    assert all(p.grad is None and not p.requires_grad for p in image.parameters())


def test_low_precision_gives_float32(image, text):
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    exact, exact_text = image(x), text(["cube"])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(image(x), exact)
        assert torch.equal(text(["cube"]), exact_text)
    low = image.to(torch.bfloat16)(x)
    assert low.dtype == torch.float32 and torch.allclose(low, exact, atol=0.15)


def test_each_embedder_keeps_only_its_tower(image, text):
    assert not hasattr(text.clip, "visual")
    assert not any("token_embedding" in name for name, _ in image.named_parameters())


class Parent(nn.Module):
    def __init__(self, folder):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.cond = nn.ModuleDict(
            {"text": FrozenCLIPTextEmbedder(str(folder)), "image": FrozenClipImageEmbedder(str(folder))}
        )


def test_checkpoints_leave_clip_out_and_load_either_way(folder):
    parent = Parent(folder)
    before = parent.cond["image"].visual.conv1.weight.clone()
    state = parent.state_dict()
    assert set(state) == {"layer.weight", "layer.bias"}
    parent.load_state_dict(state, strict=True)
    foreign = {"cond.image.visual.conv1.weight": torch.zeros(1), "cond.text.model.logit_scale": torch.ones(())}
    parent.load_state_dict({**state, **foreign}, strict=True)
    assert torch.equal(parent.cond["image"].visual.conv1.weight, before)
    with pytest.raises(RuntimeError, match="layer.bias"):
        parent.load_state_dict({"layer.weight": state["layer.weight"]}, strict=True)


def test_frozen_and_in_eval_whatever_the_parent_does(folder):
    parent = Parent(folder).train()
    assert parent.training and not any(m.training for m in parent.cond["text"].modules())
    assert not any(p.requires_grad for p in parent.cond.parameters())
    assert len(list(parent.cond.parameters())) > 10


def test_embedders_move_with_their_parent(folder):
    parent = Parent(folder)
    parent.cond["text"](["cube"])
    parent.to("meta")
    assert parent.cond["image"].mean.device.type == "meta"
    assert parent.cond["text"].clip.logit_scale.device.type == "meta"
