import json
from pathlib import Path

import pytest
import torch

from ldm.diffusion.samplers import Inpainting, ddim_constants, ddim_sample, ddim_timesteps, ddpm_sample
from ldm.diffusion.schedule import extract, make_beta_schedule, schedule_buffers
from ldm.util import ConfigError

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "diffusion.json").read_text())["ddim200"]
BUFFERS = schedule_buffers(make_beta_schedule("linear", 1000, 0.0015, 0.0155))


def perfect_denoiser(x0):
    """Knows the clean image, so every sampler must end at it."""

    def denoise(x, t):
        abar = extract(BUFFERS["alphas_cumprod"], t, x)
        return (x - abar.sqrt() * x0) / (1 - abar).sqrt()

    return denoise


def test_golden_ddim_constants():
    constants = ddim_constants(BUFFERS["alphas_cumprod"], 200, eta=1.0)
    assert constants.timesteps[:3].tolist() == GOLDEN["ts_first"]
    assert constants.timesteps[-1] == GOLDEN["ts_last"]
    assert len(constants.timesteps) == GOLDEN["n"]
    for index, key in ((0, "sigma0"), (100, "sigma100"), (-1, "sigma_last")):
        assert constants.sigmas[index].item() == pytest.approx(GOLDEN[key], rel=1e-5)
    assert -torch.sqrt(1 - constants.alphas[-1]).item() == pytest.approx(GOLDEN["coef_last"], rel=1e-6)
    assert constants.alphas_prev[:2].tolist() == pytest.approx([GOLDEN["aprev0"], GOLDEN["aprev1"]], rel=1e-6)


def test_more_steps_than_half_of_the_time_steps_stay_in_range():
    assert ddim_timesteps(300, 1000).max() < 1000
    assert ddim_timesteps(1000, 1000).max() < 1000
    with pytest.raises(ConfigError, match="between 1 and 1000"):
        ddim_timesteps(1001, 1000)
    with pytest.raises(ConfigError, match="'uniform' or 'quad'"):
        ddim_timesteps(10, 1000, "cubic")


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_ends_at_what_a_perfect_denoiser_knows(eta):
    torch.manual_seed(0)
    x0 = torch.randn(2, 3, 4, 4)
    sample = ddim_sample(perfect_denoiser(x0), torch.randn(2, 3, 4, 4), BUFFERS["alphas_cumprod"], 20, eta)
    assert (sample - x0).abs().max() < 0.3  # the last step leaves the noise of t = 1
    assert (sample - x0).abs().mean() < 0.05


def test_ddpm_ends_at_what_a_perfect_denoiser_knows():
    torch.manual_seed(0)
    x0 = torch.randn(1, 3, 4, 4)
    seen = []
    sample = ddpm_sample(perfect_denoiser(x0), torch.randn(1, 3, 4, 4), BUFFERS, callback=seen.append)
    torch.testing.assert_close(sample, x0, atol=1e-3, rtol=1e-3)
    assert [seen[0].timestep, seen[-1].timestep] == [999, 0]


def test_ddim_without_noise_repeats_itself_and_calls_back():
    x_T, seen = torch.randn(1, 3, 4, 4), []
    denoise = perfect_denoiser(torch.ones(1, 3, 4, 4))
    first = ddim_sample(denoise, x_T, BUFFERS["alphas_cumprod"], 10, callback=seen.append)
    torch.testing.assert_close(first, ddim_sample(denoise, x_T, BUFFERS["alphas_cumprod"], 10))
    assert [step.position for step in seen] == list(range(9, -1, -1))


def test_inpainting_keeps_the_known_part():
    torch.manual_seed(0)
    known, other = torch.ones(1, 3, 4, 4), -torch.ones(1, 3, 4, 4)
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., :2] = 1
    sample = ddim_sample(
        perfect_denoiser(known * mask + other * (1 - mask)),
        torch.randn(1, 3, 4, 4),
        BUFFERS["alphas_cumprod"],
        20,
        inpainting=Inpainting(mask, known),
    )
    assert (sample[..., :2] - 1).abs().mean() < 0.1
    assert (sample[..., 2:] + 1).abs().mean() < 0.1


def test_quantised_estimates_are_used():
    seen = []
    ddim_sample(
        perfect_denoiser(torch.full((1, 1, 2, 2), 0.7)),
        torch.randn(1, 1, 2, 2),
        BUFFERS["alphas_cumprod"],
        20,
        quantize_x0=torch.round,
        callback=seen.append,
    )
    assert all((step.pred_x0 == step.pred_x0.round()).all() for step in seen)
