"""The names of the reference package: the same samples as the model, and the loop written out."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from legacy_configs import save_clip

from ldm.diffusion.samplers import DDIMSampler
from ldm.models.diffusion.methods.clip_guided.api import DDPM, UNet
from ldm.models.diffusion.methods.clip_guided.model import STRENGTHS, CLIPGuidedDDPM

T, SIZE, WIDTH = 20, 8, 16
NETWORK = {"T": T, "img_ch": 3, "img_size": SIZE, "down_chs": [32, 32, 64], "c_embed_dim": WIDTH}


@pytest.fixture(scope="module")
def parts():
    """The process of given betas, a network, and the model with the same weights."""
    torch.manual_seed(0)
    target = "ldm.modules.diffusionmodules.clip_guided.UNet"
    options = {"timesteps": T, "beta_schedule": "sqrt_linear", "linear_start": 1e-4, "linear_end": 0.02}
    options |= {"image_size": SIZE, "channels": 3, "use_ema": False, "monitor": None}
    options["sampler"] = {"target": "ldm.diffusion.samplers.DDPMSampler", "params": {"variance": "previous"}}
    model = CLIPGuidedDDPM(unet_config={"target": target, "params": NETWORK}, **options).eval()
    network = UNet(T, img_ch=3, img_size=SIZE, down_chs=(32, 32, 64), t_embed_dim=8, c_embed_dim=WIDTH)
    network.load_state_dict(model.model.diffusion_model.state_dict())
    return DDPM(torch.linspace(1e-4, 0.02, T), "cpu"), network.eval(), model


@pytest.mark.parametrize("w", [0.0, 1.5, -2.0])
def test_sample_is_the_written_out_loop(parts, w):
    ddpm, network, _ = parts
    c, x_T = torch.randn(3, WIDTH), torch.randn(3, 3, SIZE, SIZE)
    torch.manual_seed(5)
    found = ddpm.sample(network, c, w, x_T)
    beta = torch.linspace(1e-4, 0.02, T).double()
    alpha, abar = 1 - beta, torch.cumprod(1 - beta, 0)
    torch.manual_seed(5)
    x, none = x_T, torch.zeros_like(c)
    with torch.no_grad():
        for t in reversed(range(T)):
            steps = torch.full((3,), t)
            eps = (1 + w) * network(x, steps, c) - w * network(x, steps, none)
            x = (x - (1 - alpha[t]) / (1 - abar[t]).sqrt() * eps) / alpha[t].sqrt()
            x = (x + (beta[t - 1].sqrt() * torch.randn(3, 3, SIZE, SIZE) if t else 0)).float()
    torch.testing.assert_close(found, x, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("sampler", [None, DDIMSampler(4)])
def test_sample_w_is_that_of_the_model(parts, sampler):
    ddpm, network, model = parts
    c, x_T = torch.randn(2, WIDTH), torch.randn(2 * len(STRENGTHS), 3, SIZE, SIZE)
    torch.manual_seed(1)
    images, states = ddpm.sample_w(network, c, x_T=x_T, sampler=sampler)
    torch.manual_seed(1)
    expected, expected_states = model.sample_w(c, x_T=x_T, sampler=sampler)
    torch.testing.assert_close(images, expected, rtol=1e-3, atol=1e-4)
    assert len(states) == len(expected_states) and images.shape == x_T.shape
    assert ddpm.sample_w(network, c, [0.0], sampler=sampler)[0].shape == (2, 3, SIZE, SIZE)


def test_one_strength_costs_one_prediction_if_it_is_zero(parts):
    ddpm, network, _ = parts
    sizes = []
    handle = network.register_forward_pre_hook(lambda module, given: sizes.append(len(given[0])))
    for strengths in ([0.0], [1.0], [0.0, 1.0]):
        ddpm.sample_w(network, torch.randn(2, WIDTH), strengths, sampler=DDIMSampler(2))
    handle.remove()
    assert sizes == [2, 2, 4, 4, 8, 8]


def test_the_example_of_the_documentation_runs(tmp_path, monkeypatch):
    text = (Path(__file__).parents[2] / "docs" / "methods.md").read_text()
    example = re.search(r"```python\n(import torch\n.*?clip_guided.*?)```", text, re.DOTALL)[1]
    save_clip(tmp_path / "clip")
    small = {"T = 400": "T = 4", "(256, 256, 512)": "(32, 32, 64)", "c_embed_dim=512": "c_embed_dim=64"}
    texts = {"A fish swimming": "red floor", "A beautiful tree": "blue wall"}
    for name, value in {**small, **texts, "ViT-B/32": str(tmp_path / "clip")}.items():
        assert name in example
        example = example.replace(name, value)
    (tmp_path / "model_checkpoint").mkdir()
    torch.save(
        {"model": UNet(4, down_chs=(32, 32, 64), c_embed_dim=64).state_dict()}, tmp_path / "model_checkpoint/9.pth"
    )
    monkeypatch.chdir(tmp_path)
    found: dict = {}
    exec(example, found)
    assert found["images"].shape == (2, 3, 32, 32) and found["grid"].shape == (6, 3, 32, 32)
