"""Networks of the reference code in other sizes than the shipped ones: figures and key layouts.

The figures were made by running the reference code on the recipe of ``golden_recipe``.
"""

from __future__ import annotations

import json
import zlib
from types import SimpleNamespace

import pytest
import torch
from golden_recipe import assert_stat, fill, inp, load_golden
from torch import nn

from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.modules.encoders import bert, modules
from ldm.modules.encoders.tokenizer import WordTokenizer
from ldm.util import ConfigError, UserError

GOLDEN = load_golden("legacy")
STEPS = torch.tensor([7, 912])
BASE = {
    "image_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": 1,
    "attention_resolutions": [1, 2],
    "channel_mult": [1, 2],
    "num_heads": 4,
}
CROSS = {"use_spatial_transformer": True, "context_dim": 6}
UNETS = {
    "plain": {},
    "updown": {"resblock_updown": True},
    "ssn": {"use_scale_shift_norm": True},
    "neworder": {"use_new_attention_order": True},
    "avg": {"conv_resample": False},
    "nhc16": {"num_heads": -1, "num_head_channels": 16},
    "upheads": {"num_heads_upsample": 2},
    "nolegacy_up": {"legacy": False, "num_heads_upsample": 2},
    "hup_nhc": {"num_head_channels": 16, "num_heads_upsample": 2},
    "both": {"num_heads": 2, "num_head_channels": 8},
    "deep": {"channel_mult": [1, 1, 2], "num_res_blocks": 2, "attention_resolutions": [1, 4]},
    "wide": {"channel_mult": [1, 3], "model_channels": 64, "num_heads": 2},
    "noattn": {"attention_resolutions": []},
    "classes": {"num_classes": 5},
    "nembed": {"n_embed": 11},
    "st": CROSS,
    "st2": {**CROSS, "transformer_depth": 2, "num_heads": -1, "num_head_channels": 16},
    "st_nolegacy": {**CROSS, "legacy": False},
    "st_nhc": {**CROSS, "num_heads": -1, "num_head_channels": 32, "channel_mult": [1, 2, 3]},
    "st_odd": {**CROSS, "num_heads": -1, "num_head_channels": 24},
    "st_odd_nolegacy": {**CROSS, "num_heads": -1, "num_head_channels": 24, "legacy": False},
    "st_heads3": {**CROSS, "num_heads": 3},
    "both_st": {**CROSS, "num_heads": 2, "num_head_channels": 8},
    "dims1": {"dims": 1},
    "dims3": {"dims": 3},
    "dims3avg": {"dims": 3, "conv_resample": False, "resblock_updown": True},
}
PERCEIVER = {"depth": 3, "dim": 32, "latent_dim": 32}
ENCODERS = {
    "bert": (
        modules.BERTEmbedder,
        {"n_embed": 24, "n_layer": 3, "vocab_size": 50, "max_seq_len": 12, "use_tokenizer": False},
        torch.arange(18).view(2, 9) * 2,
    ),
    "pe": (modules.PerceiverEncoder, {**PERCEIVER, "index_num": 8, "z_index_dim": 5}, inp((2, 3, 16, 16))),
    "pe_tied": (
        modules.PerceiverEncoder,
        {**PERCEIVER, "index_num": 8, "z_index_dim": 5, "weight_tie_layers": True},
        inp((2, 3, 16, 16)),
    ),
    "pd": (modules.PerceiverDecoder, {**PERCEIVER, "index_num": 4, "z_index_dim": 6}, inp((2, 9, 32))),
    "pd_f": (
        modules.PerceiverDecoder,
        {**PERCEIVER, "depth": 2, "index_num": 4, "z_index_dim": 6, "fourier_encode_data": True},
        inp((2, 9, 6)),
    ),
    "mlp": (modules.MLP_layers, {"z_dim": 16, "latent_dim": 8, "num_latents": 3}, inp((2, 16))),
    "spatial": (modules.SpatialRescaler, {"n_stages": 2, "in_channels": 5, "out_channels": 3}, inp((2, 5, 16, 16))),
    "cls": (modules.ClassEmbedder, {"embed_dim": 6, "n_classes": 9, "key": "k"}, {"k": torch.tensor([2, 5])}),
}


def assert_layout(module: nn.Module, golden: dict) -> None:
    """The state dict has the very names and shapes of the reference's."""
    layout = sorted([name, list(value.shape)] for name, value in module.state_dict().items())
    assert len(layout) == golden["num_keys"]
    assert zlib.crc32(json.dumps(layout).encode()) == golden["keys_crc32"]


def test_legacy_every_figure_is_looked_at():
    assert set(UNETS) | set(ENCODERS) == set(GOLDEN)


