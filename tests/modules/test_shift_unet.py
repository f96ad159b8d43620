"""The shift U-Net: reference figures, folded units against a loop, masks, freezing, starting from a checkpoint."""

from __future__ import annotations

import pytest
import torch
from golden_recipe import UNET_CONFIG, assert_stat, fill, inp, load_golden
from stand_ins import PLAIN_UNET
from test_autoencoder_nets import VQ
from torch import nn

from ldm.modules.diffusionmodules import blocks, openaimodel
from ldm.modules.diffusionmodules.openaimodel_shift import UNetModel
from ldm.util import ConfigError, UserError

GOLDEN = load_golden("modules")
STEPS = torch.tensor([7, 912])
SHIFT = {"seprate_decoder": True, "orth_emb": True, "latent_unit": 6, "repre_emb_channels": 32}
TINY = {**PLAIN_UNET, "seprate_decoder": True, "orth_emb": True, "latent_unit": 3, "repre_emb_channels": 5}


def tiny(**changes):
    return fill(UNetModel(**{**TINY, **changes}))


def tiny_inputs(batch=2, dtype=torch.float32):
    return inp((batch, 4, 8, 8)).to(dtype), STEPS[:batch], inp((batch, 3, 5), 0.5).to(dtype)


def count(parameters):
    return sum(parameter.numel() for parameter in parameters)


def test_size():
    unet = UNetModel(**UNET_CONFIG, **SHIFT)
    assert count(unet.parameters()) == 52_161_158
    assert count(p for p in unet.parameters() if p.requires_grad) == 22_738_691
    assert len(list(unet.trainable_parameters())) == GOLDEN["ema_keys"] - 2
    assert count(unet.trainable_parameters()) == 22_738_691


@pytest.mark.parametrize("kind", ["orth", "plain"])
def test_figures(kind):
    golden = GOLDEN[f"shift_{kind}"]
    unet = fill(UNetModel(**UNET_CONFIG, **{**SHIFT, "orth_emb": kind == "orth"}))
    x, context = inp((2, 3, 16, 16)), inp((2, 192), 0.5)
    with torch.no_grad():
        out = unet(x, STEPS, context)
        single = unet(x, STEPS, context, sampled_index=torch.tensor([1, 1]))
    assert_stat(out.pred, golden["pred"])
    assert_stat(out.out_grad, golden["out_grad"])
    assert_stat(out.unit_grad[torch.arange(2), torch.tensor([2, 5])], golden["sub_grad"])
    assert_stat(single.out_grad, golden["sampled_index_1"])
    if kind == "orth":
        weight = unet.part_latents.weight
        matrix = torch.linalg.matrix_exp(weight.T - weight)
        assert_stat(matrix, golden["part_emb_matrix"])
        assert torch.equal(unet.part_codes(), matrix[:6])


def test_text_unit_figures():
    """Seven units of width 768, as CLIP's text tower gives them."""
    golden = GOLDEN["clip_shift"]
    unet = fill(UNetModel(**UNET_CONFIG, **{**SHIFT, "latent_unit": 7, "repre_emb_channels": 768}))
    root_betas = torch.linspace(0.0015**0.5, 0.0155**0.5, 1000, dtype=torch.float64)
    abar = torch.cumprod(1 - root_betas**2, dim=0)[STEPS].view(2, 1, 1, 1)
    text = nn.functional.normalize(inp((2, 7, 768), 0.5), dim=-1)
    first_stage = fill(VQ())
    with torch.no_grad():
        latent = 0.8 * first_stage.quant_conv(first_stage.encoder(inp((2, 3, 64, 64))))
    x = abar.sqrt().float() * latent + (1 - abar).sqrt().float() * inp((2, 3, 16, 16), 0.9)
    with torch.no_grad():
        out = unet(x, STEPS, text)
    assert_stat(out.pred, golden["pred"])
    assert_stat(out.out_grad, golden["out_grad"])
    assert_stat(out.unit_grad.transpose(0, 1), golden["sub_grad"])


@pytest.mark.parametrize(
    "changes", [{}, {"channel_mult": [2, 3], "num_heads": 8}, {"use_scale_shift_norm": True}, {"resblock_updown": True}]
)
def test_folded_units_equal_a_loop_with_gradients(changes):
    """Shared skips are convolved once; [2, 3] makes groups straddle the concatenation."""
    x, steps, context = tiny_inputs(dtype=torch.float64)
    folded, looped = tiny(**changes).double(), tiny(**changes).double()
    weight = inp((2, 3, 4, 8, 8), 0.2).double()
    out = folded(x, steps, context)
    (out.unit_grad * weight).sum().backward()
    units = [looped(x, steps, context, sampled_index=torch.full((2,), k)).unit_grad for k in range(3)]
    loop = torch.cat(units, dim=1)
    (loop * weight).sum().backward()
    torch.testing.assert_close(out.unit_grad, loop)
    for parameter, twin in zip(folded.trainable_parameters(), looped.trainable_parameters()):
        torch.testing.assert_close(parameter.grad, twin.grad)


