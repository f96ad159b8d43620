"""Inpainting of latent-diffusion, and Stable Diffusion's models that differ by their condition."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from condition_parts import TEXTS, batch, data, diffusion, drawn, first_stage, sampled, train
from stand_ins import LDM_SCHEDULE

from ldm.diffusion.samplers import DDIMSampler
from ldm.diffusion.schedule import make_beta_schedule
from ldm.evaluation.sampling.request import Request
from ldm.evaluation.sampling.sources import source_of
from ldm.models.diffusion.ddpm import LatentDiffusion, LatentInpaintDiffusion
from ldm.util import ConfigError, UserError, instantiate_from_config

WORDS = {"cond_stage_key": "txt", "cond_stage_config": {"target": "condition_parts.OwnWords"}}
HYBRID = {"conditioning_key": "hybrid", **WORDS}
LDM_INPAINTING = {"cond_stage_key": "masked_image", "cond_stage_config": "__is_first_stage__", "concat_mode": True}
NOISED = {
    "target": "ldm.modules.diffusionmodules.upscaling.ImageConcatWithNoiseAugmentation",
    "params": {"noise_schedule_config": {"linear_start": 1e-4, "linear_end": 2e-2}, "max_noise_level": 350},
}
X4 = {"low_scale_key": "lr", "low_scale_config": NOISED, "conditioning_key": "hybrid-adm", **WORDS}
VQ3 = {"channels": 3, "first_stage_config": first_stage("vq", channels=3)}
CONFIGS = {
    "ldm, KL 4+4+1": diffusion(unet={"in_channels": 9}, **LDM_INPAINTING),
    "ldm, VQ 3+3+1": diffusion(unet={"in_channels": 7, "out_channels": 3}, **LDM_INPAINTING, **VQ3),
    "inpainting": diffusion("LatentInpaintDiffusion", {"in_channels": 9, **TEXTS}, finetune_keys=None, **HYBRID),
    "inpainting without text": diffusion(
        "LatentInpaintDiffusion", {"in_channels": 9}, conditioning_key="concat", use_ema=False
    ),
    "depth": diffusion(
        "LatentDepth2ImageDiffusion",
        {"in_channels": 5, **TEXTS},
        depth_stage_config={"target": "ldm.modules.midas.api.MiDaSInference", "params": {"model_type": "dpt_hybrid"}},
        **HYBRID,
    ),
    "upscaler": diffusion("LatentUpscaleDiffusion", {"in_channels": 7, "num_classes": 1000, **TEXTS}, **X4),
    "upscaler, finetuned": diffusion("LatentUpscaleFinetuneDiffusion", {"in_channels": 7, **TEXTS}, **HYBRID),
    "text and vector": diffusion(
        unet={"num_classes": "sequential", "adm_in_channels": 3, **TEXTS},
        conditioning_key="crossattn-adm",
        cond_stage_key="txt",
        cond_stage_config={"target": "condition_parts.WordsAndVector"},
    ),
}
SHOWN = {
    "ldm, KL 4+4+1": {"conditioning", "concat_mask"},
    "inpainting": {"conditioning", "concat_mask", "concat_masked_image"},
    "depth": {"conditioning", "concat_midas_in"},
    "upscaler": {"conditioning", "concat_lr"},
}


def build(name, **params):
    torch.manual_seed(0)
    config = CONFIGS[name]
    return instantiate_from_config({**config, "params": {**config["params"], **params}})


@pytest.mark.parametrize("name", CONFIGS)
def test_two_steps_with_pictures_and_samples(name, tmp_path, capsys):
    run = train(tmp_path, CONFIGS[name], data(size=(32, 48)))
    assert {"inputs", "samples", *SHOWN.get(name, ())} <= drawn(run)
    assert sampled(capsys, run, "-n", "3") == (3, 32, 48, 3)
    text = ["--text", "a hill", "--guidance_scale", "3", "--negative_text", "a cube"]
    has_text = CONFIGS[name]["params"].get("cond_stage_key") == "txt"
    assert (sampled(capsys, run, "-n", "2", *text) == (2, 32, 48, 3)) == has_text


def test_the_mask_of_latent_diffusion_follows_the_masked_image():
    model, given = build("ldm, KL 4+4+1").eval(), batch(size=(32, 48))
    maps = torch.cat(model.get_condition(given).inputs("concat")["c_concat"], dim=1)
    assert maps.shape == (2, 9 - 4, 8, 12)
    masked = model.first_stage_model.encode(given["masked_image"].permute(0, 3, 1, 2)).mode()
    assert torch.allclose(maps[:, :4], masked, atol=1e-5)
    assert torch.equal(maps[0, 4], (torch.arange(8) < 4).float()[:, None].expand(8, 12))
    as_bytes = {**given, "mask": (given["mask"] * 255).byte()}
    as_bools = {**given, "mask": given["mask"][..., 0] > 0}
    as_ones = {**given, "mask": given["mask"].byte()}
    for other in (as_bytes, as_bools, as_ones):  # latent-diffusion's masks are in [-1, 1]
        mask = model.get_condition(other).inputs("concat")["c_concat"][1]
        assert torch.equal(mask, 2 * maps[:, 4:] - 1)
    dropped = model.get_condition(given).drop(torch.tensor([True, False])).inputs("concat")["c_concat"]
    assert all(not part[0].any() and part[1].any() for part in dropped)


def test_a_condition_that_does_not_fit_the_network_is_named():
    with pytest.raises(ConfigError, match="in_channels: expected at least 8, .* the 4 channels .* got 4"):
        instantiate_from_config(diffusion(unet={"in_channels": 4}, **LDM_INPAINTING))
    model = instantiate_from_config(diffusion(unet={"in_channels": 10}, **LDM_INPAINTING))
    with pytest.raises(UserError, match=r"expected 10 channels .* got 9 \(4 \+ 4 \+ 1"):
        model.shared_step(batch())
    model = instantiate_from_config(diffusion(unet={"in_channels": 9}, **LDM_INPAINTING))
    with pytest.raises(UserError, match="expected an entry 'mask', got image, jpg"):
        model.shared_step({key: value for key, value in batch().items() if key != "mask"})
    identity = {"cond_stage_key": "lr", "cond_stage_config": {"target": "torch.nn.Identity"}}
    model = instantiate_from_config(diffusion(unet={"in_channels": 7}, **identity))
    model.shared_step(batch())
    with pytest.raises(UserError, match=r"size \(8, 8\), got \(16, 16\)"):
        model.shared_step(batch(low=2))


def test_an_upscaler_embeds_all_levels_of_noise():
    few = diffusion("LatentUpscaleDiffusion", {"in_channels": 7, "num_classes": 349, **TEXTS}, **X4)
    with pytest.raises(ConfigError, match=r"num_classes: expected at least 350, the max_noise_level .*, got 349"):
        instantiate_from_config(few)


def test_stable_diffusion_inpainting_concatenates_mask_then_masked_latent():
    model, given = build("inpainting", scale_factor=0.5).eval(), batch()
    torch.manual_seed(1)
    inputs = model.get_condition(given).inputs("hybrid")
    mask, masked = inputs["c_concat"]
    assert mask.shape == (2, 1, 8, 8) and set(mask.unique().tolist()) == {0.0, 1.0}
    as_bytes = model.get_condition({**given, "mask": (given["mask"] * 255).byte()}).inputs("hybrid")["c_concat"][0]
    assert torch.equal(as_bytes, mask)
    torch.manual_seed(1)
    encoded = 0.5 * model.first_stage_model.encode(given["masked_image"].permute(0, 3, 1, 2)).sample()
    assert torch.allclose(masked, encoded, atol=1e-5)
    assert inputs["c_crossattn"][0].shape == (2, 3, 8)
    null = model.get_condition(given).null().inputs("hybrid")
    assert null["c_concat"][0].any()  # guidance is by the text alone
    assert torch.equal(null["c_crossattn"][0][1], model.cond_stage_model.encode([""])[0])
    with pytest.raises(ConfigError, match="expected hybrid or concat for LatentInpaintDiffusion"):
        build("inpainting", conditioning_key="crossattn")
    with pytest.raises(ConfigError, match="expected a condition stage for 'hybrid'"):
        build("inpainting", cond_stage_config="__is_unconditional__")


@pytest.mark.parametrize("only_unet", [False, True])
def test_the_first_convolution_of_a_text_model_is_widened_with_zeros(tmp_path, caplog, only_unet):
    base = instantiate_from_config(diffusion(unet=TEXTS, conditioning_key="crossattn", **WORDS))
    torch.save({"state_dict": base.state_dict()}, tmp_path / "base.ckpt")
    start = {"ckpt_path": str(tmp_path / "base.ckpt"), "load_only_unet": only_unet}
    with pytest.raises(UserError, match="other shapes"):
        build("inpainting", **start)
    key = "model.diffusion_model.input_blocks.0.0.weight"
    average = "model_ema.diffusion_modelinput_blocks00weight"
    with caplog.at_level(logging.INFO):
        model = build("inpainting", finetune_keys=[key, average], **start)
    assert len([line for line in caplog.messages if "channels loaded" in line and line.startswith(key)]) == 1
    for name in (key, average):
        weight = model.state_dict()[name]
        assert torch.equal(weight[:, :4], base.state_dict()[key]) and not weight[:, 4:].any()
    state = model.state_dict()
    torch.save({"state_dict": state}, tmp_path / "wide.ckpt")  # a checkpoint of nine channels is loaded as it is
    again = build("inpainting", finetune_keys=[key], ckpt_path=str(tmp_path / "wide.ckpt"))
    assert torch.equal(again.state_dict()[key], state[key])


def test_depth_maps_are_resized_and_normalized():
    model, given = build("depth").eval(), batch(size=(32, 48))
    depth = model.get_condition(given).inputs("hybrid")["c_concat"][0]
    assert depth.shape == (2, 1, 8, 12)
    assert torch.allclose(depth.amin((1, 2, 3)), torch.tensor(-1.0))
    assert torch.allclose(depth.amax((1, 2, 3)), torch.tensor(1.0), atol=1e-3)
    small = F.interpolate(given["midas_in"][:, None], (8, 12), mode="bicubic", align_corners=False)
    assert torch.equal(depth[0].flatten().argsort(), small[0].flatten().argsort())
    with pytest.raises(UserError, match=r"expected 5 channels .* got 7 \(4 \+ 3"):
        model.shared_step({**given, "midas_in": given["jpg"]})


def test_the_upscaler_noises_the_small_image_and_passes_the_level():
    model, given = build("upscaler").eval(), batch()
    torch.manual_seed(3)
    inputs = model.get_condition(given).inputs("hybrid-adm")
    torch.manual_seed(3)
    level, noise = torch.randint(0, 350, (2,)), torch.randn(2, 3, 8, 8)
    abar = torch.from_numpy(np.cumprod(1 - make_beta_schedule("linear", 1000))).float()[level].reshape(2, 1, 1, 1)
    small = given["lr"].permute(0, 3, 1, 2)
    assert torch.equal(inputs["c_adm"], level)
    assert torch.allclose(inputs["c_concat"][0], abar.sqrt() * small + (1 - abar).sqrt() * noise, atol=1e-6)
    names = {key.removeprefix("low_scale_model.") for key in model.state_dict() if key.startswith("low_scale_model.")}
    assert names == {name for name in LDM_SCHEDULE if not name.startswith("posterior")}
    assert torch.equal(model.low_scale_model(small, torch.tensor([5, 7]))[1], torch.tensor([5, 7]))
    latent = model.sample(torch.randn(2, 4, 8, 8), model.get_condition(given), DDIMSampler(2), guidance_scale=4.0)
    assert latent.shape == (2, 4, 8, 8)
    request = Request(texts=(("a hill",),), negative_text="blurred", guidance=2.0)
    conditions = [each.parts for each in source_of(model, request).condition(given, slice(0, 2))]
    for place in ("c_concat", "c_adm"):  # the same noise beside both texts
        assert torch.equal(*(parts[place][0].value for parts in conditions))
    assert not torch.equal(*(parts["c_crossattn"][0].value for parts in conditions))
    with pytest.raises(UserError, match=r"size \(8, 8\), got \(16, 16\)"):
        model.shared_step(batch(low=2))
    with pytest.raises(ConfigError, match="expected hybrid or concat for LatentUpscaleDiffusion"):
        build("upscaler", conditioning_key="crossattn")


def test_guidance_by_a_stage_of_words_and_a_vector_is_relative_to_the_empty_text():
    model = build("text and vector").eval()
    cond = model.get_condition(batch())
    inputs, null = (each.inputs("crossattn-adm") for each in (cond, cond.null()))
    empty = model.cond_stage_model.encode(["", ""])["c_crossattn"]
    assert torch.equal(null["c_crossattn"][0], empty) and not torch.equal(inputs["c_crossattn"][0], empty)
    assert torch.equal(null["c_adm"], inputs["c_adm"])


def test_options_of_stable_diffusion(tmp_path, caplog):
    dropping = build("inpainting", ucg_training={"txt": {"p": 0.25, "val": ""}})
    assert dropping.loss_options.cond_drop_prob == 0.25
    for wrong in ({"jpg": {"p": 0.1, "val": ""}}, {"txt": {"p": 0.1, "val": "x"}}):
        with pytest.raises(ConfigError, match="ucg_training: expected {txt"):
            build("inpainting", ucg_training=wrong)
    build("depth", make_it_fit=True, c_concat_log_start=1)
    assert "depth_stage_config, make_it_fit, c_concat_log_start ignored" in caplog.text
    model = build("inpainting", reset_ema=False, make_it_fit=False, ucg_training=None)
    assert isinstance(model, LatentInpaintDiffusion) and isinstance(model, LatentDiffusion)
    for value in model.model_ema.buffers():
        value.add_(1)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "x.ckpt")
    path = str(tmp_path / "x.ckpt")
    kept, reset = build("inpainting", ckpt_path=path), build("inpainting", ckpt_path=path, reset_ema=True)
    name = "diffusion_modelinput_blocks00weight"
    assert torch.equal(kept.model_ema.get_buffer(name), model.model_ema.get_buffer(name))
    assert torch.equal(reset.model_ema.get_buffer(name), reset.model.diffusion_model.input_blocks[0][0].weight)
    assert int(kept.model_ema.num_updates) == 1 and int(reset.model_ema.num_updates) == 0


def test_pictures_with_guidance():
    model = build("inpainting").eval()
    options = {"ddim_steps": 2, "use_ema_scope": False, "inpaint": False, "plot_diffusion_rows": False}
    guided = {"unconditional_guidance_scale": 5.0, "unconditional_guidance_label": ["a cube"]}
    pictures = model.log_images(batch(), **options, **guided)
    assert pictures["samples_cfg_scale_5.00"].shape == (2, 3, 32, 32)
    assert not torch.equal(pictures["samples_cfg_scale_5.00"], pictures["samples"])
    assert "samples_cfg_scale_5.00" not in model.log_images(batch(), **options)
