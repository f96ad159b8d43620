"""What scripts written for latent-diffusion import and call: samplers, helpers and methods of models."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch
from golden_recipe import fill
from stand_ins import TINY_KL, TINY_UNET, vq_config
from torch import nn

from ldm.diffusion.samplers import DDIMSampler as DDIM
from ldm.diffusion.samplers import DDPMSampler, Hooks, Inpainting, named_sampler
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.ddpm import DDPM, LatentDiffusion
from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.models.diffusion.plms import PLMSSampler
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.encoders.base import TextStage
from ldm.modules.encoders.modules import AbstractEncoder
from ldm.util import (
    ConfigError,
    UserError,
    count_params,
    default,
    exists,
    instantiate_from_config,
    isimage,
    ismap,
    log_txt_as_img,
)

UNET = "ldm.modules.diffusionmodules.openaimodel.UNetModel"


class Words(TextStage):
    """Four tokens of width 6 for each text."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(64, 6)

    def forward(self, texts):
        numbers = [[sum(map(ord, text)) % 64, len(text) % 64, 1, 2] for text in texts]
        return self.table(torch.tensor(numbers, device=self.table.weight.device))


def build(unet=None, **params):
    torch.manual_seed(0)
    config = {
        "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
        "params": {
            "unet_config": {"target": UNET, "params": {**TINY_UNET, **(unet or {})}},
            "first_stage_config": vq_config(),
            "cond_stage_config": "__is_unconditional__",
            "image_size": 8,
            "channels": 4,
            "timesteps": 40,
            "scale_factor": 0.5,
            "monitor": None,
            **params,
        },
    }
    model = instantiate_from_config(config).eval()
    fill(model.model)
    model.model_ema.restart(model.model)
    return model


@pytest.fixture(scope="module")
def by_text():
    stage = {"target": "test_ldm_scripts.Words"}
    return build(
        unet={"use_spatial_transformer": True, "context_dim": 6},
        cond_stage_config=stage,
        cond_stage_key="caption",
        conditioning_key="crossattn",
        first_stage_config=TINY_KL,
    )


@pytest.fixture(scope="module")
def plain():
    return build()


def noise(count=2, seed=3):
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


SAMPLERS = {"ddim": DDIMSampler, "plms": PLMSSampler, "dpm_solver": DPMSolverSampler}


@pytest.mark.parametrize("name", SAMPLERS)
def test_texts_to_images(by_text, name):
    """Prompts, a negative prompt of empty texts, guidance, and a decoded picture."""
    model, sampler, prompts = by_text, SAMPLERS[name](by_text), ("a red cube", "a ball")
    with torch.no_grad(), model.ema_scope():
        uc = model.get_learned_conditioning(2 * [""])
        c = model.get_learned_conditioning(prompts)
        assert c.shape == uc.shape == (2, 4, 6) and torch.equal(torch.cat([uc, c])[2:], c)
        samples, intermediates = sampler.sample(
            S=5,
            conditioning=c,
            batch_size=2,
            shape=[4, 8, 8],
            verbose=False,
            unconditional_guidance_scale=7.5,
            unconditional_conditioning=uc,
            eta=0.0,
            x_T=noise(),
        )
        wanted = model.sample(
            noise(), model.condition_from_texts(prompts), named_sampler(name, num_steps=5), guidance_scale=7.5
        )
        images = model.decode_first_stage(samples)
    assert torch.equal(samples, wanted) and images.shape == (2, 3, 32, 32)
    assert torch.equal(intermediates["x_inter"][0], noise()) and torch.equal(intermediates["x_inter"][-1], samples)


def test_the_condition_of_nothing(by_text):
    for label, text in ((None, ""), ("blurred", "blurred"), (["blurred"], "blurred")):
        found = by_text.get_unconditional_conditioning(2, label)
        assert torch.equal(found, by_text.get_learned_conditioning([text] * 2))


def test_own_stages_may_inherit_from_the_abstract_encoder():
    class Own(AbstractEncoder):
        def forward(self, x):
            return x + 1

    assert Own().encode(torch.zeros(1)).item() == 1