@pytest.mark.parametrize("name", UNETS)
def test_legacy_golden_unet(name):
    params = {**BASE, **UNETS[name]}
    unet = fill(UNetModel(**params))
    assert_layout(unet, GOLDEN[name])
    extra = {"context": inp((2, 5, 6), 0.3)} if "context_dim" in params else {}
    extra |= {"y": torch.tensor([1, 3])} if "num_classes" in params else {}
    with torch.no_grad():
        assert_stat(unet(inp((2, 4, *[8] * params.get("dims", 2))), STEPS, **extra), GOLDEN[name])


@pytest.mark.parametrize("name", ENCODERS)
def test_legacy_golden_encoder(name):
    kind, params, given = ENCODERS[name]
    encoder = fill(kind(**params))
    assert_layout(encoder, GOLDEN[name])
    with torch.no_grad():
        assert_stat(encoder(given), GOLDEN[name])


def test_head_width_must_divide_where_heads_are_cut_from_channels():
    with pytest.raises(ConfigError, match="24 does not divide a layer of 32"):
        UNetModel(**{**BASE, "num_heads": -1, "num_head_channels": 24})
    with pytest.raises(ConfigError, match="64 does not divide a layer of 32"):
        UNetModel(**{**BASE, **CROSS, "num_heads": -1, "num_head_channels": 64})


def test_class_embedder_names_what_the_batch_has():
    embedder = modules.ClassEmbedder(4, n_classes=3)
    assert embedder(torch.tensor([0, 2])).shape == (2, 1, 4)
    with pytest.raises(UserError, match=r"batch\['class'\].*only image"):
        embedder({"image": torch.zeros(1)})


def test_spatial_rescaler_refuses_unknown_methods():
    with pytest.raises(ConfigError, match="bilinear"):
        modules.SpatialRescaler(method="linaer")
    with pytest.raises(UserError, match="SpatialRescaler: expected 182 channels .*, got 4"):
        modules.SpatialRescaler(in_channels=182, out_channels=3)(torch.zeros(1, 4, 8, 8))
    assert modules.SpatialRescaler(n_stages=0).encode(torch.zeros(1, 3, 4, 4)).shape == (1, 3, 4, 4)


def test_token_stages_take_tokens_only_as_long_as_they_are():
    embedder = modules.TransformerEmbedder(n_embed=8, n_layer=1, vocab_size=5, max_seq_len=4, device="cuda")
    assert embedder.encode(torch.zeros(2, 3, dtype=torch.long)).shape == (2, 3, 8)
    with pytest.raises(UserError, match="at most 4 tokens, got 5"):
        embedder(torch.zeros(2, 5, dtype=torch.long))


def build_bert(tokenizer, **params):
    return modules.BERTEmbedder(
        **{"n_embed": 8, "n_layer": 1, "vocab_size": 9, "max_seq_len": 5, **params}, tokenizer=tokenizer
    )


def test_bert_embedder_reads_texts_with_our_own_words(tmp_path):
    WordTokenizer(["red", "cube", "blue"], context_length=20).save(tmp_path / "words.json")
    embedder = build_bert(tmp_path).eval()
    texts = embedder.encode(["red cube", "blue cube"])
    assert texts.shape == (2, 5, 8)
    assert torch.equal(texts[:1], embedder(["red cube"]))
    assert not any(parameter.requires_grad for parameter in embedder.transformer.to_logits.parameters())
    with pytest.raises(ConfigError, match="vocab_size: expected at least 6"):
        build_bert(tmp_path / "words.json", vocab_size=4)(["red"])


def test_bert_embedder_is_built_without_its_tokenizer(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    embedder = build_bert("bert-base-uncased")
    with pytest.raises(UserError, match=r"pip install -e .\[bert\]"):
        embedder(["red"])


def test_bert_embedder_with_a_tokenizer_of_transformers(monkeypatch):
    class Fake:
        """The part of a BERT tokenizer that is called."""

        @classmethod
        def from_pretrained(cls, name, local_files_only):
            if name == "absent":
                raise OSError("not found\nat all")
            assert local_files_only
            return cls()

        def __len__(self):
            return 9

        def __call__(self, texts, truncation, max_length, padding):
            assert truncation and padding == "max_length"
            return {"input_ids": [[len(text) % 9] * max_length for text in texts]}

    monkeypatch.setitem(__import__("sys").modules, "transformers", SimpleNamespace(BertTokenizerFast=Fake))
    assert build_bert("bert-base-uncased")(["red", "cube"]).shape == (2, 5, 8)
    with pytest.raises(UserError, match=r"absent is missing on this machine \(not found\).*allow_download"):
        bert.load_tokenizer("absent", 5)
