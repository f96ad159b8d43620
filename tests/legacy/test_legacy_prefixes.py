"""Checkpoints whose keys carry the prefixes of wrappers, and messages about keys that do not fit."""

from __future__ import annotations

import logging

import pytest
import torch
from omegaconf import OmegaConf
from stand_ins import TINY_UNET, vq_config

from ldm.data.world import world_vocabulary
from ldm.models.autoencoder import VQModelInterface
from ldm.models.checkpoints import load_into
from ldm.models.clip import AttributeCLIP
from ldm.models.diffusion.ddpm import DDPM, LatentDiffusion
from ldm.models.judge import AttributeJudge, load_judge
from ldm.modules.diffusionmodules.openaimodel_shift import UNetModel as ShiftUNet
from ldm.modules.encoders.clip_loading import find_clip, load_clip
from ldm.modules.weights import grouped, read_state_dict, without_wrappers
from ldm.runs.load import load_run
from ldm.util import UserError

UNET = {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": TINY_UNET}
COMMON = {"image_size": 8, "channels": 4, "timesteps": 20, "monitor": None, "unet_config": UNET}
LATENT = {"first_stage_config": vq_config(), "cond_stage_config": "__is_unconditional__"}
VQ = vq_config()["params"]


def latent(seed=0, **params):
    torch.manual_seed(seed)
    return LatentDiffusion(**{**COMMON, **LATENT, **params})


def compiled(state):
    """Return the keys of a model whose network was compiled before its average was made."""
    renamed = {key.replace("model.diffusion_model.", "model._orig_mod.diffusion_model."): v for key, v in state.items()}
    return {key.replace("model_ema.diffusion", "model_ema._orig_moddiffusion"): v for key, v in renamed.items()}


def put(prefix):
    return lambda state: {prefix + key: value for key, value in state.items()}


WRAPPED = {
    "compiled": (compiled, "_orig_mod"),
    "network compiled": (
        lambda state: {k.replace("diffusion_model.", "diffusion_model._orig_mod."): v for k, v in state.items()},
        "_orig_mod.",
    ),
    "whole model compiled": (put("_orig_mod."), "_orig_mod."),
    "ddp": (put("module."), "module."),
    "ddp inside": (lambda s: {k.replace("model.diff", "model.module.diff"): v for k, v in s.items()}, "module."),
    "model": (put("model."), "model."),
    "two": (put("module.model."), "module.model."),
    "ddp of compiled": (lambda state: put("module._orig_mod.")(compiled(state)), "_orig_mod"),
    "state_dict": (put("state_dict."), "state_dict."),
    "generator": (put("generator."), "generator."),
}


@pytest.mark.parametrize("name", WRAPPED)
@pytest.mark.parametrize(
    "as_file", [lambda s: {"state_dict": s}, lambda s: s, lambda s: {"model_state_dict": s, "n": 1}]
)
def test_prefixes_of_a_diffusion_model_are_removed_with_one_line(tmp_path, caplog, name, as_file):
    wrap, prefix = WRAPPED[name]
    source = latent(1, scale_by_std=True)
    source.model_ema.diffusion_modelout2bias += 1
    source.scale_factor.fill_(0.5)
    path = tmp_path / "wrapped.ckpt"
    torch.save(as_file(wrap(source.state_dict())), path)
    with caplog.at_level(logging.INFO):
        model = latent(2, ckpt_path=str(path), scale_by_std=True)
    wanted = source.state_dict()
    assert all(torch.equal(value, wanted[key]) for key, value in model.state_dict().items())
    lines = [record.getMessage() for record in caplog.records if "removed" in record.getMessage()]
    assert len(lines) == 1 and prefix in lines[0] and f"of {len(wanted)} keys" in lines[0]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_true_prefixes_stay(tmp_path, caplog):
    source = latent(1)
    torch.save(source.state_dict(), tmp_path / "plain.ckpt")
    with caplog.at_level(logging.INFO):
        model = latent(2, ckpt_path=str(tmp_path / "plain.ckpt"))
    assert torch.equal(model.model.diffusion_model.out[2].bias, source.model.diffusion_model.out[2].bias)
    assert "removed" not in caplog.text
    own = {"model.module.weight": torch.zeros(2), "net.weight": torch.zeros(2)}
    assert without_wrappers(own, own, "a.ckpt") == own  # a module of the user's that is called `module`
    assert without_wrappers(own, (), "a.ckpt") == own


@pytest.mark.parametrize("prefix", ["", "model.", "module.model.", "_orig_mod.model.", "model._orig_mod."])
def test_the_network_alone(tmp_path, prefix):
    source = latent(1, use_ema=False)
    torch.save(put(prefix)(source.model.state_dict()), tmp_path / "net.pt")
    model = latent(2, ckpt_path=str(tmp_path / "net.pt"), load_only_unet=True)
    assert all(torch.equal(v, model.model.state_dict()[k]) for k, v in source.model.state_dict().items())


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "_orig_mod.", "module.first_stage_model."])
def test_first_stages(tmp_path, prefix):
    source = VQModelInterface(**VQ)
    torch.save({"state_dict": put(prefix)(source.state_dict())}, tmp_path / "vq.ckpt")
    model = latent(2, first_stage_config=vq_config(ckpt_path=str(tmp_path / "vq.ckpt")))
    assert torch.equal(model.first_stage_model.encoder.conv_in.weight, source.encoder.conv_in.weight)


