import numpy as np
import pytest
import torch

from ldm.diffusion.parameterization import PARAMETERIZATIONS, parameterization
from ldm.diffusion.schedule import NoiseSchedule, make_beta_schedule
from ldm.util import ConfigError

BETAS = make_beta_schedule("linear", 1000, 0.0015, 0.0155)
EXACT = NoiseSchedule.from_betas(BETAS, dtype=torch.float64)


@pytest.fixture
def state():
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(4, 2, 3, 3, dtype=torch.float64, generator=generator) for _ in range(2))
    t = torch.tensor([0, 10, 500, 999])
    return x0, noise, t, EXACT.q_sample(x0, t, noise)


@pytest.mark.parametrize("name", PARAMETERIZATIONS)
def test_a_perfect_prediction_gives_back_image_and_noise(name, state):
    x0, noise, t, x_t = state
    kind = parameterization(name)
    target = kind.target(EXACT, x0, noise, t)
    torch.testing.assert_close(kind.to_x0(EXACT, x_t, t, target), x0)
    torch.testing.assert_close(kind.to_eps(EXACT, x_t, t, target), noise)


def test_velocity_is_the_published_one(state):
    """Salimans & Ho 2022: v = alpha eps - sigma x."""
    x0, noise, t, _ = state
    abar = np.cumprod(1 - BETAS)[t].reshape(-1, 1, 1, 1)
    expected = torch.from_numpy(np.sqrt(abar)) * noise - torch.from_numpy(np.sqrt(1 - abar)) * x0
    torch.testing.assert_close(parameterization("v").target(EXACT, x0, noise, t), expected)


def test_a_sub_gradient_of_x0_and_of_v_changes_the_clean_image_alike(state):
    x0, noise, t, x_t = state
    gradient = torch.randn_like(x0)
    moved = []
    for name in ("x0", "v"):
        kind = parameterization(name)
        scale = kind.sub_gradient_scale(EXACT, t, x0, training=False)
        moved.append(kind.to_x0(EXACT, x_t, t, kind.target(EXACT, x0, noise, t) + scale * gradient))
    torch.testing.assert_close(*moved)


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ConfigError, match="expected one of eps, x0, v; got 'epss'. Did you mean 'eps'"):
        parameterization("epss")
