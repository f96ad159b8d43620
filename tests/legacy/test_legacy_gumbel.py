"""GumbelVQ of taming-transformers: quantizer, training, and the layout of its checkpoints."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from taming_configs import DDCONFIG, LOSS, SCHEDULE, save
from torch.utils.data import DataLoader

from ldm.util import ConfigError, instantiate_from_config


def gumbel(**params: Any) -> Any:
    own = {"ddconfig": DDCONFIG, "lossconfig": LOSS, "n_embed": 16, "embed_dim": 4}
    own |= {"temperature_scheduler_config": SCHEDULE, "kl_weight": 1e-2}
    return instantiate_from_config({"target": "taming.models.vqgan.GumbelVQ", "params": {**own, **params}})


def plain_gumbel(weights: dict[str, torch.Tensor], z: torch.Tensor, tau: float, seed: int, hard: bool) -> tuple:
    """Codes, loss and indices, one position at a time."""
    weight, bias, codes = weights["proj.weight"][:, :, 0, 0], weights["proj.bias"], weights["embed.weight"]
    torch.manual_seed(seed)
    noise = -torch.empty(len(z), len(codes), *z.shape[2:]).exponential_().log()
    result, divergences, indices = torch.empty(len(z), codes.shape[1], *z.shape[2:]), [], []
    for b in range(len(z)):
        for y in range(z.shape[2]):
            for x in range(z.shape[3]):
                logits = weight @ z[b, :, y, x] + bias
                share = torch.softmax((logits + noise[b, :, y, x]) / tau, 0)
                indices.append(int(share.argmax()))
                result[b, :, y, x] = codes[indices[-1]] if hard else share @ codes
                q = torch.softmax(logits, 0)
                divergences.append((q * (q * len(codes) + 1e-10).log()).sum())
    return result, torch.stack(divergences).mean(), torch.tensor(indices)


@pytest.mark.parametrize(("straight_through", "training"), [(True, True), (False, True), (False, False)])
def test_the_gumbel_quantizer_equals_a_plain_one(straight_through: bool, training: bool) -> None:
    params = {"num_hiddens": 5, "embedding_dim": 3, "n_embed": 7, "straight_through": straight_through}
    params |= {"kl_weight": 0.3, "temp_init": 0.7}
    quantize = instantiate_from_config({"target": "taming.modules.vqvae.quantize.GumbelQuantize", "params": params})
    assert {key: tuple(value.shape) for key, value in quantize.state_dict().items()} == {
        "proj.weight": (7, 5, 1, 1),
        "proj.bias": (7,),
        "embed.weight": (7, 3),
    }
    z = torch.randn(2, 5, 2, 3)
    hard = straight_through or not training
    expected, divergence, indices = plain_gumbel(quantize.state_dict(), z, 0.7, 4, hard)
    torch.manual_seed(4)
    codes, loss, (_, _, found) = quantize.train(training)(z)
    assert torch.allclose(codes, expected, atol=1e-6) and torch.allclose(loss, 0.3 * divergence, atol=1e-6)
    assert torch.equal(found.flatten(), indices)
    assert torch.equal(quantize.get_codebook_entry(found.flatten(), (2, 2, 3, 3)), quantize.embed(found).movedim(3, 1))


def test_a_gumbel_autoencoder_trains_with_its_temperature(tmp_path: Path) -> None:
    model = gumbel()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    batches = [{"image": torch.randint(0, 256, (16, 16, 3), dtype=torch.uint8)} for _ in range(6)]
    options = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(max_steps=3, accelerator="cpu", logger=False, **options)
    trainer.fit(model, DataLoader(batches, batch_size=2))
    moved = {key.split(".")[0] for key, value in model.state_dict().items() if not torch.equal(before[key], value)}
    assert {"encoder", "decoder", "quantize", "quant_conv", "post_quant_conv", "loss"} <= moved
    last = 0.1 + 0.4 * (1 + math.cos(math.pi * 2 / 4))
    assert float(trainer.callback_metrics["temperature"]) == pytest.approx(last)
    assert model.quantize.temperature == pytest.approx(last)
    again = gumbel(ckpt_path=save(model, tmp_path / "gumbel.ckpt"))
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())


def test_the_layout_of_the_published_gumbel_autoencoder() -> None:
    """Key names and shapes of the openimages model with 8192 codes, by rule, without memory for its weights."""
    ddconfig = {**DDCONFIG, "z_channels": 256, "resolution": 256, "ch": 128, "ch_mult": [1, 1, 2, 4]}
    ddconfig |= {"num_res_blocks": 2, "attn_resolutions": [32]}
    with torch.device("meta"):
        dummy = {"target": "taming.modules.losses.vqperceptual.DummyLoss"}
        model = gumbel(ddconfig=ddconfig, n_embed=8192, embed_dim=256, lossconfig=dummy)
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    expected = {
        "quantize.proj.weight": (8192, 256, 1, 1),
        "quantize.proj.bias": (8192,),
        "quantize.embed.weight": (8192, 256),
        "quant_conv.weight": (256, 256, 1, 1),
        "quant_conv.bias": (256,),
        "post_quant_conv.weight": (256, 256, 1, 1),
        "post_quant_conv.bias": (256,),
    }
    assert {key: shape for key, shape in shapes.items() if not key.startswith(("encoder.", "decoder."))} == expected


def test_gumbel_codes_are_as_wide_as_the_networks_channels() -> None:
    with pytest.raises(ConfigError, match="embed_dim: expected 4, as ddconfig.z_channels, for GumbelVQ, got 8"):
        gumbel(embed_dim=8)
    loss = {**LOSS, "params": {**LOSS["params"], "disc_conditional": True}}
    with pytest.raises(ConfigError, match="lossconfig.params.disc_conditional: expected false"):
        gumbel(lossconfig=loss)


def test_gumbel_codes_agree_with_torch() -> None:
    """The draw is torch's own, so that a seed gives the same codes as in taming-transformers."""
    quantize = gumbel().quantize.eval()
    z = torch.randn(1, 4, 2, 2)
    torch.manual_seed(1)
    codes = quantize(z)[0]
    torch.manual_seed(1)
    choice = F.gumbel_softmax(quantize.proj(z), tau=1.0, dim=1, hard=True)
    assert torch.allclose(codes, torch.einsum("bnhw,nd->bdhw", choice, quantize.embed.weight))
