"""Stable Diffusion checkpoints of reduced width: loaded with nothing left over, sampled, trained on, continued."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stable_diffusion_layout as layout
import torch
from legacy_configs import LIGHTNING
from omegaconf import OmegaConf
from script_modules import load_script
from stable_diffusion_configs import STAGE_2, UNET_2, model
from torch.utils.data import Dataset

import main as front_door
from ldm.modules.encoders import clip_loading
from ldm.runs.load import load_run
from ldm.util import UserError, instantiate_from_config

WIDTH, DEPTH = 16, 3  # of the text towers
VISION = {"image_size": 16, "layers": 2, "width": 64, "patch_size": 8}
CLIP = {
    "embed_dim": WIDTH,
    "vision_cfg": VISION,
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": WIDTH, "heads": 2, "layers": DEPTH},
}
HUGGING_FACE = {"hidden_size": WIDTH, "num_attention_heads": 2, "num_hidden_layers": DEPTH, "intermediate_size": 64}
SMALL = {"image_size": 8, "ddconfig": {"ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1, "resolution": 16}}
UNET = {"model_channels": 32, "channel_mult": [1, 2], "attention_resolutions": [2, 1], "context_dim": WIDTH}
UNET = {**UNET, "num_res_blocks": 1, "num_heads": 4}
KL = layout.autoencoder(32, (1, 2), 1)
TEXTS = ("a red cube", "a photograph of a blue ball")


class Pictures(Dataset):
    """Four pictures with texts, as the data loaders of the family return them."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, Any]:
        picture = np.random.default_rng(index).uniform(-1, 1, (16, 16, 3)).astype(np.float32)
        return {"jpg": picture, "txt": TEXTS[index % 2]}


