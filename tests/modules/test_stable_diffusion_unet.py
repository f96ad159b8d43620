"""Options of Stable Diffusion 2 in the U-Net, against plain formulas and the rules of its layout."""

from __future__ import annotations

import math

import pytest
import stable_diffusion_layout as layout
import torch
from torch import Tensor

from ldm.modules.attention import CrossAttention, SpatialTransformer
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.modules.diffusionmodules.util import timestep_embedding
from ldm.util import ConfigError, UserError

CONTEXT = 6
SMALL = {
    **{"image_size": 8, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": 1},
    **{"attention_resolutions": [1, 2], "channel_mult": [1, 2], "num_head_channels": 8, "legacy": False},
    **{"use_spatial_transformer": True, "context_dim": CONTEXT},
}


def randomized(module):
    """Layers that start at zero would hide an error."""
    for parameter in module.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return module


def shapes_of(module):
    return {key: tuple(value.shape) for key, value in module.state_dict().items()}


def unet(**changes):
    return randomized(UNetModel(**{**SMALL, **changes}))


def attention(state: dict[str, Tensor], name: str, x: Tensor, source: Tensor, heads: int) -> Tensor:
    """softmax(Q K^T / sqrt d) V, head by head."""
    q, k, v = (given @ state[f"{name}.to_{n}.weight"].T for n, given in (("q", x), ("k", source), ("v", source)))
    width = q.shape[-1] // heads
    parts = []
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        scores = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(width)
        parts.append(scores.softmax(-1) @ v[..., part])
    return torch.cat(parts, -1) @ state[f"{name}.to_out.0.weight"].T + state[f"{name}.to_out.0.bias"]


def plain_transformer(state, x, context, heads, is_linear=False, disabled=False):
    """A spatial transformer of one block from its equations."""

    def norm(name, h):
        h = (h - h.mean(-1, keepdim=True)) / (h.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        return h * state[f"{name}.weight"] + state[f"{name}.bias"]

    def project(name, h):
        weight = state[f"{name}.weight"]
        return h @ (weight if is_linear else weight[:, :, 0, 0]).T + state[f"{name}.bias"]

    batch, channels, height, width = x.shape
    groups = x.reshape(batch, 32, -1)
    h = (groups - groups.mean(-1, keepdim=True)) / (groups.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
    h = h.reshape(x.shape) * state["norm.weight"][:, None, None] + state["norm.bias"][:, None, None]
    h = project("proj_in", h.flatten(2).transpose(1, 2))
    block = "transformer_blocks.0"
    first = norm(f"{block}.norm1", h)
    h = h + attention(state, f"{block}.attn1", first, context if disabled else first, heads)
    h = h + attention(state, f"{block}.attn2", norm(f"{block}.norm2", h), context, heads)
    value, gate = project_linear(state, f"{block}.ff.net.0.proj", norm(f"{block}.norm3", h)).chunk(2, -1)
    gelu = 0.5 * gate * (1 + torch.erf(gate / math.sqrt(2)))
    h = h + project_linear(state, f"{block}.ff.net.2", value * gelu)
    return x + project("proj_out", h).transpose(1, 2).reshape(x.shape)


def project_linear(state, name, h):
    return h @ state[f"{name}.weight"].T + state[f"{name}.bias"]


@pytest.mark.parametrize("is_linear", [False, True])
@pytest.mark.parametrize("disabled", [False, True])
def test_transformer_equals_its_equations(is_linear, disabled):
    torch.manual_seed(0)
    module = SpatialTransformer(64, 4, 16, context_dim=CONTEXT, use_linear=is_linear, disable_self_attn=disabled)
    assert shapes_of(module) == layout.transformer(64, CONTEXT, is_linear, disabled)
    state = randomized(module).state_dict()
    x, context = torch.randn(2, 64, 3, 5), torch.randn(2, 7, CONTEXT)
    expected = plain_transformer(state, x, context, 4, is_linear, disabled)
    assert torch.allclose(module(x, context), expected, atol=1e-5)


def test_transformer_of_another_width_than_the_features():
    """Linear projections lead to the transformer's width and back."""
    module = randomized(SpatialTransformer(64, 2, 16, context_dim=CONTEXT, use_linear=True))
    assert module.proj_in.weight.shape == (32, 64) and module.proj_out.weight.shape == (64, 32)
    assert module(torch.randn(2, 64, 4, 4), torch.randn(2, 3, CONTEXT)).shape == (2, 64, 4, 4)


def test_timestep_embedding_equals_its_equation():
    t = torch.tensor([0, 1, 999])
    found = timestep_embedding(t, 6)
    for row, step in zip(found, t.tolist()):
        angles = [step * 10000 ** (-i / 3) for i in range(3)]
        expected = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
        assert row.tolist() == pytest.approx(expected, abs=1e-4)


def test_linear_projections_are_the_convolutions():
    torch.manual_seed(0)
    old, new = unet(), UNetModel(**{**SMALL, "use_linear_in_transformer": True})
    state = {k: v[:, :, 0, 0] if ".proj_" in k and v.ndim == 4 else v for k, v in old.state_dict().items()}
    new.load_state_dict(state)
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([3, 900]), torch.randn(2, 5, CONTEXT)
    assert torch.allclose(old(*inputs), new(*inputs), atol=1e-5)
    assert shapes_of(new) == layout.unet(32, (1, 2), (0, 1), CONTEXT, is_linear=True, num_blocks=1)


def test_first_attention_to_the_tokens_by_level():
    disabled = [True, False]
    network = unet(disable_self_attentions=disabled)
    assert shapes_of(network) == layout.unet(32, (1, 2), (0, 1), CONTEXT, num_blocks=1, disabled=disabled)
    middle = unet(disable_middle_self_attn=True)
    changed = {k for k, v in shapes_of(unet()).items() if shapes_of(middle)[k] != v}
    assert changed == {f"middle_block.1.transformer_blocks.0.attn1.to_{n}.weight" for n in "kv"}
    for module in (network, middle):
        assert module(torch.randn(2, 4, 8, 8), torch.tensor([3, 900]), torch.randn(2, 5, CONTEXT)).isfinite().all()


def test_numbers_of_blocks_by_level():
    network = unet(num_res_blocks=[1, 2])
    assert len(network.input_blocks) == 1 + 1 + 1 + 2 and len(network.output_blocks) == 2 + 3
    assert network(torch.randn(2, 4, 8, 8), torch.tensor([3, 900]), torch.randn(2, 5, CONTEXT)).shape == (2, 4, 8, 8)


def test_class_labels_beside_tokens():
    network = unet(num_classes=1000)
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([3, 900]), torch.randn(2, 5, CONTEXT)
    low, high = (network(*inputs, y=torch.full((2,), level)) for level in (20, 300))
    assert not torch.allclose(low, high)


@pytest.mark.parametrize("name", ["num_res_blocks", "disable_self_attentions"])
def test_lists_have_one_entry_per_level(name):
    with pytest.raises(ConfigError, match=f"params.{name}: expected one entry for each of the 2 levels"):
        unet(**{name: [1, 1, 1]})


def test_half_precision_switches_are_named(caplog):
    unet(use_fp16=True, use_bf16=True)
    assert "`use_fp16` is ignored" in caplog.text and "`use_bf16` is ignored" in caplog.text


@pytest.mark.parametrize("shape", [(2, 5, CONTEXT + 1), (2, CONTEXT - 1)])
def test_tokens_of_another_width_are_named(shape):
    expected = f"tokens of width {CONTEXT} .unet_config.params.context_dim., got tokens of width {shape[-1]}"
    for module in (unet(), unet(use_checkpoint=True, use_linear_in_transformer=True)):
        with pytest.raises(UserError, match=expected):
            module(torch.randn(2, 4, 8, 8), torch.tensor([3, 900]), torch.randn(*shape))
    with pytest.raises(UserError, match="got no tokens"):
        unet()(torch.randn(2, 4, 8, 8), torch.tensor([3, 900]))
    with pytest.raises(UserError, match="cond_stage_config"):
        CrossAttention(8, CONTEXT)(torch.randn(1, 4, 8), torch.randn(1, 4, 8))
