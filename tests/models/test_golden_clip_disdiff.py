"""The CLIP-DisDiff code's own figures, on weights filled by rule: sub-gradients, its loss, five DDIM steps."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from golden_recipe import UNET_CONFIG, VQ_DDCONFIG, assert_stat, fill, inp, load_golden

from ldm.diffusion.samplers import DDIMSampler
from ldm.models.diffusion.methods.clip_disdiff.model import CLIPDisDiff
from ldm.models.diffusion.units import UnitCodes
from ldm.modules.encoders.image import Encoder4

GOLDEN = load_golden("clip_disdiff")
UNITS, WIDTH = 7, 768


def build(dis_loss_type):
    model = CLIPDisDiff(
        unet_config={
            "target": "ldm.modules.diffusionmodules.openaimodel_shift.UNetModel",
            "params": {
                **UNET_CONFIG,
                "latent_unit": UNITS,
                "repre_emb_channels": WIDTH,
                "seprate_decoder": True,
                "orth_emb": True,
            },
        },
        first_stage_config={
            "target": "ldm.models.autoencoder.VQModelInterface",
            "params": {
                "embed_dim": 3,
                "n_embed": 2048,
                "ddconfig": VQ_DDCONFIG,
                "lossconfig": {"target": "torch.nn.Identity"},
            },
        },
        cond_stage_config={name: {"target": "torch.nn.Identity"} for name in ("text_encoder", "image_encoder")},
        linear_start=0.0015,
        linear_end=0.0155,
        image_size=16,
        scale_factor=0.8,
        loss_type="l1",
        dis_loss_type=dis_loss_type,
        dis_weight=0.05,
        dis_mode="reference",
        monitor=None,
        use_ema=False,
    )
    fill(model.model.diffusion_model)
    fill(model.first_stage_model)
    model.cond_stage_model["image_encoder"] = fill(Encoder4(d=128, latent_dim=WIDTH))
    return model.eval()


def condition():
    return UnitCodes(F.normalize(inp((2, UNITS, WIDTH), 0.5), dim=-1), torch.ones(2, UNITS, dtype=torch.bool))


@pytest.mark.parametrize("kind", ["Z", "IM"])
@torch.no_grad()
def test_sub_gradients_and_reference_loss(kind):
    model, golden, t = build(kind), GOLDEN[f"clip_{kind}"], torch.tensor([7, 912])
    x_t = model.q_sample(model.encode_first_stage(inp((2, 3, 64, 64))), t, inp((2, 3, 16, 16), 0.9))
    out = model.gradients(x_t, t, condition())
    assert_stat(out.pred, golden["pred"])
    assert_stat(out.out_grad, golden["out_grad"])
    by_unit = out.unit_grad.transpose(0, 1).contiguous()
    assert list(by_unit.shape) == golden["sub_shape"]
    assert_stat(by_unit, golden["sub_grad"])
    loss = model.dis_loss(x_t, t, out, condition(), unit=torch.tensor([2, 5]))
    assert loss.tolist() == pytest.approx(golden["dis_loss"], rel=1e-4)


@pytest.mark.parametrize(("name", "only"), [("clip_ddim5", None), ("clip_ddim5_partial3", 3)])
def test_five_ddim_steps(name, only):
    model, golden = build("Z"), GOLDEN[name]
    only = None if only is None else torch.full((2,), only)
    sample = model.sample(inp((2, 3, 16, 16), 0.9), replace(condition(), only=only), sampler=DDIMSampler(5, eta=0.0))
    assert_stat(sample, golden.get("sample", golden))