def test_without_a_negative_condition_there_is_no_guidance(by_text):
    c = by_text.get_learned_conditioning(["a red cube"])
    samples, _ = DDIMSampler(by_text).sample(5, 1, (4, 8, 8), c, unconditional_guidance_scale=7.5, x_T=noise(1))
    assert torch.equal(samples, by_text.sample(noise(1), c, DDIM(5)))


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_image_to_image(by_text, eta):
    """An encoded picture, noised to a step of the schedule and denoised from there."""
    model, sampler = by_text, DDIMSampler(by_text)
    image = torch.rand(2, 3, 32, 32) * 2 - 1
    latent = model.get_first_stage_encoding(model.encode_first_stage(image))
    posterior = model.first_stage_model.encode(image)
    assert isinstance(posterior, DiagonalGaussianDistribution) and latent.shape == (2, 4, 8, 8)
    torch.manual_seed(1)
    drawn = model.get_first_stage_encoding(posterior)
    torch.manual_seed(1)
    assert torch.equal(drawn, 0.5 * model.first_stage_model.encode(image).sample())
    sampler.make_schedule(ddim_num_steps=10, ddim_eta=eta, verbose=False)
    t_enc = int(0.6 * 10)
    torch.manual_seed(2)
    noised = sampler.stochastic_encode(latent, torch.tensor([t_enc] * 2))
    torch.manual_seed(2)
    t = torch.full((2,), int(sampler.ddim_timesteps[t_enc]))
    assert torch.equal(noised, model.q_sample(x_start=latent, t=t, noise=torch.randn_like(latent)))
    c, uc = model.get_learned_conditioning(["red", "blue"]), model.get_learned_conditioning(["", ""])
    torch.manual_seed(4)
    found = sampler.decode(noised, c, t_enc, unconditional_guidance_scale=3.0, unconditional_conditioning=uc)

    class FirstSteps(DDIM):
        def timesteps(self, num_timesteps):
            return super().timesteps(num_timesteps)[:t_enc]

    torch.manual_seed(4)
    assert torch.equal(found, model.sample(noised, c, FirstSteps(10, eta), guidance_scale=3.0, null=uc))
    with pytest.raises(UserError, match="expected steps 0 to 9, got 10"):
        sampler.stochastic_encode(latent, torch.tensor([10, 10]))


def test_decoding_all_steps_is_sampling(plain):
    sampler = DDIMSampler(plain)
    sampler.make_schedule(10)
    assert torch.equal(sampler.decode(noise(), None, 10), sampler.sample(10, 2, (4, 8, 8), x_T=noise())[0])
    part = sampler.decode(noise(), None, 3, use_original_steps=True)
    assert part.shape == (2, 4, 8, 8) and torch.equal(sampler.decode(noise(), None, 0), noise())


def test_inpainting_by_a_concatenated_condition():
    """Masked picture and mask on the channels, as LDM's inpainting script makes them."""
    model = build(unet={"in_channels": 9}, cond_stage_config="__is_first_stage__", concat_mode=True)
    image, mask = torch.rand(1, 3, 32, 32) * 2 - 1, torch.ones(1, 1, 32, 32)
    sampler = DDIMSampler(model)
    with torch.no_grad(), model.ema_scope():
        c = model.cond_stage_model.encode(image)
        c = torch.cat((c, torch.nn.functional.interpolate(mask, size=c.shape[-2:])), dim=1)
        shape = (c.shape[1] - 1, *c.shape[2:])
        samples, _ = sampler.sample(S=4, conditioning=c, batch_size=c.shape[0], shape=shape, x_T=noise(1))
        assert torch.equal(samples, model.sample(noise(1), c, DDIM(4)))
        assert model.decode_first_stage(samples).shape == image.shape