def test_skip_half_is_convolved_once(monkeypatch):
    unet = tiny()
    rows = []
    convolve = blocks._convolve
    monkeypatch.setattr(
        blocks,
        "_convolve",
        lambda conv, x, *rest, **options: rows.append(len(x)) or convolve(conv, x, *rest, **options),
    )
    unet(*tiny_inputs())
    assert rows.count(2) == rows.count(6) > 0


def test_unit_chunk_changes_nothing():
    x, steps, context = tiny_inputs(dtype=torch.float64)
    context.requires_grad_()
    grads = []
    for unet in (tiny().double(), tiny(unit_chunk=2).double()):
        unit_grad = unet(x, steps, context).unit_grad
        grads.append(torch.autograd.grad(unit_grad.square().sum(), [context, *unet.trainable_parameters()]))
    for whole, chunked in zip(*grads):
        torch.testing.assert_close(whole, chunked)


def test_unset_units_are_exactly_zero_and_change_no_other():
    unet, (x, steps, context) = tiny(), tiny_inputs()
    mask = torch.tensor([[True, False, True], [False, False, False]])
    out, full = unet(x, steps, context, unit_mask=mask), unet(x, steps, context)
    assert (out.unit_grad[~mask] == 0).all()
    assert torch.equal(out.unit_grad[mask], full.unit_grad[mask])
    assert torch.equal(out.out_grad[1], torch.zeros_like(x[1]))
    single = unet(x, steps, context, unit_mask=mask, sampled_index=torch.tensor([1, 0]))
    assert (single.unit_grad == 0).all()


def test_sampled_index_is_per_sample():
    unet, (x, steps, context) = tiny().double(), tiny_inputs(dtype=torch.float64)
    index = torch.tensor([2, 0])
    single = unet(x, steps, context, sampled_index=index)
    full = unet(x, steps, context.flatten(1))
    assert single.unit_grad.shape == (2, 1, 4, 8, 8)
    torch.testing.assert_close(single.out_grad, full.unit_grad[torch.arange(2), index])


def test_one_sample_keeps_its_batch_axis():
    assert tiny()(*tiny_inputs(1)).unit_grad.shape == (1, 3, 4, 8, 8)


def test_units_differ_by_code_only_without_part_embedding():
    unet = tiny(wo_part_emb=True)
    assert not any(key.startswith("part_") for key in unet.state_dict())
    x, steps, context = tiny_inputs()
    same = context[:, :1].expand(-1, 3, -1)
    grads = unet(x, steps, same).unit_grad
    torch.testing.assert_close(grads[:, 0], grads[:, 2])
    assert not torch.allclose(*tiny()(x, steps, same).unit_grad[:, :2].unbind(1))


def test_joint_decoder():
    unet, (x, steps, context) = tiny(seprate_decoder=False), tiny_inputs()
    assert unet.repre_embed.weight.shape == (128, 15)
    assert unet(x, steps, context).unit_grad.shape == (2, 1, 4, 8, 8)
    mask = torch.tensor([[True, False, True], [False, False, False]])
    changed = context + torch.tensor([0.0, 1.0, 0.0])[:, None]
    first, second = (unet(x, steps, c, unit_mask=mask).unit_grad for c in (context, changed))
    assert torch.equal(first, second)
    assert (first[1] == 0).all()


def test_base_is_frozen_and_carries_no_gradient():
    unet = UNetModel(**TINY, dropout=0.5)
    assert unet.train() is unet
    assert not any(module.training for module in unet.input_blocks.modules())
    assert unet.shift_out.training
    x, steps, context = tiny_inputs()
    x.requires_grad_()
    out = unet(x, steps, context.requires_grad_())
    assert not out.pred.requires_grad
    assert torch.equal(out.pred, unet.base_prediction(x, steps))
    assert (out.unit_grad == 0).all()  # the last convolution starts at zero
    fill(unet).train()
    unet(x, steps, context).unit_grad.square().sum().backward()
    assert x.grad is None
    assert context.grad is not None
    assert all(p.grad is not None for p in unet.trainable_parameters())
    frozen = {id(p) for p in unet.parameters()} - {id(p) for p in unet.trainable_parameters()}
    assert all(p.grad is None and not p.requires_grad for p in unet.parameters() if id(p) in frozen)


def test_bfloat16_stays_close():
    unet, inputs = tiny(use_scale_shift_norm=True), tiny_inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = unet(*inputs)
    out = unet(*inputs)
    assert (half.unit_grad.float() - out.unit_grad).norm() < 0.05 * out.unit_grad.norm()


def test_wrong_widths_name_the_keys():
    unet, (x, steps, _) = tiny(), tiny_inputs()
    with pytest.raises(ConfigError, match=r"\(2, 3, 7\).*repre_emb_channels"):
        unet(x, steps, torch.randn(2, 3, 7))
    with pytest.raises(ValueError, match="None"):
        unet(x, steps, None)
    with pytest.raises(ConfigError, match="latent_unit: .* got 99"):
        UNetModel(**{**TINY, "latent_unit": 99})


