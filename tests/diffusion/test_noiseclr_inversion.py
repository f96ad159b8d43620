"""DDIM inversion and null-text optimisation on denoisers whose answer is known."""

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ldm.diffusion.conditions import TensorCondition
from ldm.diffusion.directions import edited_by_conditions
from ldm.diffusion.inversion import ConditionsByStep, ddim_step, invert, null_text
from ldm.diffusion.samplers import DDIMSampler
from ldm.diffusion.schedule import NoiseSchedule, make_beta_schedule

T = 200
SCHEDULE = NoiseSchedule.from_betas(make_beta_schedule("linear", T, 0.00085, 0.012))
EXACT = NoiseSchedule.from_betas(make_beta_schedule("linear", T, 0.00085, 0.012), dtype=torch.float64)


def images(count=2, dtype=torch.float64):
    return torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=dtype)


def of_normal_data(deviation):
    """The ideal denoiser of normal data with mean 0: linear in x."""

    def denoise(x, t):
        abar = EXACT.alphas_cumprod[t].reshape(-1, 1, 1, 1)
        return torch.sqrt(1 - abar) * x / (abar * deviation**2 + 1 - abar)

    return denoise


def reconstruction_error(denoise, sampler):
    x_0 = images()
    states = invert(denoise, x_0, EXACT, sampler.timesteps(T))
    assert states.shape == (len(sampler.timesteps(T)) + 1, *x_0.shape) and torch.equal(states[0], x_0)
    return (sampler.sample(denoise, states[-1], EXACT) - x_0).abs().max().item()


@pytest.mark.parametrize("spacing", ["uniform", "quad"])
def test_a_prediction_that_does_not_depend_on_x_is_inverted_exactly(spacing):
    fixed = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    denoise = lambda x, t: fixed * (1 + t.double().reshape(-1, 1, 1, 1) / T)  # noqa: E731
    assert reconstruction_error(denoise, DDIMSampler(20, spacing=spacing)) < 1e-12


def test_the_error_falls_with_the_number_of_steps():
    errors = [reconstruction_error(of_normal_data(0.5), DDIMSampler(steps)) for steps in (5, 10, 20, 50, T)]
    assert all(later < 0.7 * earlier for earlier, later in zip(errors, errors[1:])) and errors[-1] < 0.02


def test_the_last_state_of_normal_data_is_standard_normal_noise():
    deviation, x_0 = 0.5, images(400)
    noise = invert(of_normal_data(deviation), deviation * x_0, EXACT, DDIMSampler(None).timesteps(T))[-1]
    expected = np.sqrt(EXACT.alphas_cumprod[-1].item() * deviation**2 + 1 - EXACT.alphas_cumprod[-1].item())
    assert noise.std().item() == pytest.approx(expected, rel=0.03)


def test_the_formula_written_out():
    sampler, x, seen = DDIMSampler(4), images(), []

    def denoise(x, t):
        seen.append(t.tolist())
        return 0.1 * x

    states = invert(denoise, x, EXACT, sampler.timesteps(T))
    distance = T // 4
    for number, t in enumerate([1, 51, 101, 151]):
        assert seen[number] == [t, t]
        before = EXACT.alphas_cumprod[max(t - distance, 0)]  # the first of all for negative time steps
        after, eps = EXACT.alphas_cumprod[t], 0.1 * x
        x = torch.sqrt(after) * (x - torch.sqrt(1 - before) * eps) / torch.sqrt(before) + torch.sqrt(1 - after) * eps
        torch.testing.assert_close(states[number + 1], x)


def test_a_step_and_its_inverse():
    x, eps = images(), images().flip(0)
    abar, after = torch.tensor(0.9, dtype=torch.float64), torch.tensor(0.4, dtype=torch.float64)
    torch.testing.assert_close(ddim_step(ddim_step(x, eps, abar, after), eps, after, abar), x)