@pytest.mark.parametrize("use_ema", [True, False])
def test_the_frozen_network_of_a_shift_unet(tmp_path, use_ema):
    source = latent(1, scale_by_std=True)
    source.model_ema.diffusion_modelout2bias += 1
    source.scale_factor.fill_(0.5)
    torch.save(put("module.")(compiled(source.state_dict())), tmp_path / "ldm.ckpt")
    options = {"latent_unit": 3, "repre_emb_channels": 4, "ckpt_path": str(tmp_path / "ldm.ckpt")}
    network = ShiftUNet(**TINY_UNET, **options, load_ema_ckpt=use_ema)
    assert torch.equal(network.out[2].bias, source.model.diffusion_model.out[2].bias + use_ema)
    assert network.scale_factor == 0.5


def test_runs_are_loaded(tmp_path):
    config = {"model": {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": {**COMMON, **LATENT}}}
    source = latent(1)
    torch.save({"state_dict": put("module.")(compiled(source.state_dict()))}, tmp_path / "model.ckpt")
    OmegaConf.save(config, tmp_path / "config.yaml")
    state = load_run(str(tmp_path)).model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in source.state_dict().items())
    vq = {"target": "ldm.models.autoencoder.VQModelInterface", "params": VQ}
    OmegaConf.save({"model": vq}, tmp_path / "config.yaml")
    source = VQModelInterface(**VQ)
    torch.save({"state_dict": put("_orig_mod.")(source.state_dict())}, tmp_path / "model.ckpt")
    state = load_run(str(tmp_path)).model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in source.state_dict().items())


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model."])
def test_judges_and_clips(tmp_path, prefix):
    judge = AttributeJudge(space="shapes3d", image_size=16, channels=4, hidden=8)
    state = {"state_dict": put(prefix)(judge.state_dict()), "hyper_parameters": dict(judge.hparams)}
    torch.save(state, tmp_path / "judge.ckpt")
    found = load_judge(tmp_path / "judge.ckpt").state_dict()
    assert all(torch.equal(value, found[key]) for key, value in judge.state_dict().items())
    vision = {"image_size": 32, "patch_size": 16, "width": 16, "layers": 1, "head_width": 8}
    source = AttributeCLIP(
        embed_dim=8,
        vision_cfg=vision,
        text_cfg={"width": 16, "heads": 2, "layers": 1},
        vocabulary=world_vocabulary().to_dict(),
    )
    source.save_folder(tmp_path / "clip")
    (tmp_path / "clip" / "open_clip_model.safetensors").unlink()
    torch.save({"state_dict": put(prefix)(source.clip.state_dict())}, tmp_path / "clip" / "open_clip_pytorch_model.bin")
    found = load_clip(find_clip(str(tmp_path / "clip"))).state_dict()
    assert all(torch.equal(value, found[key]) for key, value in source.clip.state_dict().items())


