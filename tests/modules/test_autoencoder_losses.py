"""Losses of the autoencoders, their discriminator and the perceptual distance."""

from __future__ import annotations

import math

import pytest
import torch
from golden_recipe import KL_DDCONFIG, assert_stat, fill, inp, load_golden
from torch import nn

from ldm.modules.diffusionmodules.model import Encoder
from ldm.modules.distributions import DiagonalGaussian
from ldm.modules.losses import LPIPSWithDiscriminator, VQLPIPSWithDiscriminator
from ldm.modules.losses.vqperceptual import codebook_statistics
from ldm.modules.lpips import LPIPS
from ldm.util import ConfigError, UserError

GOLDEN = load_golden("modules")
PLAIN = {"disc_start": 0, "perceptual_weight": 0.0}


def reconstruct():
    """Images, their reconstruction by one convolution, and that convolution's weight."""
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 3, 1)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    return images, layer(images), layer.weight


def test_discriminator_layout():
    discriminator = VQLPIPSWithDiscriminator(**PLAIN).discriminator
    keys = {key for key in discriminator.state_dict() if key.endswith(("weight", "bias"))}
    assert keys == {
        "main.0.weight",
        "main.0.bias",
        "main.2.weight",
        "main.3.weight",
        "main.3.bias",
        "main.5.weight",
        "main.6.weight",
        "main.6.bias",
        "main.8.weight",
        "main.9.weight",
        "main.9.bias",
        "main.11.weight",
        "main.11.bias",
    }
    assert discriminator(torch.zeros(2, 3, 64, 64)).shape == (2, 1, 6, 6)
    assert discriminator.main[2].weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_discriminator_with_actnorm_needs_a_single_process(monkeypatch):
    loss = VQLPIPSWithDiscriminator(**PLAIN, use_actnorm=True, disc_num_layers=2, disc_ndf=8)
    assert {"discriminator.main.3.loc", "discriminator.main.3.initialized"} <= set(loss.state_dict())
    images, reconstruction, _ = reconstruct()
    loss(torch.tensor(0.0), images, reconstruction, 1, 0)[0].backward()
    assert loss.discriminator.main[3].initialized and loss.discriminator.main[3].scale.grad is not None
    for name, value in (("is_initialized", True), ("get_world_size", 2)):
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    with pytest.raises(ConfigError, match="use_actnorm: expected a single process, got 2"):
        loss(torch.tensor(0.0), images, reconstruction, 1, 0)


def test_nothing_is_built_for_a_weight_of_zero():
    loss = VQLPIPSWithDiscriminator(disc_start=0, perceptual_weight=0.0, disc_weight=0.0)
    assert not loss.state_dict()
    images, reconstruction, last = reconstruct()
    value, log = loss(torch.tensor([0.5]), images, reconstruction, 0, 0, last)
    assert value.item() == pytest.approx((images - reconstruction).abs().mean().item() + 0.5, rel=1e-6)
    assert log["train/g_loss"] == 0
    with pytest.raises(ConfigError, match="disc_weight"):
        loss(torch.tensor(0.0), images, reconstruction, 1, 0)


def test_adversarial_weight_balances_the_last_layer():
    loss = VQLPIPSWithDiscriminator(**PLAIN, disc_weight=0.75, disc_num_layers=2, disc_ndf=8, codebook_weight=2.0)
    images, reconstruction, last = reconstruct()
    value, log = loss(torch.tensor(0.25), images, reconstruction, 0, 0, last, split="val")
    nll = (images - reconstruction).abs().mean()
    with torch.no_grad():
        adversarial = log["val/g_loss"]
    nll_grad = torch.autograd.grad(nll, last, retain_graph=True)[0].norm()
    g_grad = torch.autograd.grad(-loss.discriminator(reconstruction).mean(), last, retain_graph=True)[0].norm()
    weight = 0.75 * nll_grad / (g_grad + 1e-4)
    assert log["val/d_weight"].item() == pytest.approx(weight.item(), rel=1e-3)
    assert value.item() == pytest.approx((nll + weight * adversarial + 0.5).item(), rel=1e-3)
    value.backward()


def test_discriminator_waits_for_its_step():
    loss = VQLPIPSWithDiscriminator(disc_start=10, perceptual_weight=0.0, disc_num_layers=2, disc_ndf=8)
    images, reconstruction, last = reconstruct()
    early, log = loss(torch.tensor(0.0), images, reconstruction, 1, 9)
    assert early.item() == 0
    early.backward()
    late, log = loss(torch.tensor(0.0), images, reconstruction, 1, 10)
    real, fake = loss.discriminator(images), loss.discriminator(reconstruction)
    hinge = 0.5 * ((1 - real).relu().mean() + (1 + fake).relu().mean())
    assert late.item() == pytest.approx(hinge.item(), rel=1e-4)
    assert loss(torch.tensor(0.0), images, reconstruction, 0, 9, last)[1]["train/disc_factor"] == 0
    assert all(not value.requires_grad for value in log.values())


