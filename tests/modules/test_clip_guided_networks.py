"""The U-Net of the CLIP-guided DDPM against its equations in float64, and the keys of both published layouts."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from ldm.modules.diffusionmodules.clip_guided import UNet
from ldm.util import ConfigError, UserError

ARCHS = ("package", "dli")
SMALL = {"T": 40, "img_ch": 3, "img_size": 8, "down_chs": (32, 32, 64), "c_embed_dim": 16}


def convolution(arch, key):
    """Keys of a convolution with its normalization."""
    names = ("conv", "norm") if arch == "package" else ("model.0", "model.1")
    return [f"{key}.{name}.{kind}" for name in names for kind in ("weight", "bias")]


def layer(key):
    return [f"{key}.weight", f"{key}.bias"]


def expected_keys(arch):
    keys = convolution(arch, "down0.conv1") + convolution(arch, "down0.conv2")
    keys += layer("down0.shortcut") if arch == "package" else []
    for name in ("down1", "down2"):
        for part in ("model.0", "model.1", "model.2.conv"):
            keys += convolution(arch, f"{name}.{part}")
    keys += [key for number in ((0, 2) if arch == "package" else (0, 2, 4)) for key in layer(f"dense_emb.{number}")]
    times = ("t_emb1", "t_emb2") if arch == "package" else ("temb_1", "temb_2")
    for name in (*times, "c_embed1", "c_embed2"):
        keys += layer(f"{name}.model.0") + layer(f"{name}.model.2")
    keys += convolution(arch, "up0" if arch == "package" else "up0.1")
    for name in ("up1", "up2"):
        keys += layer(f"{name}.model.0")
        for number in range(1, 5):
            keys += convolution(arch, f"{name}.model.{number}")
    return keys + layer("out.0") + layer("out.1") + layer("out.3")


@pytest.mark.parametrize("arch", ARCHS)
def test_keys_and_their_order(arch):
    assert list(UNet(**SMALL, arch=arch).state_dict()) == expected_keys(arch)


def test_shapes_of_the_published_size():
    with torch.device("meta"):
        state = {key: tuple(value.shape) for key, value in UNet(400).state_dict().items()}
        course = {key: tuple(value.shape) for key, value in UNet(400, arch="dli").state_dict().items()}
    assert state["down0.shortcut.weight"] == (256, 3, 1, 1)
    assert state["down1.model.2.conv.conv.weight"] == (256, 1024, 3, 3)
    assert state["down2.model.2.conv.conv.weight"] == (512, 2048, 3, 3)
    assert state["dense_emb.0.weight"] == (256, 32768) and state["dense_emb.2.weight"] == (32768, 256)
    assert state["t_emb1.model.0.weight"] == (512, 8) and state["t_emb2.model.0.weight"] == (256, 8)
    assert state["c_embed1.model.0.weight"] == (512, 512) and state["c_embed2.model.0.weight"] == (256, 512)
    assert state["up1.model.0.weight"] == (1024, 256, 2, 2) and state["up2.model.0.weight"] == (512, 256, 2, 2)
    assert state["out.0.weight"] == (256, 512, 3, 3) and state["out.3.weight"] == (3, 256, 3, 3)
    assert course["dense_emb.2.weight"] == (256, 256) and course["dense_emb.4.weight"] == (32768, 256)
    assert course["up0.1.model.0.weight"] == (512, 512, 3, 3)


class Equations:
    """The forward pass from the state dict alone."""

    def __init__(self, arch, state, T, img_size):
        self.arch, self.state, self.T, self.side = arch, state, T, img_size // 4

    def conv(self, key, x, groups=32):
        conv, norm = ("conv", "norm") if self.arch == "package" else ("model.0", "model.1")
        s = self.state
        x = F.conv2d(x, s[f"{key}.{conv}.weight"], s[f"{key}.{conv}.bias"], padding=1)
        return F.gelu(F.group_norm(x, groups, s[f"{key}.{norm}.weight"], s[f"{key}.{norm}.bias"]))

    def linear(self, key, x):
        return F.linear(x, self.state[f"{key}.weight"], self.state[f"{key}.bias"])

    def embed(self, key, x):
        return self.linear(f"{key}.model.2", F.gelu(self.linear(f"{key}.model.0", x)))[:, :, None, None]

    def down(self, key, x):
        x = self.conv(f"{key}.model.1", self.conv(f"{key}.model.0", x))
        b, c, h, w = x.shape
        folded = torch.empty(b, 4 * c, h // 2, w // 2, dtype=x.dtype)
        for p1 in (0, 1):
            for p2 in (0, 1):
                folded[:, 2 * p1 + p2 :: 4] = x[:, :, p1::2, p2::2]
        return self.conv(f"{key}.model.2.conv", folded)

    def up(self, key, x, skip):
        weight, bias = self.state[f"{key}.model.0.weight"], self.state[f"{key}.model.0.bias"]
        x = F.conv_transpose2d(torch.cat([x, skip], 1), weight, bias, stride=2)
        for number in range(1, 5):
            x = self.conv(f"{key}.model.{number}", x)
        return x

    def bottleneck(self, x):
        x = x.reshape(len(x), -1)
        if self.arch == "package":
            return F.gelu(self.linear("dense_emb.2", F.gelu(self.linear("dense_emb.0", x))))
        x = F.gelu(x)
        for number in (0, 2, 4):
            x = F.relu(self.linear(f"dense_emb.{number}", x))
        return x

    def __call__(self, x, t, c):
        h = self.conv("down0.conv1", x, 8)
        around = h
        if self.arch == "package":
            around = F.conv2d(x, self.state["down0.shortcut.weight"], self.state["down0.shortcut.bias"])
        down0 = around + self.conv("down0.conv2", h, 8)
        down1 = self.down("down1", down0)
        down2 = self.down("down2", down1)
        frequency = torch.exp(-math.log(10000) / 3 * torch.arange(4, dtype=torch.float64))
        angles = (t.double() / self.T)[:, None] * frequency
        angles = torch.cat([angles.sin(), angles.cos()], 1)
        time1, time2 = ("t_emb1", "t_emb2") if self.arch == "package" else ("temb_1", "temb_2")
        latent = self.bottleneck(down2).reshape(len(x), -1, self.side, self.side)
        up0 = self.conv("up0" if self.arch == "package" else "up0.1", latent)
        up1 = self.up("up1", self.embed("c_embed1", c) * up0 + self.embed(time1, angles), down2)
        up2 = self.up("up2", self.embed("c_embed2", c) * up1 + self.embed(time2, angles), down1)
        s = self.state
        out = F.conv2d(torch.cat([up2, down0], 1), s["out.0.weight"], s["out.0.bias"], padding=1)
        out = F.group_norm(out, 8, s["out.1.weight"], s["out.1.bias"])
        out = F.gelu(out) if self.arch == "package" else F.relu(out)
        return F.conv2d(out, s["out.3.weight"], s["out.3.bias"], padding=1)


@pytest.mark.parametrize("arch", ARCHS)
def test_forward_pass_is_that_of_the_equations(arch):
    torch.manual_seed(0)
    network = UNet(**SMALL, arch=arch).double()
    x, c, t = torch.randn(3, 3, 8, 8).double(), torch.randn(3, 16).double(), torch.tensor([0, 7, 39])
    expected = Equations(arch, network.state_dict(), 40, 8)(x, t, c)
    torch.testing.assert_close(network(x, t, c), expected, rtol=1e-6, atol=1e-6)  # t / T is float32
    assert torch.equal(network(x, t), network(x, t, torch.zeros_like(c)))
    mask = torch.tensor([[1.0], [0.0], [1.0]]).double()
    assert torch.equal(network(x, t, c, mask), network(x, t, c * mask))
    assert not torch.allclose(network(x, t, c), network(x, t))


def test_other_names_of_the_course_load():
    state = UNet(**SMALL, arch="dli").state_dict()
    renamed = {key.replace("temb_", "t_emb"): value for key, value in state.items()}
    network = UNet(**SMALL, arch="dli")
    network.load_state_dict(renamed)
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in state.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arch": "dlii"}, "arch: expected 'package' or 'dli'"),
        ({"img_size": 30}, "img_size: expected a multiple of 4, got 30"),
        ({"down_chs": (32, 64)}, "down_chs: expected three"),
        ({"down_chs": (32, 48, 64)}, "multiples of 32"),
        ({"t_embed_dim": 3}, "t_embed_dim: expected an even number"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        UNet(**{**SMALL, **change})


def test_inputs_of_other_sizes_are_refused():
    network = UNet(**SMALL)
    with pytest.raises(UserError, match=r"expected inputs of shape \(3, 8, 8\), got \(3, 16, 16\)"):
        network(torch.zeros(1, 3, 16, 16), torch.zeros(1))
    with pytest.raises(UserError, match=r"expected conditions of shape \(B, 16\), got \(1, 512\)"):
        network(torch.zeros(1, 3, 8, 8), torch.zeros(1), torch.zeros(1, 512))
