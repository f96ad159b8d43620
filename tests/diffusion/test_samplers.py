import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ldm.diffusion.samplers import (
    SAMPLERS,
    DDIMSampler,
    DDPMSampler,
    DPMSolverSampler,
    Hooks,
    Inpainting,
    PLMSSampler,
    Sampler,
    build_sampler,
    named_sampler,
    spaced_timesteps,
)
from ldm.diffusion.schedule import NoiseSchedule, extract, make_beta_schedule
from ldm.util import ConfigError

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "diffusion.json").read_text())["ddim200"]
BETAS = make_beta_schedule("linear", 1000, 0.0015, 0.0155)
SCHEDULE = NoiseSchedule.from_betas(BETAS)
EXACT = NoiseSchedule.from_betas(BETAS, dtype=torch.float64)


def perfect_denoiser(x0):
    """The denoiser of a single clean image, at which every sampler must end."""

    def denoise(x, t):
        abar = extract(SCHEDULE.alphas_cumprod, t, x)
        return (x - abar.sqrt() * x0) / (1 - abar).sqrt()

    return denoise


def curved_denoiser(x, t):
    """A smooth function of x and t, in float64 for exact comparisons."""
    return torch.tanh(x * 0.7 + t.reshape(-1, 1, 1, 1) / 900.0) + 0.1 * x


def test_golden_ddim_constants():
    timesteps = DDIMSampler(200, eta=1.0).timesteps(1000)
    assert timesteps[:3].tolist() == GOLDEN["ts_first"]
    assert timesteps[-1] == GOLDEN["ts_last"]
    assert len(timesteps) == GOLDEN["n"]
    abar = SCHEDULE.alphas_cumprod[torch.as_tensor(timesteps)]
    previous = torch.cat([SCHEDULE.alphas_cumprod[:1], abar[:-1]])
    sigma = DDIMSampler(200, eta=1.0).sigma(abar, previous)
    for index, key in ((0, "sigma0"), (100, "sigma100"), (-1, "sigma_last")):
        assert sigma[index].item() == pytest.approx(GOLDEN[key], rel=1e-5)
    assert -torch.sqrt(1 - abar[-1]).item() == pytest.approx(GOLDEN["coef_last"], rel=1e-6)
    assert previous[:2].tolist() == pytest.approx([GOLDEN["aprev0"], GOLDEN["aprev1"]], rel=1e-6)


def test_more_steps_than_half_of_the_time_steps_stay_in_range():
    assert spaced_timesteps(300, 1000).max() < 1000
    assert spaced_timesteps(1000, 1000).max() < 1000
    with pytest.raises(ConfigError, match="between 2 and 1000"):
        spaced_timesteps(1001, 1000)
    with pytest.raises(ConfigError, match="got 1"):
        spaced_timesteps(1, 1000)
    with pytest.raises(ConfigError, match="uniform, quad"):
        spaced_timesteps(10, 1000, "cubic")


@pytest.mark.parametrize("sampler", [DDIMSampler(20), DDIMSampler(20, eta=1.0), PLMSSampler(20), DPMSolverSampler(20)])
def test_samplers_end_at_the_image_of_a_perfect_denoiser(sampler):
    torch.manual_seed(0)
    x0 = torch.randn(2, 3, 4, 4)
    sample = sampler.sample(perfect_denoiser(x0), torch.randn(2, 3, 4, 4), SCHEDULE)
    assert (sample - x0).abs().max() < 0.3  # DDIM's last step leaves the noise of t = 0
    assert (sample - x0).abs().mean() < 0.05


def test_ddpm_ends_at_the_image_of_a_perfect_denoiser():
    torch.manual_seed(0)
    x0 = torch.randn(1, 3, 4, 4)
    seen = []
    sample = DDPMSampler().sample(perfect_denoiser(x0), torch.randn(1, 3, 4, 4), SCHEDULE, callback=seen.append)
    torch.testing.assert_close(sample, x0, atol=1e-3, rtol=1e-3)
    assert [seen[0].timestep, seen[-1].timestep] == [999, 0]