def test_validation_without_gradients():
    loss = VQLPIPSWithDiscriminator(**PLAIN, disc_num_layers=2, disc_ndf=8, n_classes=4)
    images, reconstruction, _ = reconstruct()
    indices = torch.tensor([0, 0, 1, 1])
    with torch.no_grad():
        _, log = loss(torch.tensor(0.0), images, reconstruction, 0, 5, split="val", predicted_indices=indices)
    assert log["val/d_weight"] == 0
    assert log["val/perplexity"].item() == pytest.approx(2.0, rel=1e-5)
    assert log["val/cluster_usage"] == 2


def test_codebook_statistics_extremes():
    assert codebook_statistics(torch.arange(8), 8)[0].item() == pytest.approx(8, rel=1e-5)
    perplexity, usage = codebook_statistics(torch.zeros(2, 5, dtype=torch.long), 8)
    assert (perplexity.item(), usage.item()) == (pytest.approx(1, rel=1e-5), 1)


def test_posterior_figures_and_kl_loss():
    encoder, conv = Encoder(**KL_DDCONFIG), nn.Conv2d(8, 8, 1)
    network = nn.Module()
    network.encoder, network.quant_conv = encoder, conv
    fill(network)
    with torch.no_grad():
        posterior = DiagonalGaussian(conv(encoder(inp((2, 3, 64, 64)))))
    assert_stat(posterior.mode(), GOLDEN["kl_mean"])
    assert_stat(posterior.logvar, GOLDEN["kl_logvar"])
    assert posterior.kl().tolist() == pytest.approx(GOLDEN["kl_kl"], rel=1e-5)
    loss = LPIPSWithDiscriminator(**PLAIN, disc_weight=0.0, kl_weight=0.1, logvar_init=math.log(2.0))
    images, reconstruction, _ = reconstruct()
    value, _ = loss(images, reconstruction, posterior, 0, 0)
    error = (images - reconstruction).abs().sum() / 2
    expected = error / 2 + math.log(2.0) * images[0].numel() + 0.1 * posterior.kl().mean()
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    assert "logvar" in loss.state_dict()


def test_bad_choices_name_the_key():
    with pytest.raises(ConfigError, match="disc_loss.*hinge"):
        VQLPIPSWithDiscriminator(**PLAIN, disc_loss="hing")


def test_missing_vgg_says_which_file_goes_where(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv("VGG16_WEIGHTS", raising=False)
    loss = VQLPIPSWithDiscriminator(disc_start=0)  # can be looked at and filled from a checkpoint all the same
    image = torch.rand(1, 3, 32, 32)
    with pytest.raises(UserError, match="vgg16-397923af.pth.*perceptual_weight: 0"):
        loss.perceptual_loss(image, image)
    with pytest.raises(UserError, match="no .*here.pth"):
        VQLPIPSWithDiscriminator(disc_start=0, vgg_weights=str(tmp_path / "here.pth"))
    loss.load_state_dict(loss.state_dict())
    assert (loss.perceptual_loss(image, image) == 0).all()


def test_perceptual_distance_from_files(tmp_path, monkeypatch):
    source = LPIPS(load_weights=False)
    vgg = {f"features.{key.split('.', 1)[1]}": value for key, value in source.net.state_dict().items()}
    torch.save(vgg, tmp_path / "vgg16-397923af.pth")
    monkeypatch.setenv("VGG16_WEIGHTS", str(tmp_path))
    lpips = VQLPIPSWithDiscriminator(disc_start=0, disc_weight=0.0).perceptual_loss
    assert torch.equal(lpips.net.slice3[1].weight, source.net.slice3[1].weight)
    assert (lpips.lin4.model[1].weight >= 0).all()
    assert {"scaling_layer.shift", "net.slice1.0.weight", "net.slice5.28.bias", "lin0.model.1.weight"} <= set(
        lpips.state_dict()
    )
    image = torch.rand(2, 3, 32, 32)
    assert (lpips(image, image) == 0).all()
    assert lpips(image, -image).shape == (2, 1, 1, 1)
    assert not any(parameter.requires_grad for parameter in lpips.parameters())
    (tmp_path / "vgg16-397923af.pth").write_bytes(b"no")
    with pytest.raises(UserError, match="damaged"):
        LPIPS()
