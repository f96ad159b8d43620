"""Checkpoints of the references: what is read, what is refused, what is said, and what the keys are called."""

from __future__ import annotations

import argparse
import collections
import logging
import os
import pathlib
import pickle
import sys
import types

import pytest
import torch
from golden_recipe import fill
from legacy_configs import MODELS
from stand_ins import DISDIFF_SCHEDULE, LDM_SCHEDULE, TINY_UNET, vq_config

from ldm.models.autoencoder import VQModelInterface
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.methods.clip_disdiff.model import CLIPDisDiff
from ldm.modules.weights import read_state_dict
from ldm.runs.checkpoint_io import read_checkpoint
from ldm.util import UserError, instantiate_from_config

UNET = {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": TINY_UNET}
COMMON = {"image_size": 8, "channels": 4, "timesteps": 20, "monitor": None}


def ldm(**params):
    torch.manual_seed(0)
    defaults = {**COMMON, "unet_config": UNET, "cond_stage_config": "__is_unconditional__"}
    return LatentDiffusion(first_stage_config=vq_config(), **{**defaults, **params})


def clip_disdiff(**params):
    torch.manual_seed(1)
    shift = {**TINY_UNET, "latent_unit": 3, "repre_emb_channels": 16, "seprate_decoder": True, "orth_emb": True}
    return CLIPDisDiff(
        unet_config={"target": "ldm.modules.diffusionmodules.openaimodel_shift.UNetModel", "params": shift},
        first_stage_config=vq_config(),
        cond_stage_config={
            "text_encoder": {"target": "stand_ins.HashedText"},
            "image_encoder": {"target": "stand_ins.LinearImage"},
        },
        **{**COMMON, **params},
    )


def reference_state(scale_by_std=True, use_ema=True):
    """A state dict of latent-diffusion's own key layout, filled by the recipe of the golden figures."""
    model = fill(ldm(scale_by_std=scale_by_std, use_ema=use_ema))
    state = {key: value for key, value in model.state_dict().items() if key not in DISDIFF_SCHEDULE}
    fresh = ldm()
    state |= {name: getattr(fresh, name) for name in LDM_SCHEDULE}
    return state | ({"scale_factor": torch.tensor(0.8)} if scale_by_std else {})


def lightning_file(path, state):
    """What Lightning 1.4 wrote: callbacks by their class, settings as namespaces."""
    callback = type("ModelCheckpoint", (), {"__module__": "pytorch_lightning.callbacks.model_checkpoint"})
    parsing = types.ModuleType("pytorch_lightning.utilities.parsing")
    parsing.AttributeDict = type("AttributeDict", (dict,), {"__module__": parsing.__name__})
    real, places = {}, {parsing.__name__: parsing, callback.__module__: types.ModuleType(callback.__module__)}
    places[callback.__module__].ModelCheckpoint = callback
    for name, module in places.items():
        real[name], sys.modules[name] = sys.modules.get(name), module
    try:
        torch.save(
            {
                "epoch": 3,
                "global_step": 40,
                "pytorch-lightning_version": "1.4.2",
                "state_dict": state,
                "callbacks": {callback: {"best_model_path": pathlib.PurePosixPath("a")}},
                "optimizer_states": [],
                "lr_schedulers": [],
                "hyper_parameters": parsing.AttributeDict(lr=0.1, args=argparse.Namespace(gpus=1)),
                "extra": collections.defaultdict(list),
            },
            path,
        )
    finally:
        for name, module in real.items():
            sys.modules.pop(name) if module is None else sys.modules.__setitem__(name, module)
    return path


class Wipe:
    """A pickle of this wants to run a command."""

    def __reduce__(self):
        return os.system, ("touch WIPED",)


def test_legacy_lightning_checkpoints_and_bare_weights_are_read(tmp_path):
    state = reference_state()
    torch.save(state, tmp_path / "bare.pt")
    torch.save({"state_dict": state, "global_step": 4}, tmp_path / "zoo.ckpt")
    torch.save({"state_dict": state}, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    others = [tmp_path / name for name in ("bare.pt", "zoo.ckpt", "old.ckpt")]
    lightning = lightning_file(tmp_path / "last.ckpt", state)
    for path in (lightning, *others):
        read = read_state_dict(path)
        assert read.keys() == state.keys()
        assert torch.equal(read["model.diffusion_model.out.2.bias"], state["model.diffusion_model.out.2.bias"])
    assert read_checkpoint(lightning)["hyper_parameters"]["lr"] == 0.1
    with pytest.raises(UserError, match="weights only.*ckpt_path"):
        read_checkpoint(tmp_path / "bare.pt")


@pytest.mark.parametrize("read", [read_state_dict, read_checkpoint])
@pytest.mark.parametrize("kind", ["zip", "old", "pickle", "pickle 2"])
def test_legacy_code_in_a_checkpoint_is_refused(tmp_path, monkeypatch, kind, read):
    monkeypatch.chdir(tmp_path)
    content = {"state_dict": {"w": torch.zeros(2) if "pickle" not in kind else [0.0]}, "callbacks": Wipe()}
    path = tmp_path / "bad.ckpt"
    if "pickle" in kind:
        path.write_bytes(pickle.dumps(content, protocol=2 if kind.endswith("2") else 4))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(UserError, match=r"more than tensors.*(posix|nt)\.system.*refused"):
        read(path)
    assert os.listdir(tmp_path) == ["bad.ckpt"]


def test_legacy_a_class_by_itself_is_refused_too(tmp_path):
    torch.save({"state_dict": {"w": torch.zeros(1)}, "call": eval}, tmp_path / "bad.ckpt")
    with pytest.raises(UserError, match="builtins.eval.*refused"):
        read_state_dict(tmp_path / "bad.ckpt")


def test_legacy_checkpoints_load_with_a_word_on_what_differs(tmp_path, caplog):
    state = reference_state() | {"model.diffusion_model.extra.weight": torch.zeros(1)}
    del state["model.diffusion_model.time_embed.0.bias"]
    with caplog.at_level(logging.INFO):
        model = ldm(scale_by_std=True, ckpt_path=str(lightning_file(tmp_path / "last.ckpt", state)))
    assert model.scale_factor == pytest.approx(0.8) and model._has_scale
    assert "1 missing" in caplog.text and "1 unexpected" in caplog.text
    assert "time_embed.0.bias" in caplog.text and "extra.weight" in caplog.text
    assert not any(name in caplog.text for name in ("shift_coef", "ddim_coef", "noise schedule"))
    assert torch.equal(model.model_ema.diffusion_modelout2bias, state["model_ema.diffusion_modelout2bias"])


def test_legacy_wrong_shapes_are_named_and_counted(tmp_path):
    torch.save(reference_state(), tmp_path / "small.pt")
    unet = {**UNET, "params": {**TINY_UNET, "model_channels": 64}}
    with pytest.raises(UserError) as error:
        ldm(unet_config=unet, ckpt_path=str(tmp_path / "small.pt"))
    text = str(error.value)
    assert "expected (256, 64), got (128, 32)" in text and text.count("got (") == 4 and "more)" in text


def test_legacy_another_schedule_is_named_and_the_configs_stays(tmp_path, caplog):
    torch.save(reference_state(), tmp_path / "last.ckpt")
    with caplog.at_level(logging.WARNING):
        model = ldm(ckpt_path=str(tmp_path / "last.ckpt"), linear_end=0.05)
    assert "20 steps, betas 0.0001 to 0.02" in caplog.text and "0.0001 to 0.05" in caplog.text
    assert all(torch.equal(getattr(model, name), getattr(ldm(linear_end=0.05), name)) for name in model.schedule_names)
    caplog.clear()
    model = ldm(ckpt_path=str(tmp_path / "last.ckpt"), timesteps=10)
    assert "20 steps" in caplog.text and len(model.betas) == 10


def test_legacy_strict_loading_takes_the_schedule_of_any_family():
    state = reference_state(scale_by_std=False)
    assert not LDM_SCHEDULE - state.keys()
    ldm().load_state_dict(state, strict=True)
    ldm().load_state_dict(state | {"alphas_cumprod_next": torch.zeros(20), "shift_coef": torch.zeros(20)}, strict=True)
    with pytest.raises(RuntimeError, match="out.0.weight"):
        ldm().load_state_dict({k: v for k, v in state.items() if not k.endswith("model.out.0.weight")}, strict=True)


def test_legacy_ldm_weights_in_a_model_with_units_and_back(tmp_path, caplog):
    torch.save({"state_dict": reference_state()}, tmp_path / "ldm.ckpt")
    model = clip_disdiff(ckpt_path=str(tmp_path / "ldm.ckpt"))
    base = fill(ldm()).state_dict()
    for name in ("input_blocks.0.0.weight", "out.2.bias"):
        weight = model.model.diffusion_model.get_parameter(name)
        assert torch.equal(weight, base[f"model.diffusion_model.{name}"])
    assert "averages other weights" in caplog.text
    assert model.model_ema.num_updates == 0
    shift = model.model.diffusion_model.shift_out[0].weight
    assert torch.equal(model.model_ema.diffusion_modelshift_out0weight, shift)

    torch.save(model.state_dict(), tmp_path / "clip.ckpt")
    back = ldm(ckpt_path=str(tmp_path / "clip.ckpt"))
    weight = back.model.diffusion_model.out[2].bias
    assert torch.equal(weight, base["model.diffusion_model.out.2.bias"])
    assert torch.equal(back.model_ema.diffusion_modelout2bias, weight)


def test_legacy_first_stages_are_found_in_a_diffusion_checkpoint(tmp_path):
    state = reference_state()
    torch.save({"state_dict": state}, tmp_path / "ldm.ckpt")
    stage = VQModelInterface(**vq_config(ckpt_path=str(tmp_path / "ldm.ckpt"))["params"])
    assert torch.equal(stage.quant_conv.weight, state["first_stage_model.quant_conv.weight"])


def test_legacy_keys_of_a_latent_diffusion_model():
    model = ldm(scale_by_std=True, learn_logvar=True)
    keys = set(model.state_dict())
    network = {name for name, _ in model.model.diffusion_model.named_parameters()}
    expected = LDM_SCHEDULE | DISDIFF_SCHEDULE | {"scale_factor", "logvar", "model_ema.decay", "model_ema.num_updates"}
    expected |= {f"model.diffusion_model.{name}" for name in network}
    expected |= {f"model_ema.diffusion_model{name.replace('.', '')}" for name in network}
    expected |= {f"first_stage_model.{name}" for name in model.first_stage_model.state_dict()}
    assert keys == expected
    assert "scale_factor" not in ldm().state_dict() and "logvar" not in ldm().state_dict()
    state = model.state_dict()
    assert (state["model_ema.decay"].dtype, state["model_ema.num_updates"].dtype) == (torch.float32, torch.int32)


def test_legacy_keys_of_encdiff():
    torch.manual_seed(0)
    model = instantiate_from_config(MODELS["encdiff"])
    state = model.state_dict()
    top = {key for key in state if "." not in key}
    assert top == LDM_SCHEDULE | {"alphas_cumprod_next", "scale_factor"}
    assert torch.equal(state["alphas_cumprod_next"][:-1], state["alphas_cumprod"][1:])
    encoder = {key for key in state if key.startswith("cond_stage_model")}
    assert {"cond_stage_model.encoder.16.weight", "cond_stage_model.net.3.4.bias"} <= encoder
    model.load_state_dict(
        {k: v for k, v in state.items() if k != "alphas_cumprod_next"}
        | {"shift_coef": torch.zeros(1000), "ddim_coef": torch.zeros(1000)},
        strict=True,
    )


def test_legacy_keys_of_a_model_with_units():
    model = clip_disdiff(scale_by_std=True)
    trained = {name for name, value in model.model.diffusion_model.named_parameters() if value.requires_grad}
    assert {name.split(".")[0] for name in trained} == {
        "shift_middle_block",
        "shift_output_blocks",
        "shift_out",
        "repre_embed",
        "part_emb",
        "part_latents",
    }
    averaged = {key for key in model.state_dict() if key.startswith("model_ema.diffusion_model")}
    assert averaged == {f"model_ema.diffusion_model{name.replace('.', '')}" for name in trained}
