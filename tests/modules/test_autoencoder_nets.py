"""Encoder, decoder and quantiser: reference figures, state-dict keys, patches, codebook renewal."""

from __future__ import annotations

import copy

import pytest
import torch
from golden_recipe import KL_DDCONFIG, VQ_DDCONFIG, assert_stat, fill, inp, load_golden
from torch import nn

from ldm.modules.diffusionmodules.model import Decoder, Encoder
from ldm.modules.quantize import VectorQuantizer2
from ldm.util import ConfigError

GOLDEN = load_golden("modules")
TINY = {
    "ch": 32,
    "ch_mult": [1, 2],
    "num_res_blocks": 1,
    "resolution": 16,
    "in_channels": 3,
    "out_ch": 3,
    "z_channels": 4,
    "double_z": False,
}


class VQ(nn.Module):
    """The networks of a VQ autoencoder under their checkpoint names."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder(**VQ_DDCONFIG)
        self.decoder = Decoder(**VQ_DDCONFIG)
        self.quantize = VectorQuantizer2(2048, 3, beta=0.25)
        self.quant_conv = nn.Conv2d(3, 3, 1)
        self.post_quant_conv = nn.Conv2d(3, 3, 1)


class KL(nn.Module):
    """The networks of a KL autoencoder under their checkpoint names."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder(**KL_DDCONFIG)
        self.decoder = Decoder(**KL_DDCONFIG)
        self.quant_conv = nn.Conv2d(8, 8, 1)
        self.post_quant_conv = nn.Conv2d(4, 4, 1)


def test_vq_figures():
    with torch.no_grad():
        vq = fill(VQ())
        latent = vq.quant_conv(vq.encoder(inp((2, 3, 64, 64))))
        quantised, loss, (_, _, indices) = vq.quantize(latent)
        decoded = vq.decoder(vq.post_quant_conv(quantised))
        direct = vq.decoder(vq.post_quant_conv(latent))
    assert_stat(latent, GOLDEN["vq_encode"])
    assert_stat(direct, GOLDEN["vq_decode_noquant"])
    assert loss.item() == pytest.approx(GOLDEN["vq_quant_loss"], rel=1e-5)
    # The filled codebook lies densely on a curve, so that a dozen of the 512 vectors have two nearest codes closer
    # than float32 can tell apart; which of them wins depends on the processor, and the sums with it.
    assert_stat(quantised, GOLDEN["vq_quant"], tolerance=2e-3)
    assert_stat(decoded, GOLDEN["vq_decode"], tolerance=2e-3)
    distances = torch.cdist(vectors(latent), vq.quantize.embedding.weight.double()).square()
    chosen, golden = distances.gather(1, indices[:, None])[:, 0], torch.tensor(GOLDEN["vq_ind_first8"])
    nearest = distances.min(dim=1).values
    assert (chosen - nearest).max() < 1e-5
    assert (distances[:8].gather(1, golden[:, None])[:, 0] - nearest[:8]).max() < 1e-5


def vectors(latent):
    """(B, C, H, W) -> (B * H * W, C) in double precision."""
    return latent.permute(0, 2, 3, 1).flatten(0, 2).double()


def test_kl_figures():
    with torch.no_grad():
        kl = fill(KL())
        mean, logvar = kl.quant_conv(kl.encoder(inp((2, 3, 64, 64)))).chunk(2, dim=1)
        decoded = kl.decoder(kl.post_quant_conv(mean))
    assert_stat(mean, GOLDEN["kl_mean"])
    assert_stat(logvar, GOLDEN["kl_logvar"])
    assert_stat(decoded, GOLDEN["kl_decode_mode"])


def test_attention_and_level_keys():
    encoder = Encoder(**{**TINY, "attn_resolutions": [8], "resolution": 16})
    keys = set(encoder.state_dict())
    assert {
        "down.1.attn.0.q.weight",
        "down.0.downsample.conv.weight",
        "mid.attn_1.proj_out.bias",
        "down.1.block.0.nin_shortcut.weight",
    } <= keys
    assert not any(key.startswith(("down.0.attn", "down.1.downsample")) for key in keys)
    decoder_keys = set(Decoder(**TINY).state_dict())
    assert {"up.1.upsample.conv.weight", "up.0.block.1.conv2.weight", "up.0.block.0.nin_shortcut.bias"} <= decoder_keys
    assert not any(key.startswith("up.0.upsample") for key in decoder_keys)