def test_entries_of_a_file_are_chosen_and_named(tmp_path, caplog):
    trained, average = ({"w": torch.full((2,), number)} for number in (1.0, 2.0))
    torch.save({"ema": average, "model": trained, "opt": {}}, tmp_path / "both.pt")
    torch.save({"ema": average, "steps": 3}, tmp_path / "average.pt")
    with caplog.at_level(logging.INFO):
        assert read_state_dict(tmp_path / "both.pt")["w"][0] == 1
        assert read_state_dict(tmp_path / "average.pt")["w"][0] == 2
    assert "entry 'model'" in caplog.text and "entry 'ema'" in caplog.text


FOREIGN = {"resnet.fc.weight": torch.zeros(3), "decay": torch.zeros(())}


@pytest.mark.parametrize(
    ("build", "own"),
    [
        (latent, "betas|model.diffusion_model.time_embed.0.weight"),
        (lambda **options: latent(load_only_unet=True, **options), "diffusion_model.time_embed.0.weight"),
        (lambda **options: DDPM(**COMMON, **options), "model.diffusion_model.time_embed.0.weight"),
        (lambda **options: VQModelInterface(**VQ, **options), "encoder.conv_in.weight"),
        (lambda **options: latent(first_stage_config=vq_config(**options)), "encoder.conv_in.weight"),
    ],
    ids=["latent", "only unet", "pixels", "autoencoder", "first stage"],
)
def test_weights_none_of_which_fit_are_an_error_with_keys_of_both_sides(tmp_path, build, own):
    torch.save({"state_dict": {**FOREIGN, "model_ema.decay": torch.tensor(0.5)}}, tmp_path / "other.ckpt")
    with pytest.raises(UserError, match=rf"other.ckpt: expected weights of \w+ \(such as .*({own}).*resnet.fc.weight"):
        build(ckpt_path=str(tmp_path / "other.ckpt"))


def test_ignore_keys_that_leave_nothing_are_an_error(tmp_path):
    torch.save(VQModelInterface(**VQ).state_dict(), tmp_path / "vq.ckpt")
    everything = ["encoder", "decoder", "quant", "post_quant"]
    with pytest.raises(UserError, match="excluded by ignore_keys"):
        VQModelInterface(**VQ, ckpt_path=str(tmp_path / "vq.ckpt"), ignore_keys=everything)


def test_excluded_keys_are_not_reported_as_missing_in_the_file(tmp_path, caplog):
    torch.save(VQModelInterface(**VQ).state_dict(), tmp_path / "vq.ckpt")
    VQModelInterface(**VQ, ckpt_path=str(tmp_path / "vq.ckpt"), ignore_keys=["quantize"])
    assert "missing in the file" not in caplog.text


def test_dropped_keys_are_grouped_and_counted(tmp_path, caplog):
    texts = {f"cond_stage_model.transformer.text_model.layers.{i}.weight": torch.zeros(2) for i in range(37)}
    torch.save(latent(1).state_dict() | texts | {"extra.scale": torch.zeros(2)}, tmp_path / "sd.ckpt")
    latent(2, ckpt_path=str(tmp_path / "sd.ckpt"))
    assert "37 keys of cond_stage_model.transformer.*, extra.scale were not used" in caplog.text
    assert "FIT" not in caplog.text


def test_few_fitting_weights_are_a_loud_warning(tmp_path, caplog):
    state = {key: value for key, value in VQModelInterface(**VQ).state_dict().items() if key.startswith("encoder.mid")}
    torch.save(state, tmp_path / "part.ckpt")
    load_into(VQModelInterface(**VQ), tmp_path / "part.ckpt")
    own = [key for key, value in VQModelInterface(**VQ).state_dict().items() if value.ndim]
    assert f"ONLY {len(state)} OF {len(own)} WEIGHTS FIT" in caplog.text
    assert "keys of decoder.mid.*" in caplog.text and "are missing in the file" in caplog.text


def test_groups():
    keys = [
        "betas",
        *(f"a.b.{i}.w" for i in range(3)),
        *(f"ema.name{i}" for i in range(2)),
        *(f"g{i}.w" for i in range(9)),
    ]
    assert grouped(keys) == "3 keys of a.b.*, 2 keys of ema.*, betas, g0.w, g1.w, g2.w, g3.w, g4.w, 4 other keys"
