"""NoiseCLR on every model of this package that has a condition: training, gradients, edits."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch
from clip_guided_models import SIZE, WIDTH, batch_of, towers_of
from clip_guided_models import build as build_clip_guided
from direction_models import MODEL, save_text_model
from legacy_configs import save_clip
from stand_ins import PLAIN_UNET, vq_config
from test_encdiff import build as build_encdiff

from ldm.diffusion.directions import Edit
from ldm.diffusion.samplers import DDIMSampler
from ldm.models.diffusion.methods.noiseclr.denoiser import ModelDenoiser
from ldm.models.diffusion.methods.noiseclr.model import NoiseCLR
from ldm.runs.load import load_run
from ldm.util import UserError, instantiate_from_config

ADM = {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel"}
ADM = {**ADM, "params": {**PLAIN_UNET, "num_classes": "sequential", "adm_in_channels": WIDTH}}
LATENT = {"unet_config": ADM, "first_stage_config": vq_config(), "channels": 4}
CASES = [(name, space) for name in ("pixel", "latent", "bert", "phrases") for space in ("token", "condition")]
CASES += [("pixel-without-texts", "condition"), ("encdiff", "condition")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An untrained CLIP, and an LDM of texts."""
    root = tmp_path_factory.mktemp("models")
    save_clip(root / "clip")
    save_text_model(root / "bert")
    return root


def model_of(name, folder):
    """A small model in which layers that start at zero have weights, so that conditions change its output."""
    clip = folder / "clip"
    if name == "bert":
        return load_run(str(folder / "bert")).model
    if name == "encdiff":
        model = build_encdiff()
    elif name == "phrases":
        params = {**MODEL["params"], "use_ema": True}
        stage = {"target": "ldm.modules.encoders.modules.FrozenCLIPTextEmbedder"}
        params["cond_stage_config"] = {**stage, "params": {"version": str(clip), "max_phrases": 3}}
        unet = params["unet_config"]
        params["unet_config"] = {**unet, "params": {**unet["params"], "context_dim": WIDTH}}
        model = instantiate_from_config({"target": MODEL["target"], "params": params})
    else:
        towers = {} if name == "pixel-without-texts" else {"cond_stage_config": towers_of(clip)}
        model = build_clip_guided(**towers, **(LATENT if name == "latent" else {}))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)
    if model.use_ema:
        model.model_ema.restart(model.model)
    return model


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(case))
def model(request, folder):
    name, space = request.param
    torch.manual_seed(0)
    params = {"model": model_of(name, folder), "row_space": space}
    config = {"target": f"{ModelDenoiser.__module__}.ModelDenoiser", "params": params}
    return NoiseCLR(config, num_directions=5, directions_per_iteration=2, weight_decay=0.0)


class Images(torch.utils.data.Dataset):
    """Two batches of images."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return {"image": batch_of(2, self.size)["image"]}


def image_size(model):
    return SIZE if model.denoiser.latent_shape[0] == 3 else 32


def test_rows_that_were_drawn_have_gradients(model):
    model.rows.grad = None
    x = torch.randn(2, *model.denoiser.latent_shape, generator=torch.Generator().manual_seed(0))
    model.loss_at(x, torch.full((2,), 10), torch.tensor([3, 0, 1])).backward()
    has_gradient = model.rows.grad.abs().sum(dim=1) > 0
    assert has_gradient.tolist() == [True, True, False, True, False] and model.rows.grad.isfinite().all()
    assert not any(value.requires_grad or value.grad is not None for value in model.denoiser.parameters())
    model.rows.grad = None


def test_two_steps_of_training_move_the_rows_alone(model, tmp_path):
    before = model.rows.detach().clone()
    frozen = {name: value.clone() for name, value in model.denoiser.named_parameters()}
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    trainer = pl.Trainer(accelerator="cpu", default_root_dir=tmp_path, max_steps=2, **quiet)
    trainer.fit(model, torch.utils.data.DataLoader(Images(image_size(model)), batch_size=None))
    assert trainer.global_step == 2 and not torch.equal(model.rows, before) and model.rows.isfinite().all()
    assert all(torch.equal(value, frozen[name]) for name, value in model.denoiser.named_parameters())


def test_edits_change_the_images(model):
    denoiser, directions, sampler = model.denoiser, model.directions, DDIMSampler(3)
    directions.check(denoiser)
    x = torch.randn(2, *denoiser.latent_shape, generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def images(*edits):
        denoise = directions.edited(denoiser, edits, sampler, 2)
        return denoiser.decode(sampler.sample(denoise, x, denoiser.schedule))

    plain = images()
    assert plain.shape == (2, 3, image_size(model), image_size(model)) and plain.isfinite().all()
    torch.testing.assert_close(images(Edit(0, 0.0)), plain)
    one, both = images(Edit(0, 20.0)), images(Edit(0, 20.0), Edit(3, -20.0, 1))
    for changed, original in ((one, plain), (both, plain), (both, one)):
        assert (changed - original).abs().max() > 1e-4


def test_shifts_of_the_bottleneck_change_the_prediction(model):
    denoiser = model.denoiser
    x, t = torch.randn(2, *denoiser.latent_shape), torch.full((2,), 10)
    features = denoiser.bottleneck_features(x, t, denoiser.null(2))
    with torch.no_grad():
        plain = denoiser.predict_eps(x, t, denoiser.null(2))
        shifted = denoiser.predict_eps(x, t, denoiser.null(2), torch.randn(2, features[0].numel()))
    assert len(features) == 2 and (shifted - plain).abs().max() > 1e-5


def test_models_without_texts_refuse_tokens_and_texts(folder):
    for name in ("encdiff", "pixel-without-texts"):
        with pytest.raises(UserError, match="row_space: condition"):
            ModelDenoiser(model_of(name, folder), "token")
        with pytest.raises(UserError, match="text"):
            ModelDenoiser(model_of(name, folder)).condition_from_texts(["a red cube"])


def test_the_network_of_encdiff_accepts_one_token(folder):
    denoiser = ModelDenoiser(model_of("encdiff", folder))
    assert (denoiser.row_space, denoiser.row_width, denoiser.empty.shape) == ("condition", 5, (1, 1, 5))
    rows = denoiser.initial_rows(2)
    assert denoiser.conditions(rows).value.shape == (2, 1, 5) and not denoiser.empty.any()
    x, t = torch.randn(2, *denoiser.latent_shape), torch.full((2,), 10)
    one, units = denoiser.predict_eps(x, t, denoiser.conditions(rows)), denoiser.model.cond_stage_model
    flat = units(torch.rand(2, 3, 32, 32))  # tokens of all units
    assert one.shape == x.shape and flat.shape == (2, 15)
    assert not torch.allclose(one, denoiser.predict_eps(x, t, denoiser.null(2)))