@pytest.mark.parametrize("spacing", ["uniform", "quad"])
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_ddim_equals_the_written_out_loop(eta, spacing):
    """Song et al. 2021, Eq. 12 and 16, in float64."""
    x = x_T = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    abar = np.cumprod(1 - BETAS)
    visited = spaced_timesteps(7, 1000, spacing)
    torch.manual_seed(3)
    for index in range(len(visited) - 1, -1, -1):
        now, before = abar[visited[index]], abar[visited[index - 1]] if index else abar[0]
        eps = curved_denoiser(x, torch.full((2,), int(visited[index])))
        sigma = eta * np.sqrt((1 - before) / (1 - now)) * np.sqrt(1 - now / before)
        x0 = (x - np.sqrt(1 - now) * eps) / np.sqrt(now)
        x = np.sqrt(before) * x0 + np.sqrt(1 - before - sigma**2) * eps
        x = x + sigma * 0.9 * torch.randn_like(x) if eta else x
    torch.manual_seed(3)
    found = DDIMSampler(7, eta, spacing, temperature=0.9).sample(curved_denoiser, x_T, EXACT)
    torch.testing.assert_close(found, x, rtol=1e-10, atol=1e-12)


def test_ddpm_equals_the_written_out_loop():
    """Ho et al. 2020, Eq. 7 and Algorithm 2, in float64."""
    betas = make_beta_schedule("linear", 12, 0.01, 0.2)
    abar, previous = np.cumprod(1 - betas), np.append(1.0, np.cumprod(1 - betas)[:-1])
    x = x_T = torch.randn(2, 1, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(3)
    for t in range(11, -1, -1):
        eps = curved_denoiser(x, torch.full((2,), t))
        x0 = (x - np.sqrt(1 - abar[t]) * eps) / np.sqrt(abar[t])
        mean = np.sqrt(previous[t]) * betas[t] * x0 + np.sqrt(1 - betas[t]) * (1 - previous[t]) * x
        x = mean / (1 - abar[t])
        if t:
            x = x + np.sqrt(betas[t] * (1 - previous[t]) / (1 - abar[t])) * torch.randn_like(x)
    torch.manual_seed(3)
    schedule = NoiseSchedule.from_betas(betas, dtype=torch.float64)
    torch.testing.assert_close(DDPMSampler().sample(curved_denoiser, x_T, schedule), x, rtol=1e-10, atol=1e-12)


def diffusers_sample(scheduler, timesteps, x):
    """Sample with a scheduler of diffusers, whose tables are replaced by exact ones."""
    for t in timesteps:
        eps = curved_denoiser(x, torch.full((len(x),), int(t)))
        x = scheduler.step(eps, t, x).prev_sample
    return x


COMMON = {"num_train_timesteps": 1000, "trained_betas": BETAS.tolist(), "prediction_type": "epsilon"}


def exact(scheduler):
    scheduler.alphas_cumprod = EXACT.alphas_cumprod
    scheduler.final_alpha_cumprod = EXACT.alphas_cumprod[0]
    return scheduler


@pytest.mark.parametrize(
    ("name", "sampler", "option"),
    [
        ("DDIMScheduler", DDIMSampler(20), {"clip_sample": False}),
        ("PNDMScheduler", PLMSSampler(20), {"skip_prk_steps": True}),
    ],
)
def test_ddim_and_plms_equal_diffusers(name, sampler, option):
    diffusers = pytest.importorskip("diffusers")
    options = {"set_alpha_to_one": False, "steps_offset": 1, **option}
    scheduler = exact(getattr(diffusers, name)(**COMMON, **options))
    scheduler.set_timesteps(20)
    x_T = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = diffusers_sample(scheduler, scheduler.timesteps, x_T)
    torch.testing.assert_close(sampler.sample(curved_denoiser, x_T, EXACT), expected, rtol=1e-6, atol=1e-6)


def test_dpm_solver_equals_diffusers():
    diffusers = pytest.importorskip("diffusers")
    options = {"solver_order": 2, "algorithm_type": "dpmsolver++", "solver_type": "midpoint", "lower_order_final": True}
    scheduler = diffusers.DPMSolverMultistepScheduler(**COMMON, **options, final_sigmas_type="zero")
    visited = DPMSolverSampler(20).timesteps(1000)[::-1].copy()
    scheduler.set_timesteps(20)
    abar = EXACT.alphas_cumprod[torch.as_tensor(visited)]
    scheduler.timesteps = torch.as_tensor(visited)
    scheduler.sigmas = torch.cat([((1 - abar) / abar).sqrt(), torch.zeros(1, dtype=torch.float64)])
    x_T = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = diffusers_sample(scheduler, scheduler.timesteps, x_T)
    found = DPMSolverSampler(20).sample(curved_denoiser, x_T, EXACT)
    torch.testing.assert_close(found, expected.double(), rtol=1e-5, atol=1e-5)  # diffusers steps in float32


def test_dpm_solver_equals_the_written_out_loop():
    """Lu et al. 2022, Algorithm 2 with k = 2, in float64."""
    visited = spaced_timesteps(8, 1000)
    abar = np.cumprod(1 - BETAS)[visited]
    alpha, sigma = np.sqrt(abar), np.sqrt(1 - abar)
    lam = np.log(alpha / sigma)
    x = x_T = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    earlier = None
    for i in range(len(visited) - 1, -1, -1):
        x0 = (x - sigma[i] * curved_denoiser(x, torch.full((2,), int(visited[i])))) / alpha[i]
        if i == 0:
            x = x0
            continue
        h, data = lam[i - 1] - lam[i], x0
        if earlier is not None:
            r = (lam[i] - lam[i + 1]) / h
            data = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * earlier
        x = sigma[i - 1] / sigma[i] * x - alpha[i - 1] * (np.exp(-h) - 1) * data
        earlier = x0
    torch.testing.assert_close(DPMSolverSampler(8).sample(curved_denoiser, x_T, EXACT), x, rtol=1e-9, atol=1e-10)


def test_plms_equals_the_written_out_loop():
    """Liu et al. 2022, Eq. 9 and 12, in float64."""
    visited, abar = spaced_timesteps(8, 1000), np.cumprod(1 - BETAS)

    def transfer(x, eps, i):
        now, before = abar[visited[i]], abar[visited[i - 1]] if i else abar[0]
        return np.sqrt(before) * (x - np.sqrt(1 - now) * eps) / np.sqrt(now) + np.sqrt(1 - before) * eps

    x = x_T = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    past = []
    for i in range(len(visited) - 1, -1, -1):
        e = curved_denoiser(x, torch.full((2,), int(visited[i])))
        if not past:
            combined = (e + curved_denoiser(transfer(x, e, i), torch.full((2,), int(visited[i - 1])))) / 2
        elif len(past) == 1:
            combined = (3 * e - past[-1]) / 2
        elif len(past) == 2:
            combined = (23 * e - 16 * past[-1] + 5 * past[-2]) / 12
        else:
            combined = (55 * e - 59 * past[-1] + 37 * past[-2] - 9 * past[-3]) / 24
        x = transfer(x, combined, i)
        past.append(e)
    torch.testing.assert_close(PLMSSampler(8).sample(curved_denoiser, x_T, EXACT), x, rtol=1e-9, atol=1e-10)


def test_ddpm_equals_diffusers():
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(**COMMON, variance_type="fixed_small", clip_sample=False)
    scheduler.alphas_cumprod = EXACT.alphas_cumprod
    x_T = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    expected = diffusers_sample(scheduler, range(999, -1, -1), x_T)
    torch.manual_seed(1)
    torch.testing.assert_close(DDPMSampler().sample(curved_denoiser, x_T, EXACT), expected, rtol=1e-5, atol=1e-5)


def test_higher_order_samplers_need_fewer_steps():
    """Against DDIM with all steps, for normally distributed data, whose best denoiser is known."""

    def curved_denoiser(x, t):
        abar = extract(EXACT.alphas_cumprod, t, x)
        return x * torch.sqrt(1 - abar) / (0.25 * abar + 1 - abar)

    x_T = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    fine = DDIMSampler(1000).sample(curved_denoiser, x_T, EXACT)
    coarse = DDIMSampler(20).sample(curved_denoiser, x_T, EXACT)
    assert (PLMSSampler(20).sample(curved_denoiser, x_T, EXACT) - fine).norm() < (coarse - fine).norm() / 2


def test_eta_beyond_the_schedule_is_refused():
    x_T = torch.randn(1, 3, 4, 4)
    for eta in (0.0, 1.0):
        assert DDIMSampler(10, eta).sample(perfect_denoiser(x_T), x_T, SCHEDULE).isfinite().all()
    with pytest.raises(ConfigError, match=r"eta of at most 1\.\d+ for 10 steps .* got 3"):
        DDIMSampler(10, eta=3.0).sample(perfect_denoiser(x_T), x_T, SCHEDULE)
    for eta in (-0.5, float("nan")):
        with pytest.raises(ConfigError, match="at least 0"):
            DDIMSampler(10, eta=eta)


def test_ddim_without_noise_repeats_itself_and_calls_back():
    x_T, seen = torch.randn(1, 3, 4, 4), []
    denoise = perfect_denoiser(torch.ones(1, 3, 4, 4))
    first = DDIMSampler(10).sample(denoise, x_T, SCHEDULE, callback=seen.append)
    torch.testing.assert_close(first, DDIMSampler(10).sample(denoise, x_T, SCHEDULE))
    assert [step.position for step in seen] == list(range(9, -1, -1))


@pytest.mark.parametrize("name", SAMPLERS)
def test_evaluations_are_counted(name):
    calls = []
    sampler = named_sampler(name, num_steps=None if name == "ddpm" else 6)

    def denoise(x, t):
        calls.append(t)
        return torch.zeros_like(x)

    sampler.sample(denoise, torch.zeros(1, 1, 2, 2), SCHEDULE)
    assert len(calls) == sampler.num_evaluations(1000)


@pytest.mark.parametrize("name", ["ddim", "plms", "dpm_solver"])
def test_inpainting_shows_the_known_part_to_the_network(name):
    """The noise of the known part, at every call of the network, is standard normal."""
    torch.manual_seed(0)
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1
    noises = []

    def denoise(x, t):  # leaves x unchanged: only the hook can insert the known image
        abar = extract(SCHEDULE.alphas_cumprod, t, x)
        noises.append((x[..., :4] - abar.sqrt()) / (1 - abar).sqrt())
        return torch.zeros_like(x)

    hooks = Hooks(inpainting=Inpainting(mask, torch.ones(1, 3, 8, 8)))
    named_sampler(name, num_steps=20).sample(denoise, torch.randn(1, 3, 8, 8), SCHEDULE, hooks=hooks)
    if name == "plms":
        del noises[1]  # the second evaluation of the first step
    assert len(noises) == 20
    for noise in noises:
        assert abs(noise.mean()) < 0.5 and abs(noise.std() - 1) < 0.4


@pytest.mark.parametrize("name", ["ddim", "plms", "dpm_solver"])
def test_inpainting_keeps_the_known_part(name):
    torch.manual_seed(0)
    known, mask = torch.ones(1, 3, 4, 4), torch.zeros(1, 1, 4, 4)
    mask[..., :2] = 1
    hooks = Hooks(inpainting=Inpainting(mask, known))
    denoise = perfect_denoiser(known * mask - known * (1 - mask))
    sample = named_sampler(name, num_steps=20).sample(denoise, torch.randn(1, 3, 4, 4), SCHEDULE, hooks=hooks)
    assert (sample[..., :2] - 1).abs().mean() < 0.1 and (sample[..., 2:] + 1).abs().mean() < 0.1


@pytest.mark.parametrize("name", SAMPLERS)
def test_quantized_estimates_are_used(name):
    seen, states = [], []
    perfect = perfect_denoiser(torch.full((1, 1, 2, 2), 0.7))

    def denoise(x, t):
        states.append((x, t))
        return perfect(x, t)

    hooks = Hooks(quantize_x0=torch.round)
    sampler = named_sampler(name, num_steps=None if name == "ddpm" else 20)
    sampler.sample(denoise, torch.randn(1, 1, 2, 2), SCHEDULE, callback=seen.append, hooks=hooks)
    assert seen and all((step.pred_x0 == step.pred_x0.round()).all() for step in seen)
    if name == "plms":  # the first step moves to the quantized estimate, too, before its second evaluation
        (x, t), (ahead, t_ahead) = states[:2]
        abar_ahead = SCHEDULE.alphas_cumprod[t_ahead]
        torch.testing.assert_close(ahead, abar_ahead.sqrt() * 1.0 + (1 - abar_ahead).sqrt() * perfect(x, t))


def test_samplers_by_name_and_by_config():
    assert isinstance(build_sampler("plms"), PLMSSampler)
    built = build_sampler({"target": "ldm.diffusion.samplers.DDIMSampler", "params": {"num_steps": 9, "eta": 0.5}})
    assert (built.num_steps, built.eta) == (9, 0.5)
    assert build_sampler(built) is built
    assert isinstance(named_sampler("ldm.diffusion.samplers.DDIMSampler", num_steps=3), DDIMSampler)
    with pytest.raises(ConfigError, match="Did you mean 'ddim'"):
        build_sampler("dddim")
    with pytest.raises(ConfigError, match="unexpected option 'eta'"):
        named_sampler("plms", eta=1.0)
    with pytest.raises(ConfigError, match="subclass of"):
        build_sampler({"target": "torch.nn.Identity"})


def test_a_sampler_of_a_user():
    class Steps(Sampler):
        def step(self, state):
            return state.x + 1

    class Whole(Sampler):
        def sample(self, denoise, x_T, schedule, callback=None):
            return x_T + 1

    zeros = torch.zeros(1, 1, 2, 2)
    assert (Steps(5).sample(lambda x, t: x, zeros, SCHEDULE) == 5).all()
    assert (Whole().sample(lambda x, t: x, zeros, SCHEDULE) == 1).all()
    assert Steps().takes_hooks and not Whole().takes_hooks
    with pytest.raises(NotImplementedError, match=r"step\(state\)"):
        Sampler().sample(lambda x, t: x, zeros, SCHEDULE)
