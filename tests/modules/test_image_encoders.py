"""Image encoders: reference figures, keys, errors."""

from __future__ import annotations

import pytest
import torch
from golden_recipe import assert_stat, fill, inp, load_golden

from ldm.modules.encoders.image import Encoder4, Encoder4_vae, Encoder256

GOLDEN = load_golden("modules")
IMAGES = inp((2, 3, 64, 64))


@torch.no_grad()
def test_encoder4_figures():
    encoder = fill(Encoder4(d=128))
    assert_stat(encoder(IMAGES), GOLDEN["encoder4_eval"])
    assert_stat(encoder.train()(IMAGES), GOLDEN["encoder4_train"])


@torch.no_grad()
def test_encoder256_figure():
    assert_stat(fill(Encoder256(d=128))(inp((1, 3, 256, 256))), GOLDEN["encoder256_eval"])


@torch.no_grad()
def test_variational_encoder_figures():
    encoder = fill(Encoder4_vae(d=128))
    assert encoder(IMAGES).shape == (2, 192)
    assert_stat(encoder.posterior.mode(), GOLDEN["encoder4_vae_mean"])
    assert encoder.kl_loss(6).item() == pytest.approx(GOLDEN["encoder4_vae_kl"], rel=1e-5)


def test_keys():
    keys = set(Encoder4(d=8).state_dict())
    assert {"encoder.0.weight", "encoder.9.running_mean", "encoder.11.convs.2.weight", "encoder.14.convs.4.bias",
            "encoder.16.weight"} <= keys
    assert "encoder.14.convs.3.weight" in Encoder4(d=8, bn=False).state_dict()


def test_wrong_size_is_said():
    with pytest.raises(ValueError, match="64x64.*32x32"):
        Encoder4(d=8)(torch.zeros(1, 3, 32, 32))