def conditioned(x, t, cond, shift):
    """A denoiser whose prediction is moved by its condition (B, 3)."""
    return 0.3 * x + 0.5 * cond.value[..., None, None]


def guided_error(x_0, states, sampler, cond, negative):
    def denoise(x, t):
        without = conditioned(x, t, negative(t), None)
        return without + 4.0 * (conditioned(x, t, cond, None) - without)

    return (sampler.sample(denoise, states[-1], SCHEDULE) - x_0).square().flatten(1).mean(1)


def test_null_text_lowers_the_error_of_guided_sampling():
    x_0, sampler = images(3, torch.float32), DDIMSampler(20)
    cond, null = TensorCondition(torch.randn(3, 3)), TensorCondition(torch.zeros(3, 3))
    timesteps, steps = sampler.timesteps(T), []
    states = invert(lambda x, t: conditioned(x, t, cond, None), x_0, SCHEDULE, timesteps)
    found = null_text(conditioned, cond, null, states, SCHEDULE, timesteps, 4.0, 300, on_step=lambda: steps.append(1))
    assert found.values.shape == (20, 3, 3) and len(steps) == 20 and not found.values.requires_grad
    without = guided_error(x_0, states, sampler, cond, lambda t: null)
    optimised = guided_error(x_0, states, sampler, cond, found)
    assert (optimised < 0.1 * without).all()
    few = null_text(conditioned, cond, null, states, SCHEDULE, timesteps, 4.0)
    assert (guided_error(x_0, states, sampler, cond, few) < without).all()
    # Images of a batch do not depend on each other.
    one = null_text(
        conditioned, cond.first(1), null.first(1), states[:, :1], SCHEDULE, timesteps, 4.0, num_iterations=300
    )
    torch.testing.assert_close(one.values[:, :1], found.values[:, :1])


def test_null_text_stops_early_where_guidance_changes_nothing():
    x_0, calls = images(1, torch.float32), []

    def predict(x, t, cond, shift):
        calls.append(t)
        return conditioned(x, t, cond, shift)

    cond, timesteps = TensorCondition(torch.zeros(1, 3)), DDIMSampler(T).timesteps(T)
    states = invert(lambda x, t: conditioned(x, t, cond, None), x_0, SCHEDULE, timesteps)
    found = null_text(predict, cond, cond, states, SCHEDULE, timesteps)
    assert len(calls) == 3 * len(timesteps) and not found.values.any()


def test_conditions_by_step_are_found_at_and_between_visited_steps():
    values = torch.arange(3.0)[:, None, None].expand(3, 2, 5) + torch.tensor([0.0, 0.5])[:, None]
    by_step = ConditionsByStep(values, torch.tensor([0, 0, 0, 1, 1, 2, 2]))
    assert by_step(torch.tensor([2, 6])).value[:, 0].tolist() == [0.0, 2.5]
    assert by_step(torch.tensor([4, 4])).value.shape == (2, 5)


def test_no_value_is_read_from_the_device():
    """On a CUDA device that does not exist, ``.item()`` and tensors of the CPU raise."""
    with FakeTensorMode():
        device = torch.device("cuda", 0)
        schedule = NoiseSchedule(*(torch.rand(T, device=device) for _ in SCHEDULE.constants()))
        timesteps, x_0 = DDIMSampler(4).timesteps(T), torch.rand(2, 3, 4, 4, device=device)
        cond = TensorCondition(torch.rand(2, 3, device=device))
        states = invert(lambda x, t: conditioned(x, t, cond, None), x_0, schedule, timesteps)
        positions = torch.zeros(T, dtype=torch.long, device=device)
        negative = ConditionsByStep(torch.rand(4, 2, 3, device=device), positions)
        weights = torch.rand(1, T, device=device)
        denoise = edited_by_conditions(conditioned, cond, cond, [cond], weights, 3.0, negative)
        assert DDIMSampler(4).sample(denoise, states[-1], schedule).device == device