def ldm_checkpoint(path, scale=0.8):
    """A latent-diffusion checkpoint whose averaged weights are the raw ones plus 1, with an object in it."""
    base = fill(openaimodel.UNetModel(**PLAIN_UNET))
    state = {"scale_factor": torch.tensor(scale), "model_ema.decay": torch.tensor(0.9999)}
    for name, weight in base.state_dict().items():
        state[f"model.diffusion_model.{name}"] = weight
        state[f"model_ema.diffusion_model{name.replace('.', '')}"] = weight + 1
    torch.save({"state_dict": state, "callbacks": {nn.Identity: {"best": 1}}}, path)
    return base


def test_starts_from_an_ldm_checkpoint(tmp_path):
    path = tmp_path / "ldm.ckpt"
    base = ldm_checkpoint(path)
    expected = base.input_blocks[0][0].weight
    for flags, offset in (
        ({}, 0),
        ({"load_ema_ckpt": True}, 1),
        ({"load_ema_ckpt": True, "legacy_load_ema_flag": True}, 0),
        ({"load_ema_ckpt": False, "legacy_load_ema_flag": True}, 1),
    ):
        unet = UNetModel(**TINY, ckpt_path=str(path), **flags)
        assert torch.equal(unet.input_blocks[0][0].weight, expected + offset)
        assert unet.scale_factor is unet.base_scale and unet.base_scale.item() == pytest.approx(0.8)
        assert not unet.input_blocks[0][0].weight.requires_grad
    fresh = UNetModel(**TINY)
    fresh.load_state_dict(unet.state_dict())
    assert fresh.scale_factor.item() == pytest.approx(0.8)
    state = UNetModel(**TINY).state_dict()
    unet.load_state_dict(state)
    assert "scale_factor" not in state


def test_bad_checkpoints_say_what_to_do(tmp_path):
    path = tmp_path / "ldm.ckpt"
    ldm_checkpoint(path)
    content = path.read_bytes()
    with pytest.raises(UserError, match="there is no checkpoint"):
        UNetModel(**TINY, ckpt_path=str(tmp_path / "none.ckpt"))
    with pytest.raises(UserError, match=r"input_blocks\.4"):
        UNetModel(**{**TINY, "channel_mult": [1, 2, 2]}, ckpt_path=str(path))
    with pytest.raises(UserError, match="shape"):
        UNetModel(**{**TINY, "channel_mult": [1, 3]}, ckpt_path=str(path))
    torch.save({"model.diffusion_model.x": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="averaged.*load_ema_ckpt: false"):
        UNetModel(**TINY, ckpt_path=str(path), load_ema_ckpt=True)
    for damaged in (content[: len(content) // 2], b"not a checkpoint", b""):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="damaged") as error:
            UNetModel(**TINY, ckpt_path=str(path))
        assert "weights_only" not in str(error.value)


def test_starts_from_safetensors(tmp_path):
    from safetensors.torch import save_file

    base = fill(openaimodel.UNetModel(**PLAIN_UNET))
    path = tmp_path / "ldm.safetensors"
    save_file({f"model.diffusion_model.{name}": weight for name, weight in base.state_dict().items()}, path)
    unet = UNetModel(**TINY, ckpt_path=str(path))
    assert torch.equal(unet.out[2].weight, base.out[2].weight)
    assert unet.base_scale is None
    path.write_bytes(b"nothing")
    with pytest.raises(UserError, match="damaged"):
        UNetModel(**TINY, ckpt_path=str(path))


TWINS = "shift_output_blocks.0.0.in_layers.2.weight", "output_blocks.0.0.in_layers.2.weight"


def have_equal_twins(unet):
    state = unet.state_dict()
    return torch.equal(*(state[name] for name in TWINS))


def test_shift_decoder_may_start_from_the_frozen_one(tmp_path):
    ldm_checkpoint(tmp_path / "ldm.ckpt")
    unet = UNetModel(**TINY, init_shift_from_base=True, ckpt_path=str(tmp_path / "ldm.ckpt"))
    assert have_equal_twins(unet)
    assert not unet.state_dict()["shift_out.2.weight"].any()
    assert not have_equal_twins(UNetModel(**TINY, ckpt_path=str(tmp_path / "ldm.ckpt")))


def test_shift_decoder_waits_for_weights_of_the_frozen_one_that_arrive_later():
    """Random weights are not copied; after loading, copy_base_to_shift() copies the loaded ones."""
    unet = UNetModel(**TINY, init_shift_from_base=True)
    assert unet.init_shift_from_base and not have_equal_twins(unet)
    base = fill(openaimodel.UNetModel(**PLAIN_UNET))
    unet.load_state_dict(base.state_dict(), strict=False)
    unet.copy_base_to_shift()
    assert torch.equal(unet.state_dict()[TWINS[0]], base.state_dict()[TWINS[1]])
    assert not unet.state_dict()["shift_out.2.weight"].any()