@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_patches_fold_and_unfold(patch_size):
    ddconfig = {**TINY, "patch_size": patch_size}
    latent = Encoder(**ddconfig)(torch.randn(2, 3, 16, 16))
    assert latent.shape == (2, 4, 8 // patch_size, 8 // patch_size)
    assert Decoder(**ddconfig)(latent).shape == (2, 3, 16, 16)


def test_bad_ddconfig_names_the_key():
    with pytest.raises(ConfigError, match="chanels"):
        Encoder(**TINY, chanels=3)
    with pytest.raises(ConfigError, match="resolution: expected a number or .height, width.* at least 4 .* got 3"):
        Encoder(**{**TINY, "resolution": 3, "ch_mult": [1, 2, 4]})
    with pytest.raises(ConfigError, match="multiple of 32"):
        Encoder(**{**TINY, "ch": 20})


def test_straight_through_gradient_and_losses():
    z = torch.randn(2, 3, 4, 4, requires_grad=True)
    quantize = VectorQuantizer2(8, 3, beta=0.25)
    quantised, loss, _ = quantize(z)
    quantised.sum().backward(retain_graph=True)
    assert torch.equal(z.grad, torch.ones_like(z))
    codes = quantised.detach()
    assert loss.item() == pytest.approx(1.25 * (codes - z).square().mean().item(), rel=1e-5)


def test_codebook_starts_from_the_first_training_batch_only():
    quantize = VectorQuantizer2(16, 3, init_from_data=True).train()
    z = torch.randn(2, 3, 8, 8)
    quantize.eval()(z)
    assert not quantize.is_initialised
    quantize.train()(z)
    vectors = z.movedim(1, -1).reshape(-1, 3)
    assert (quantize.embedding.weight[:, None] == vectors).all(-1).any(-1).all()
    assert len(quantize.embedding.weight.unique(dim=0)) == 16
    before = quantize.embedding.weight.clone()
    quantize(torch.randn(2, 3, 8, 8))
    assert torch.equal(before, quantize.embedding.weight)


def test_unused_codes_revive_and_resume_exactly():
    torch.manual_seed(0)
    quantize = VectorQuantizer2(32, 3, revive_every=2).train()
    with torch.no_grad():
        quantize.embedding.weight[8:] += 100  # out of reach
    batches = [torch.randn(2, 3, 8, 8) for _ in range(5)]
    quantize(batches[0])
    resumed = VectorQuantizer2(32, 3, revive_every=2).train()
    resumed.load_state_dict(copy.deepcopy(quantize.state_dict()))
    for twin in (quantize, resumed):
        torch.manual_seed(1)
        twin(batches[1])
        assert (twin.embedding.weight > 50).any()
        twin(batches[2])
        assert (twin.embedding.weight < 50).all()
    assert torch.equal(quantize.embedding.weight, resumed.embedding.weight)
    assert torch.equal(quantize.use_counts, resumed.use_counts)


def test_reference_codebook_loads_as_initialised():
    reference = VectorQuantizer2(16, 3)
    assert list(reference.state_dict()) == ["embedding.weight"]
    quantize = VectorQuantizer2(16, 3, init_from_data=True, revive_every=10).train()
    quantize.load_state_dict(reference.state_dict())
    quantize(torch.randn(1, 3, 4, 4))
    assert torch.equal(quantize.embedding.weight, reference.embedding.weight)


def test_a_codebook_that_does_not_renew_its_codes_drops_the_counters_of_one_that_did():
    renewing = VectorQuantizer2(8, 3, 0.25, init_from_data=True, revive_every=5)
    plain = VectorQuantizer2(8, 3, 0.25)
    assert plain.load_state_dict(renewing.state_dict(), strict=False).unexpected_keys == []
    assert renewing.load_state_dict(plain.state_dict(), strict=False).missing_keys == []
    assert renewing.is_initialised
