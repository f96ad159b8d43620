"""The contract of condition stages: texts or classes in, a condition out, with and without guidance."""

import pytest
import torch

from ldm.modules.diffusionmodules.openaimodel_enc import Encoder4 as TokenEncoder
from ldm.modules.encoders import modules
from ldm.modules.encoders.base import sent_to
from ldm.modules.encoders.tokenizer import WordTokenizer
from ldm.util import ConfigError

BERT = {"n_embed": 8, "n_layer": 1, "vocab_size": 9, "max_seq_len": 5}


@pytest.fixture
def bert(tmp_path):
    WordTokenizer(["red", "cube", "blue"]).save(tmp_path / "words.json")
    return modules.BERTEmbedder(**BERT, tokenizer=tmp_path).eval()


def test_texts_of_a_bert_stage(bert):
    assert bert.takes_texts and not bert.takes_classes
    texts = bert.encode_texts(["red cube", ""])
    assert torch.equal(texts, bert.encode(["red cube", ""])) and texts.shape == (2, 5, 8)
    none = bert.unconditional(3)
    assert none.shape == (3, 5, 8)
    torch.testing.assert_close(none[0], texts[1])


def test_a_bert_stage_of_tokens_takes_no_texts():
    stage = modules.BERTEmbedder(**BERT, use_tokenizer=False)
    assert not stage.takes_texts
    assert stage.encode(torch.zeros(2, 3, dtype=torch.long)).shape == (2, 3, 8)
    for call in (lambda: stage.encode_texts(["red"]), lambda: stage.unconditional(1)):
        with pytest.raises(ConfigError, match="use_tokenizer: expected true"):
            call()


def test_classes():
    stage = modules.ClassEmbedder(4, n_classes=3)
    assert stage.takes_classes and not stage.takes_texts and stage.num_classes == 3
    labels = torch.tensor([0, 2])
    found = stage.encode_classes(labels)
    assert found.shape == (2, 1, 4) and torch.equal(found, stage.encode({"class": labels}))
    assert torch.equal(stage.unconditional(2), found[1:].expand(2, -1, -1))


def test_other_stages_take_neither():
    stages = [
        modules.Encoder4(d=4, image_size=8),
        modules.Encoder4_vae(d=4, image_size=8),
        modules.PerceiverEncoder(depth=1),
        modules.SpatialRescaler(),
        modules.TransformerEmbedder(8, 1, 5),
        TokenEncoder(d=4, context_dim=2, latent_unit=3, image_size=8),
    ]
    assert not any(stage.takes_texts or stage.takes_classes for stage in stages)


@torch.no_grad()
def test_every_image_encoder_has_a_mean_code():
    images = torch.randn(2, 3, 16, 16)
    for encoder, width in (
        (modules.Encoder4(d=4, latent_dim=6, image_size=16), 6),
        (modules.Encoder4_vae(d=4, latent_dim=6, image_size=16), 6),
        (modules.PerceiverEncoder(depth=1, index_num=4, z_index_dim=3), 12),
    ):
        encoder.eval()
        code = encoder.mean_code(images)
        assert code.shape == (2, width) and encoder.latent_dim == width
        assert torch.equal(code, encoder.mean_code(images))
        assert torch.equal(code, encoder(images)) != encoder.is_random


def test_tokens_are_sent_to_a_device_without_waiting(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: calls.append("pinned") or tensor)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *device, **options: calls.append(options) or tensor)
    sent_to(torch.device("cuda"), torch.zeros(2, dtype=torch.long))
    assert calls == ["pinned", {"non_blocking": True}]