def test_masks_and_callbacks(plain):
    x0, mask = noise(2, 5), torch.zeros(2, 1, 8, 8)
    mask[..., :4] = 1
    steps, estimates = [], []
    torch.manual_seed(6)
    samples, intermediates = DDIMSampler(plain).sample(
        S=5,
        batch_size=2,
        shape=(4, 8, 8),
        callback=steps.append,
        img_callback=lambda pred_x0, i: estimates.append((i, pred_x0)),
        quantize_x0=True,
        eta=1.0,
        mask=mask,
        x0=x0,
        temperature=0.9,
        x_T=noise(),
        log_every_t=2,
    )
    torch.manual_seed(6)
    hooks = Hooks(plain.quantize_latent, Inpainting(mask, x0))
    assert torch.equal(samples, plain.sample(noise(), None, DDIM(5, 1.0, temperature=0.9), hooks=hooks))
    assert steps == [i for i, _ in estimates] == [0, 1, 2, 3, 4]
    assert len(intermediates["pred_x0"]) == 4  # the start, and the steps with index 4, 2 and 0
    assert torch.equal(intermediates["pred_x0"][-1], estimates[-1][1])


def test_unconditional_sampling_of_the_old_script(plain):
    network = plain.model.diffusion_model
    shape = [2, network.in_channels, network.image_size, network.image_size]
    with plain.ema_scope("Plotting"):
        torch.manual_seed(7)
        samples, _ = DDIMSampler(plain).sample(4, batch_size=shape[0], shape=shape[1:], eta=1.0, verbose=False)
        torch.manual_seed(7)
        assert torch.equal(samples, plain.sample(torch.randn(shape), None, DDIM(4, 1.0)))
        torch.manual_seed(8)
        vanilla, states = plain.progressive_denoising(None, shape, verbose=True)
        torch.manual_seed(8)
        assert torch.equal(vanilla, plain.sample(torch.randn(shape), None, DDPMSampler()))
        torch.manual_seed(8)
        assert torch.equal(vanilla, plain.p_sample_loop(None, shape)) and len(states) == 41
    with plain.first_stage_model.ema_scope("first stage"):
        assert plain.first_stage_model.encode(torch.zeros(1, 3, 32, 32)) is not None


def test_what_is_not_supported_is_refused(plain):
    sampler = DDIMSampler(plain, schedule="linear")
    for options in ({"noise_dropout": 0.1}, {"score_corrector": object()}, {"dynamic_threshold": 0.9}):
        with pytest.raises(UserError, match=f"{next(iter(options))} not supported"):
            sampler.sample(4, 1, (4, 8, 8), **options)
    with pytest.raises(UserError, match="mask and x0 together"):
        sampler.sample(4, 1, (4, 8, 8), mask=torch.ones(1, 1, 8, 8))
    for name in ("plms", "dpm_solver"):
        with pytest.raises(ConfigError, match="'eta'"):
            SAMPLERS[name](plain).make_schedule(4, ddim_eta=0.5)
    assert sampler.sample(4, 1, (4, 8, 8), dynamic_threshold=None)[0].shape == (1, 4, 8, 8)


def test_constants_of_a_model(plain):
    for name in ("betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod"):
        assert getattr(plain, name).shape == (plain.num_timesteps,)
    t = torch.tensor([0, 39])
    torch.manual_seed(9)
    drawn = plain.q_sample(x_start=noise(), t=t)
    torch.manual_seed(9)
    assert torch.equal(drawn, plain.q_sample(x_start=noise(), t=t, noise=torch.randn(2, 4, 8, 8)))


def test_conditions_in_every_form(by_text):
    c = by_text.get_learned_conditioning(["red", "blue"])
    t = torch.tensor([3, 20])
    with torch.no_grad():
        outputs = [by_text.apply_model(noise(), t, form) for form in (c, [c], {"c_crossattn": [c]})]
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
    guided = [
        DDIMSampler(by_text).sample(
            4,
            2,
            (4, 8, 8),
            form(c),
            x_T=noise(),
            unconditional_guidance_scale=2.0,
            unconditional_conditioning=form(0 * c),
        )[0]
        for form in (lambda x: x, lambda x: [x], lambda x: {"c_crossattn": [x]})
    ]
    assert torch.equal(guided[0], guided[1]) and torch.equal(guided[0], guided[2])


