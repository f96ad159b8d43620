from dataclasses import replace

import pytest
import torch
from stand_ins import TINY_UNET, vq_config

from ldm.diffusion.samplers import DDIMSampler
from ldm.models.diffusion.methods.clip_disdiff.model import CLIPDisDiff
from ldm.util import ConfigError, UserError

TEXTS = [["red floor", "green wall"], ["blue floor", "pink wall"], ["red floor", ""]]
STAGE = {"text_encoder": {"target": "stand_ins.HashedText"}, "image_encoder": {"target": "stand_ins.LinearImage"}}


def build(**params):
    torch.manual_seed(0)
    unet = {**TINY_UNET, "latent_unit": 2, "repre_emb_channels": 16, "seprate_decoder": True, "orth_emb": True}
    model = CLIPDisDiff(
        unet_config={
            "target": "ldm.modules.diffusionmodules.openaimodel_shift.UNetModel",
            "params": {**unet, **params.pop("unet", {})},
        },
        cond_stage_config=params.pop("cond_stage_config", STAGE),
        first_stage_config=vq_config(),
        image_size=8,
        channels=4,
        timesteps=20,
        monitor=None,
        **params,
    )
    for parameter in model.model.diffusion_model.trainable_parameters():
        if parameter.ndim > 1 and not parameter.any():  # layers that start at zero would hide what is behind them
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def batch_of(texts=TEXTS):
    images = torch.randint(0, 256, (len(texts), 32, 32, 3), dtype=torch.uint8)
    return {"image": images, "text": [list(strings) for strings in texts]}


@pytest.mark.parametrize("mode", ["aligned", "sampled", "reference"])
@pytest.mark.parametrize("kind", ["Z", "IM"])
@pytest.mark.parametrize("parameterization", ["eps", "x0"])
def test_gradients_reach_the_sub_gradient_decoder_alone(mode, kind, parameterization):
    model = build(dis_mode=mode, dis_loss_type=kind, parameterization=parameterization, dis_weight=10.0)
    model.train()
    loss, terms, size = model.shared_step(batch_of())
    loss.backward()
    assert size == len(TEXTS)
    assert {"loss", "loss_simple", "loss_vlb", "loss_dis"} <= set(terms)
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    trained = {id(p) for p in model.trained_parameters()}
    assert reached
    assert all(id(p) in trained for name, p in model.named_parameters() if name in reached)
    frozen = ("first_stage_model", "cond_stage_model", "model.diffusion_model.input_blocks")
    assert not any(name.startswith(frozen) for name in reached)


def test_clip_is_registered_frozen_and_stays_in_eval_mode():
    model = build().train()
    assert "text_encoder" in model.cond_stage_model
    assert not any(p.requires_grad for p in model.cond_stage_model.parameters())
    assert not any(module.training for module in model.cond_stage_model.modules())
    assert not any(module.training for module in model.first_stage_model.modules())
    assert model.model.diffusion_model.shift_out.training


def test_an_unset_unit_adds_nothing_and_no_text_is_the_base_model():
    model = build().eval()
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([5])
    none = model.apply_model(x, t, model.encode_text([["", ""]]))
    torch.testing.assert_close(none, model.apply_model(x, t, None))
    out = model.gradients(x, t, model.encode_text([["red floor", ""]]))
    assert (out.unit_grad[:, 1] == 0).all()
    assert (out.unit_grad[:, 0] != 0).any()


def test_guidance_scales_and_only_selects_per_sample():
    model = build(parameterization="x0").eval()
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([5, 9])
    cond = model.encode_text(TEXTS[:2])
    base, out = model.apply_model(x, t, None), model.gradients(x, t, cond)
    scale = model.gradient_scale(t, x)
    torch.testing.assert_close(model.apply_model(x, t, replace(cond, guidance=2.0)), base + 2 * scale * out.out_grad)
    only = model.apply_model(x, t, replace(cond, only=torch.tensor([1, 0])))
    torch.testing.assert_close(only, base + scale * torch.stack([out.unit_grad[0, 1], out.unit_grad[1, 0]]))


def test_edits_of_the_same_noise_repeat_and_follow_the_text():
    model = build().eval()
    x_T = torch.randn(2, *model.latent_shape)
    first = model.sample_edit(TEXTS[:2], x_T, sampler=DDIMSampler(5))
    torch.testing.assert_close(first, model.sample_edit(TEXTS[:2], x_T, sampler=DDIMSampler(5)))
    conditions = [model.encode_text(texts) for texts in (TEXTS[:2], [["green floor", "green wall"]] * 2)]
    own, other = (model.sample(x_T, cond, sampler=DDIMSampler(5, eta=0.0)) for cond in conditions)
    assert (own - other).abs().max() > 1e-4
    assert first.shape == (2, 3, 32, 32)
    assert first.abs().max() <= 1


def test_the_disentangling_loss_may_use_a_part_of_the_batch():
    model = build(dis_batch_size=2)
    x, t = torch.randn(3, 4, 8, 8), torch.tensor([1, 5, 9])
    cond = model.encode_text(TEXTS)
    assert model.dis_loss(x, t, model.gradients(x, t, cond), cond).shape == (2,)


def test_pictures_have_a_row_per_unit_and_text_on_the_axes():
    model = build().eval()
    pictures = model.log_images(batch_of(), ddim_steps=2, plot_decoded_xstart=True)
    grid = pictures["samples_swapping"]
    assert len(grid.rows) == 3
    assert grid.columns[0] == "red floor\ngreen wall"
    assert len(grid.images) == len(grid.rows) * len(grid.columns)
    assert {"predXstart_st", "predXstart_fl", "predXstart_0", "predXstart_1"} <= set(pictures)
    assert pictures["samples"].rows == ["image", "sample"]
    assert {"diffusion_row", "progressive_row", "mask"}.isdisjoint(pictures)


def test_a_swap_is_a_change_of_text():
    """Rows of the swap grid are what the texts would give, an unset text included."""
    model, texts = build().eval(), [TEXTS[2], TEXTS[0]]
    cond = model.encode_text(texts)
    for unit in range(2):
        changed = [texts[0], [*texts[1][:unit], texts[0][unit], *texts[1][unit + 1 :]]]
        swapped, wanted = cond.swapped(unit), model.encode_text(changed)
        assert torch.equal(swapped.codes, wanted.codes)
        assert torch.equal(swapped.mask, wanted.mask)


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ({"image": torch.zeros(1, 32, 32, 3, dtype=torch.uint8)}, "entry 'text'"),
        (batch_of([["red floor"]]), "expected 2 attributes"),
        (batch_of([["a", "b", "c"]]), "3 attributes"),
        ({"image": torch.zeros(1, 36, 36, 3), "text": [["a", "b"]]}, "9 x 9 for images of 36 x 36"),
    ],
)
def test_bad_batches_are_explained(batch, words):
    with pytest.raises(UserError, match=words):
        build().shared_step(batch)


def test_unknown_options_list_the_known_ones():
    with pytest.raises(ConfigError, match="aligned, sampled, reference"):
        build(dis_mode="alinged")
    with pytest.raises(ConfigError, match="'Z' or 'IM'"):
        build(dis_loss_type="X")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"unet": {"seprate_decoder": False}}, "seprate_decoder"),
        ({"unset_prob": 1.0}, "probability"),
        ({"cond_stage_trainable": True}, "frozen"),
    ],
)
def test_options_that_cannot_work_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        build(**options)
