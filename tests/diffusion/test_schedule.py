import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ldm.diffusion.parameterization import parameterization
from ldm.diffusion.schedule import NoiseSchedule, extract, make_beta_schedule
from ldm.util import ConfigError

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "diffusion.json").read_text())
SCHEDULES = {
    "beta_linear_disdiff": ("linear", 0.0015, 0.0155),
    "beta_linear_default": ("linear", 1e-4, 2e-2),
    "beta_cosine": ("cosine", 1e-4, 2e-2),
    "beta_sqrt_linear": ("sqrt_linear", 1e-4, 2e-2),
    "beta_sqrt": ("sqrt", 1e-4, 2e-2),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_golden_betas(name):
    kind, start, end = SCHEDULES[name]
    betas = make_beta_schedule(kind, 1000, start, end)
    abar = np.cumprod(1 - betas)
    found = {"b0": betas[0], "b500": betas[500], "b999": betas[999], "abar500": abar[500], "abar999": abar[999]}
    for key, value in GOLDEN[name].items():
        assert found[key] == pytest.approx(value, rel=1e-9), key


def test_golden_buffers():
    schedule = NoiseSchedule.from_betas(make_beta_schedule("linear", 1000, 0.0015, 0.0155))
    buffers = {**schedule.constants(), "lvlb_weights": parameterization("eps").vlb_weights(schedule)}
    for name, figures in GOLDEN["ld_buffers"].items():
        if name == "scale_factor":
            continue
        values = buffers[name]
        assert list(values.shape) == figures["shape"]
        assert values.dtype == torch.float32
        for key, index in (("v0", 0), ("v500", 500), ("vlast", -1)):
            assert values[index].item() == pytest.approx(figures[key], rel=1e-6, abs=1e-12), (name, key)


def test_signal_and_noise_share_the_unit_variance():
    buffers = NoiseSchedule.from_betas(make_beta_schedule("cosine", 50)).constants()
    total = buffers["sqrt_alphas_cumprod"] ** 2 + buffers["sqrt_one_minus_alphas_cumprod"] ** 2
    torch.testing.assert_close(total, torch.ones(50))
    assert (buffers["ddim_coef"] == -buffers["sqrt_one_minus_alphas_cumprod"]).all()


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ConfigError, match="sqrt_linear"):
        make_beta_schedule("linaer", 10)


def test_extract_broadcasts_over_images():
    assert extract(torch.arange(5.0), torch.tensor([3, 1]), torch.zeros(2, 3, 4, 4)).shape == (2, 1, 1, 1)