def test_schedules_by_their_old_functions(plain):
    util = importlib.import_module("ldm.modules.diffusionmodules.util")
    betas = util.make_beta_schedule("linear", n_timestep=40, linear_start=1e-4, linear_end=2e-2)
    assert np.allclose(betas, plain.betas)
    steps = util.make_ddim_timesteps(
        ddim_discr_method="uniform", num_ddim_timesteps=8, num_ddpm_timesteps=40, verbose=False
    )
    assert steps.tolist() == DDIM(8).timesteps(40).tolist() == [1, 6, 11, 16, 21, 26, 31, 36]
    for constants in (plain.alphas_cumprod, plain.alphas_cumprod.numpy()):
        sigmas, alphas, previous = util.make_ddim_sampling_parameters(constants, steps, eta=0.5, verbose=False)
        assert alphas[0] == constants[1] and previous[0] == constants[0] and previous[1] == alphas[0]
        wanted = DDIM(8, 0.5).sigma(torch.as_tensor(alphas), torch.as_tensor(previous))
        assert torch.allclose(torch.as_tensor(sigmas), wanted, atol=1e-6)
    taken = util.extract_into_tensor(plain.betas, torch.tensor([0, 39]), (2, 4, 8, 8))
    assert taken.shape == (2, 1, 1, 1) and taken[1] == plain.betas[39]


def test_layers_by_their_old_functions():
    util = importlib.import_module("ldm.modules.diffusionmodules.util")
    assert isinstance(util.conv_nd(2, 3, 4, 3, padding=1), nn.Conv2d) and isinstance(util.linear(2, 3), nn.Linear)
    assert isinstance(util.avg_pool_nd(1, kernel_size=2), nn.AvgPool1d)
    assert isinstance(util.zero_module(util.normalization(32)), nn.GroupNorm)
    assert util.timestep_embedding(torch.tensor([1, 2]), 6).shape == (2, 6)
    same = util.noise_like((3, 4, 2, 2), "cpu", repeat=True)
    assert torch.equal(same[0], same[2]) and not torch.equal(*util.noise_like((2, 4, 2, 2), "cpu"))
    for flag in (True, False):
        x = torch.ones(2, requires_grad=True)
        util.checkpoint(lambda a, b: (a * b).sum(), (x, torch.tensor(3.0)), (), flag).backward()
        assert x.grad.tolist() == [3, 3]


def test_helpers():
    image, map_ = torch.zeros(2, 3, 4, 4), torch.zeros(2, 8, 4, 4)
    assert isimage(image) and not ismap(image) and ismap(map_) and not isimage(map_)
    assert not isimage("image") and not ismap(image[0])
    assert default(None, lambda: 3) == 3 and default(0, 5) == 0 and default(None, 5) == 5
    assert exists(0) and not exists(None) and count_params(nn.Linear(2, 3), verbose=True) == 9
    pictures = log_txt_as_img((64, 32), ["a text that is too long for one line", "b"])
    assert pictures.shape == (2, 3, 32, 64) and pictures.min() < 0 and pictures.max() == 1
    with pytest.raises(ImportError):
        from ldm.util import nothing_of_the_kind  # noqa: F401


@pytest.mark.parametrize(
    "path",
    [
        "ldm.util.get_obj_from_str",
        "ldm.util.mean_flat",
        "ldm.models.diffusion.ddpm.DDPM",
        "ldm.models.autoencoder.VQModelInterface",
        "ldm.models.autoencoder.AutoencoderKL",
        "ldm.modules.attention.CrossAttention",
        "ldm.modules.attention.SpatialTransformer",
        "ldm.modules.diffusionmodules.model.Encoder",
        "ldm.modules.diffusionmodules.openaimodel.UNetModel",
        "ldm.modules.ema.LitEma",
        "ldm.modules.encoders.modules.ClassEmbedder",
    ],
)
def test_importable(path):
    module, _, name = path.rpartition(".")
    assert hasattr(importlib.import_module(module), name)


def test_the_class_is_the_one_that_configs_name(plain):
    assert isinstance(plain, LatentDiffusion) and issubclass(LatentDiffusion, DDPM)
