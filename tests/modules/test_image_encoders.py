"""Image encoders: reference figures, keys, errors."""

from __future__ import annotations

import pytest
import torch
from golden_recipe import assert_stat, fill, inp, load_golden

from ldm.modules.encoders.image import Encoder4, Encoder4_vae, Encoder256, mean_code_frozen
from ldm.util import ConfigError

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
    assert {
        "encoder.0.weight",
        "encoder.9.running_mean",
        "encoder.11.convs.2.weight",
        "encoder.14.convs.4.bias",
        "encoder.16.weight",
    } <= keys
    assert "encoder.14.convs.3.weight" in Encoder4(d=8, bn=False).state_dict()


def test_wrong_size_is_said():
    with pytest.raises(ValueError, match="64x64.*32x32"):
        Encoder4(d=8)(torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize("size", [8, 16, 32, 128])
def test_other_sizes(size):
    """As many halvings as lead to 4x4; at 64 pixels nothing differs."""
    encoder = Encoder4(d=8, latent_dim=6, image_size=size)
    assert encoder(torch.zeros(2, 3, size, size)).shape == (2, 6)
    strided = sum(isinstance(layer, torch.nn.Conv2d) and layer.stride == (2, 2) for layer in encoder.modules())
    assert 4 * 2**strided == size
    with pytest.raises(ConfigError, match="image_size: .* got 48"):
        Encoder4(d=8, image_size=48)


def test_the_size_of_the_class_given_by_hand_changes_no_key():
    for kind, size in ((Encoder4, 64), (Encoder4_vae, 64), (Encoder256, 256)):
        plain, sized = kind(d=4, latent_dim=6), kind(d=4, latent_dim=6, image_size=size)
        shapes = [{key: value.shape for key, value in encoder.state_dict().items()} for encoder in (plain, sized)]
        assert shapes[0] == shapes[1]


@pytest.mark.parametrize("kind", [Encoder4, Encoder4_vae])
def test_a_look_through_the_encoder_at_rest(kind):
    """Like a copy in evaluation mode: gradients to the image alone, no statistics moved, modes as before."""
    encoder = fill(kind(d=8, latent_dim=6, image_size=16))
    encoder.train()
    encoder.encoder[1].eval()
    modes = [module.training for module in encoder.modules()]
    statistics = {name: value.clone() for name, value in encoder.named_buffers()}
    images = inp((2, 3, 16, 16)).requires_grad_()
    found = mean_code_frozen(encoder, images)
    found.square().sum().backward()
    assert images.grad.any() and all(p.grad is None and p.requires_grad for p in encoder.parameters())
    assert [module.training for module in encoder.modules()] == modes
    assert all(torch.equal(value, statistics[name]) for name, value in encoder.named_buffers())
    assert getattr(encoder, "posterior", None) is None
    assert torch.equal(found, encoder.eval().mean_code(images))
