"""Weights of DisDiff: where they come from, and their names in checkpoints."""

import pytest
import torch
from stand_ins import DISDIFF_SCHEDULE, LDM_SCHEDULE, TINY_UNET, vq_config
from test_disdiff import build

from ldm.models.diffusion.ddpm import LatentDiffusion


def latent_diffusion(**params):
    return LatentDiffusion(
        first_stage_config=vq_config(),
        cond_stage_config="__is_unconditional__",
        unet_config={"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": TINY_UNET},
        image_size=8,
        channels=4,
        timesteps=20,
        **params,
    )


def test_starts_from_the_averaged_weights_and_the_scale_of_a_latent_diffusion_model(tmp_path):
    torch.manual_seed(1)
    ldm = latent_diffusion(scale_by_std=True)
    ldm.scale_factor.fill_(0.7)
    ldm.model_ema.diffusion_modelout2bias += 1
    torch.save({"state_dict": ldm.state_dict()}, tmp_path / "ldm.ckpt")
    base = {"ckpt_path": str(tmp_path / "ldm.ckpt"), "load_ema_ckpt": True}
    model = build(unet=base, scale_by_std=True)
    bias = ldm.model.diffusion_model.out[2].bias
    assert torch.equal(model.model.diffusion_model.out[2].bias, bias + 1)
    assert model.scale_factor == pytest.approx(0.7) and model._has_scale
    inverted = build(unet={**base, "legacy_load_ema_flag": True})
    assert torch.equal(inverted.model.diffusion_model.out[2].bias, bias)
    torch.save(model.state_dict(), tmp_path / "disdiff.ckpt")
    again = build(ckpt_path=str(tmp_path / "disdiff.ckpt"), scale_by_std=True)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_keys_are_the_familys():
    """Everything a DisDiff checkpoint of the reference holds, and nothing else."""
    state = build(scale_by_std=True).state_dict()
    heads = {name.partition(".")[0] for name in state}
    parts = {"scale_factor", "model", "model_ema", "first_stage_model", "cond_stage_model"}
    assert heads == LDM_SCHEDULE | DISDIFF_SCHEDULE | parts
    encoder = {name.removeprefix("cond_stage_model.encoder.") for name in state if name.startswith("cond_stage_model.")}
    assert {"0.weight", "1.running_var", "9.convs.2.num_batches_tracked", "12.convs.4.bias", "14.weight"} <= encoder
    network = {name.split(".")[2] for name in state if name.startswith("model.")}
    assert network == {
        "time_embed",
        "input_blocks",
        "middle_block",
        "output_blocks",
        "out",
        "shift_middle_block",
        "shift_output_blocks",
        "shift_out",
        "repre_embed",
        "part_emb",
        "part_latents",
    }


def test_shift_layers_start_from_a_base_that_comes_with_the_whole_model(tmp_path):
    """init_shift_from_base with weights by model.params.ckpt_path: the copied weights are the loaded ones."""
    plain = latent_diffusion()
    torch.save({"state_dict": {**plain.state_dict()}}, tmp_path / "base.ckpt")
    model = build(unet={"init_shift_from_base": True}, ckpt_path=str(tmp_path / "base.ckpt"))
    network, base = model.model.diffusion_model, plain.model.diffusion_model
    own, loaded = dict(network.named_parameters()), dict(base.named_parameters())
    twins = [name for name in own if name.startswith("shift_middle_block") and name.removeprefix("shift_") in loaded]
    twins = [name for name in twins if loaded[name.removeprefix("shift_")].any()]  # ``build`` fills what is zero
    assert len(twins) > 4
    for name in twins:
        assert torch.equal(own[name], loaded[name.removeprefix("shift_")]), name
        average = model.model_ema.get_buffer("diffusion_model" + name.replace(".", ""))
        assert torch.equal(average, own[name])