@pytest.fixture(autouse=True)
def no_weights(monkeypatch, tmp_path):
    """A machine without a CLIP: the weights come from the checkpoint alone."""
    monkeypatch.delenv(clip_loading.WEIGHTS_VARIABLE, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(clip_loading, "OPENAI_CACHE", str(tmp_path))


def small(
    stage: str, stage_params: dict[str, Any], unet: dict[str, Any] | None = None, **params: Any
) -> dict[str, Any]:
    return model(stage, stage_params, unet={**UNET, **(unet or {})}, **{**SMALL, **params})


def network(**options: Any) -> layout.Shapes:
    return layout.unet(32, (1, 2), (0, 1), WIDTH, num_blocks=1, **options)


def save(
    path: Path, shapes: layout.Shapes, config: dict[str, Any], dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """Write a checkpoint as published: constants of the schedule, and leftover counters of the average."""
    state = layout.random_weights(shapes)
    state |= {
        key: value for key, value in instantiate_from_config(config).state_dict().items() if key in layout.LDM_SCHEDULE
    }
    counters = {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(470000)}
    state = {key: value.to(dtype) if value.is_floating_point() else value for key, value in state.items()}
    torch.save({"global_step": 470000, "state_dict": counters | state}, path)
    return state


def write_clip(folder: Path, kind: str) -> str:
    """A folder that describes a text tower without its weights."""
    content = {"text_config": HUGGING_FACE} if kind == "config.json" else {"model_cfg": CLIP}
    folder.mkdir()
    (folder / kind).write_text(json.dumps(content))
    return str(folder)


def case(kind: str, folder: Path) -> tuple[dict[str, Any], layout.Shapes]:
    """Config and layout of a small model."""
    if kind == "version 1":
        config = small("FrozenCLIPEmbedder", {"version": write_clip(folder / "clip", "config.json")})
        return config, layout.checkpoint(network(), KL, layout.clip_of_transformers(WIDTH, DEPTH))
    params = {"arch": write_clip(folder / "clip", "open_clip_config.json")}
    if kind == "version 2":
        unet = {**UNET_2, "num_head_channels": 16, "context_dim": WIDTH}
        config = small("FrozenOpenCLIPEmbedder", {**STAGE_2, **params}, unet=unet, parameterization="v")
        return config, layout.checkpoint(network(is_linear=True), KL, layout.clip_of_open_clip(WIDTH, DEPTH))
    config = small("FrozenCLIPImageEmbedder", {"model": params["arch"]}, cond_stage_key="jpg", use_ema=True)
    stage = layout.clip_of_open_clip(WIDTH, 0) | layout.clip_images(64, 2, WIDTH, 8, 16)
    return config, layout.checkpoint(network(), KL, stage, has_average=True)


def run(folder: Path, config: dict[str, Any], words: str) -> dict[str, torch.Tensor]:
    """Train by ``main.py`` with the logger of images; return the weights of the last checkpoint."""
    source = {"target": f"{__name__}.Pictures"}
    sections = {"batch_size": 2, "num_workers": 0, "train": source, "validation": source}
    data = {"target": "main.DataModuleFromConfig", "params": sections}
    images = {"batch_frequency": 1, "max_images": 2, "log_images_kwargs": {"ddim_steps": 2}}
    callbacks = {"image_logger": {"target": "main.ImageLogger", "params": images}}
    content = {"model": config, "data": data, "lightning": {**LIGHTNING, "callbacks": callbacks}}
    OmegaConf.save(OmegaConf.create(content), folder / "sd.yaml")
    assert front_door.main(words.split()) == 0
    (saved,) = folder.glob("logs/*/checkpoints/last.ckpt")
    return torch.load(saved, weights_only=True)["state_dict"]


_SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("version 1", "image variations")]


@pytest.mark.parametrize("kind", ["version 2", *_SLOW])
def test_legacy_stable_diffusion_from_checkpoint_to_continued_run(kind, tmp_path, caplog):
    config, shapes = case(kind, tmp_path)
    state = save(tmp_path / "sd.ckpt", shapes, config)
    config["params"]["ckpt_path"] = str(tmp_path / "sd.ckpt")

    with caplog.at_level("INFO"):
        built = instantiate_from_config(config)
    assert " 0 missing, 0 unexpected" in caplog.text and "ignored" not in caplog.text
    own = built.state_dict()
    assert all(torch.equal(own[key], value) for key, value in state.items() if not key.startswith("model_ema."))
    batch = {key: [Pictures()[index][key] for index in range(2)] for key in ("jpg", "txt")}
    batch["jpg"] = torch.tensor(np.stack(batch["jpg"]))
    tokens = built.get_condition(batch).value
    assert tokens.shape == (2, 1 if kind == "image variations" else 77, WIDTH)
    assert not torch.allclose(tokens[0], tokens[1])

    flags = f"-b {tmp_path}/sd.yaml -t --gpus 0, -s 0 -n run -l {tmp_path}/logs --max_steps 2 --no-test"
    trained = run(tmp_path, config, flags)
    assert sorted(trained) == sorted(own)
    changed = {key for key, value in state.items() if not torch.equal(trained[key], value)}
    assert changed and all(key.startswith(("model.", "model_ema.")) for key in changed)
    assert list(tmp_path.glob("logs/*/images/train/*.png"))
    (folder,) = (tmp_path / "logs").iterdir()
    continued = run(tmp_path, config, f"-r {folder} -t --gpus 0, --max_steps 3 --no-test")
    assert not torch.equal(
        continued["model.diffusion_model.out.2.weight"], trained["model.diffusion_model.out.2.weight"]
    )

    sample = ["-r", str(folder), "-n", "2", "-c", "3", "--sampler", "plms", "--batch_size", "2"]
    if kind != "image variations":
        sample += ["--text", TEXTS[0], "--text", TEXTS[1], "--guidance_scale", "3"]
    assert load_script("sample_diffusion").main(sample) == 0
    assert list(folder.glob("samples/last/*/*.png"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_legacy_stable_diffusion_samples_from_a_file_and_its_config(dtype, tmp_path, caplog):
    """As with ``scripts/txt2img.py``: a downloaded file, pruned or not, and an inference config."""
    config, shapes = case("version 1", tmp_path)
    if dtype != torch.float32:  # files of newer transformers lack the constant
        del shapes["cond_stage_model.transformer.text_model.embeddings.position_ids"]
    save(tmp_path / "sd.ckpt", shapes, config, dtype)
    OmegaConf.save(OmegaConf.create({"model": config}), tmp_path / "v1-inference.yaml")
    words = f"-r {tmp_path}/sd.ckpt -b {tmp_path}/v1-inference.yaml -n 2 -c 3 --sampler plms --guidance_scale 5"
    words = [*words.split(), "-l", str(tmp_path / "out"), "--text", TEXTS[0], "--text", TEXTS[1]]
    assert load_script("sample_diffusion").main(words) == 0
    assert list(tmp_path.glob("out/samples/*/*/*.png")) and "noise schedule" not in caplog.text
    loaded = load_run(str(tmp_path / "sd.ckpt"), [str(tmp_path / "v1-inference.yaml")]).model
    assert torch.equal(loaded.alphas_cumprod, instantiate_from_config(config).alphas_cumprod)


def test_legacy_dropped_weights_are_named(tmp_path, caplog):
    """Another condition stage than that of the checkpoint: its weights are counted by group."""
    config, shapes = case("version 1", tmp_path)
    save(tmp_path / "sd.ckpt", shapes, config)
    config["params"]["ckpt_path"] = str(tmp_path / "sd.ckpt")
    config["params"]["cond_stage_config"] = {
        "target": "ldm.modules.encoders.modules.BERTEmbedder",
        "params": {"n_embed": WIDTH, "n_layer": 1},
    }
    instantiate_from_config(config)
    assert "53 keys of cond_stage_model.transformer.* were not used" in caplog.text
    assert re.search(r"\d+ keys of cond_stage_model.transformer.\* are missing in the file", caplog.text)


def test_legacy_width_of_tokens_is_compared(tmp_path):
    config, _ = case("version 1", tmp_path)
    built = instantiate_from_config(config)
    with pytest.raises(UserError, match=f"tokens of width {WIDTH} .*context_dim.*, got tokens of width 32"):
        built.apply_model(torch.zeros(1, 4, 8, 8), torch.tensor([3]), torch.zeros(1, 77, 32))


def test_legacy_missing_clip_is_reported_before_training(tmp_path, capsys):
    config, _ = case("version 1", tmp_path)
    with pytest.raises(AssertionError):
        run(tmp_path, config, f"-b {tmp_path}/sd.yaml -t --gpus 0, -n run -l {tmp_path}/logs --max_steps 2")
    assert "FrozenCLIPEmbedder" in (message := capsys.readouterr().err) and "ckpt_path" in message
    assert not (tmp_path / "logs").exists()


def test_legacy_a_checkpoint_without_the_text_tower_asks_for_the_files_of_its_clip(tmp_path, capsys):
    config, shapes = case("version 1", tmp_path)
    shapes = {name: shape for name, shape in shapes.items() if not name.startswith("cond_stage_model.")}
    save(tmp_path / "sd.ckpt", shapes, config)
    OmegaConf.save(OmegaConf.create({"model": config}), tmp_path / "v1-inference.yaml")
    words = f"-r {tmp_path}/sd.ckpt -b {tmp_path}/v1-inference.yaml -n 1 -c 2 --text cube -l {tmp_path}/out"
    assert load_script("sample_diffusion").main(words.split()) == 1
    assert "FrozenCLIPEmbedder: " in (error := capsys.readouterr().err) and "another model" not in error


@pytest.mark.parametrize("position_ids", [True, False])
def test_legacy_position_ids_may_be_missing(position_ids, tmp_path, caplog):
    config, shapes = case("version 1", tmp_path)
    name = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    if not position_ids:
        del shapes[name]
    save(tmp_path / "sd.ckpt", shapes, config)
    config["params"]["ckpt_path"] = str(tmp_path / "sd.ckpt")
    with caplog.at_level("INFO"):
        built = instantiate_from_config(config)
    assert " 0 missing, 0 unexpected" in caplog.text
    assert torch.equal(built.state_dict()[name], torch.arange(77)[None])


STAGES = {
    "ClassEmbedder": {"embed_dim": 16, "n_classes": 3},
    "BERTEmbedder": {"n_embed": 16, "n_layer": 1},
    "FrozenCLIPEmbedder": {},
    "FrozenOpenCLIPEmbedder": {"layer": "penultimate"},
}
WIDTHS = dict(zip(STAGES, (16, 16, 768, 1024)))


@pytest.mark.parametrize("stage", STAGES)
def test_legacy_stages_are_checked_without_building_them(stage, tmp_path, capsys, caplog):
    def check(params, **options):
        config = {"model": model(stage, {**STAGES[stage], **params}, **options)}
        OmegaConf.save(OmegaConf.create(config), tmp_path / "c.yaml")
        return front_door.main(["-b", str(tmp_path / "c.yaml")]), capsys.readouterr().err

    assert check({}, unet={"context_dim": WIDTHS[stage]}) == (0, "")
    code, error = check({}, unet={"context_dim": 48})
    assert f"unet_config.params.context_dim: expected {WIDTHS[stage]}, the width of cond_stage" in error + caplog.text
    assert code == (stage in ("ClassEmbedder", "BERTEmbedder"))  # the files of a CLIP may be missing
    if stage.startswith("Frozen"):
        code, error = check({"layer": "penultimat"}, unet={"context_dim": WIDTHS[stage]})
        assert code == 1 and "cond_stage_config.params.layer: expected last, penultimate" in error
        other = {"version": "some/other"} if stage == "FrozenCLIPEmbedder" else {"arch": "some-other"}
        assert check(other, unet={"context_dim": 48}) == (0, "")  # not known before it is built
