"""Stable Diffusion in a pipeline of diffusers: the same figures as in CompVis layout, training, editing, errors."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import torch
from diffusers import (
    AutoencoderTiny,
    DDPMPipeline,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.schedulers import DDPMScheduler
from omegaconf import OmegaConf
from stable_diffusion_pipeline import compvis_config, compvis_weights, save_pipeline
from test_fake_device import CUDA, fake_mode, moved, on_fake_cuda

from ldm.diffusion.directions import Edit
from ldm.diffusion.samplers import DDIMSampler
from ldm.models.diffusion.methods.noiseclr.denoiser import RunDenoiser
from ldm.models.diffusion.methods.noiseclr.directions import DirectionSet
from ldm.models.diffusion.methods.noiseclr.model import NoiseCLR
from ldm.models.diffusion.methods.noiseclr.pipeline import PipelineDenoiser
from ldm.util import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_pipeline(tmp_path_factory.mktemp("diffusers") / "pipeline")


def changed(folder, tmp_path, part, **values):
    """A copy of a pipeline with other entries in the config of a part."""
    copy = shutil.copytree(folder, tmp_path / "changed")  # makes the folders above
    path = copy / part
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return str(copy)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_noiseclr_pipeline_agrees_with_the_checkpoint_in_compvis_layout(prediction, folder, tmp_path):
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    scheduler["prediction_type"] = prediction
    theirs = PipelineDenoiser(changed(folder, tmp_path, "scheduler/scheduler_config.json", **scheduler))
    options = {"parameterization": "v"} if prediction == "v_prediction" else {}
    config = compvis_config(tmp_path / "clip", **options)
    OmegaConf.save(OmegaConf.create({"model": config}), tmp_path / "sd.yaml")
    torch.save({"state_dict": compvis_weights(theirs._pipeline)}, tmp_path / "sd.ckpt")
    ours = RunDenoiser(str(tmp_path / "sd.ckpt"), [str(tmp_path / "sd.yaml")])

    assert (ours.latent_shape, ours.row_space, ours.row_width) == (theirs.latent_shape, "token", theirs.row_width)
    texts = ["a red cube", "", "a photograph of an astronaut riding a horse " * 10]
    pairs = [[each.condition_from_texts(texts).value for each in (ours, theirs)]]
    rows = torch.randn(3, theirs.row_width)
    pairs.append([each.conditions(rows).value for each in (ours, theirs)])
    pairs.append([each.null(3).value for each in (ours, theirs)])
    images, x, t = torch.rand(3, 3, 16, 16) * 2 - 1, torch.randn(3, 4, 8, 8), torch.tensor([0, 400, 999])
    pairs.append([each.encode(images) for each in (ours, theirs)])
    pairs.append([each.decode(x) for each in (ours, theirs)])
    pairs.append([each.bottleneck_features(x, t, each.conditions(rows)) for each in (ours, theirs)])
    shift = torch.randn(3, pairs[-1][0][0].numel())
    for options in ({}, {"shift": shift}):
        pairs.append([each.predict_eps(x, t, each.conditions(rows), **options) for each in (ours, theirs)])
    for own, other in pairs:
        torch.testing.assert_close(own, other, rtol=1e-4, atol=2e-5)
    assert not torch.allclose(pairs[-1][0], pairs[-2][0])
    torch.testing.assert_close(ours.schedule.alphas_cumprod, theirs.schedule.alphas_cumprod)
    drawn = [theirs.encode(images, sample=True) for _ in range(2)]
    assert not torch.equal(*drawn)


def test_noiseclr_pipeline_gives_gradients_to_rows_alone(folder):
    torch.manual_seed(0)
    x, t, found = torch.randn(2, 4, 8, 8), torch.tensor([9, 700]), []
    for use_checkpoint in (False, True):
        denoiser = PipelineDenoiser(str(folder), use_checkpoint=use_checkpoint)
        rows = torch.full((2, denoiser.row_width), 0.1, requires_grad=True)
        denoiser.predict_eps(x, t, denoiser.conditions(rows)).square().sum().backward()
        found.append(rows.grad)
        assert all(value.grad is None and not value.requires_grad for value in denoiser.parameters())
    assert found[0].abs().min() > 0
    torch.testing.assert_close(*found)
    assert not denoiser.state_dict()


def test_noiseclr_pipeline_in_half_precision_is_computed_in_float32(folder, tmp_path):
    StableDiffusionPipeline.from_pretrained(folder).to(dtype=torch.float16).save_pretrained(tmp_path / "half")
    denoiser = PipelineDenoiser(str(tmp_path / "half"))
    assert {value.dtype for value in (*denoiser.parameters(), denoiser.empty)} == {torch.float32}
    assert denoiser.fingerprint() == PipelineDenoiser(str(folder)).fingerprint()
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([9, 700])
    with torch.autocast("cpu", torch.bfloat16):
        eps = denoiser.predict_eps(x, t, denoiser.conditions(denoiser.initial_rows(2)))
    assert torch.isfinite(eps).all()


def test_noiseclr_pipeline_starts_from_words(folder):
    denoiser = PipelineDenoiser(str(folder), tokenizer=str(folder / "tokenizer"))
    table, ids = denoiser.text_encoder.get_input_embeddings().weight, denoiser._pipeline.tokenizer
    rows = denoiser.initial_rows(3, ["face", "smile"])
    numbers = [ids(word).input_ids[1] for word in ("face", "smile", "face")]
    assert torch.equal(rows, table[numbers])
    torch.testing.assert_close(denoiser.conditions(rows[:1]).value, denoiser.condition_from_texts(["face"]).value)
    with pytest.raises(UserError, match="one token, got 'smilingly faced'"):
        denoiser.initial_rows(1, ["smilingly faced"])


def test_noiseclr_pipeline_samples_under_edits(folder):
    denoiser = PipelineDenoiser(str(folder))
    directions = DirectionSet.of(denoiser, denoiser.initial_rows(3), "token", "random")
    directions.check(denoiser)
    sampler, x = DDIMSampler(4), torch.randn(2, *denoiser.latent_shape)

    def sample(edits, **options):
        return sampler.sample(directions.edited(denoiser, edits, sampler, 2, **options), x, denoiser.schedule)

    plain, edited = sample([Edit(0, 0.0)]), sample([Edit(0, 5.0, 1, 2), Edit(2, -3.0)])
    assert torch.isfinite(edited).all() and not torch.allclose(plain, edited)
    prompt = denoiser.condition_from_texts(["a face"] * 2)
    assert not torch.allclose(sample([Edit(0, 0.0)], cond=prompt, guidance_scale=7.5), plain)
    assert denoiser.decode(edited).shape == (2, 3, 16, 16)


def test_noiseclr_pipeline_refuses_other_pipelines(folder, tmp_path):
    cases = {
        str(tmp_path / "missing"): "missing: expected the folder of a complete pipeline.*allow_download: true",
        "owner/missing": "owner/missing: expected the folder of a complete pipeline",
        str(folder / "unet"): "unet: expected the folder of a complete pipeline",
    }
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    network = UNet2DModel(block_out_channels=(32, 32), sample_size=8, **blocks)
    DDPMPipeline(network, DDPMScheduler()).save_pretrained(tmp_path / "ddpm")
    cases[str(tmp_path / "ddpm")] = "got DDPMPipeline without tokenizer, text_encoder, vae"
    index = "model_index.json"
    cases[changed(folder, tmp_path / "a", index, text_encoder=[None, None])] = "without text_encoder. Choose"
    scheduler = "scheduler/scheduler_config.json"
    cases[changed(folder, tmp_path / "b", scheduler, prediction_type="flow")] = (
        "epsilon, v_prediction, got .* with 'flow'"
    )
    with_flow = changed(folder, tmp_path / "c", index, scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"])
    FlowMatchEulerDiscreteScheduler().save_pretrained(f"{with_flow}/scheduler")
    cases[with_flow] = "scheduler with betas"
    with_tiny = changed(folder, tmp_path / "d", index, vae=["diffusers", "AutoencoderTiny"])
    shutil.rmtree(f"{with_tiny}/vae")
    AutoencoderTiny().save_pretrained(f"{with_tiny}/vae")
    cases[with_tiny] = "got .* AutoencoderTiny"
    with_mask = changed(folder, tmp_path / "f", "unet/config.json", in_channels=9)
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config(json.loads((tmp_path / "f/changed/unet/config.json").read_text()))
    unet.save_pretrained(f"{with_mask}/unet")
    cases[with_mask] = "with 4 input channels .* got 9 channels"
    shutil.copytree(folder, tmp_path / "e").joinpath("unet/diffusion_pytorch_model.safetensors").unlink()
    cases[str(tmp_path / "e")] = "expected the folder of a complete pipeline"
    for path, message in cases.items():
        with pytest.raises(UserError, match=message):
            PipelineDenoiser(path)
    with pytest.raises(UserError, match="expected the folder of a complete pipeline"):
        PipelineDenoiser(str(folder), tokenizer=str(tmp_path / "missing"))


@pytest.mark.parametrize("package", ["diffusers", "transformers"])
def test_noiseclr_pipeline_names_the_extra(package, folder, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=r"diffusers and transformers .*pip install -e \.\[diffusers\]"):
        PipelineDenoiser(str(folder))


def test_noiseclr_pipeline_trains_on_a_device_that_does_not_exist(folder):
    params = {"pretrained_model": str(folder), "use_checkpoint": True}
    target = f"{PipelineDenoiser.__module__}.{PipelineDenoiser.__name__}"
    model, mode = NoiseCLR({"target": target, "params": params}, 4, 2), fake_mode()
    on_fake_cuda(model, mode)
    batch = {"image": moved(torch.zeros(2, 16, 16, 3), mode)}
    x, t = moved(torch.zeros(2, 4, 8, 8), mode), moved(torch.zeros(2).long(), mode)
    with mode:
        loss = model.shared_step(batch)
        eps = model.denoiser.predict_eps(x, t, model.denoiser.condition_from_texts(["a", "b"]))
    assert loss.device == eps.device == CUDA and loss.requires_grad
