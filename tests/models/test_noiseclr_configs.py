"""The configs of NoiseCLR on models of this package: a step of training on a run of each, and the check without one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from clip_guided_models import SEED_OPTIONS, SIZE, TARGET, towers_of, unet
from legacy_configs import save_clip
from PIL import Image
from stand_ins import vq_config
from test_encdiff import ENCODER, UNET

import main as front_door
from ldm.models.diffusion.methods.noiseclr.directions import DirectionSet
from ldm.util import instantiate_from_config

ROOT = Path(__file__).parents[2]
ENCDIFF = {"unet_config": UNET, "cond_stage_config": ENCODER, "first_stage_config": vq_config(), "monitor": None}
ENCDIFF = {**ENCDIFF, "image_size": 8, "channels": 4, "timesteps": 20}
MODELS = {
    "clip_guided": {"target": TARGET, "params": {**SEED_OPTIONS, "unet_config": unet()}},
    "encdiff": {"target": "ldm.models.diffusion.methods.encdiff.model.EncDiff", "params": ENCDIFF},
}
EXPECTED = {"clip_guided": ("token", SIZE), "encdiff": ("condition", 32)}


@pytest.fixture(params=MODELS)
def name(request, tmp_path, monkeypatch):
    """A config; its model and images are in the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "zoo").mkdir()
    (tmp_path / "images").mkdir()
    config = MODELS[request.param]
    if request.param == "clip_guided":
        towers = towers_of(save_clip(tmp_path / "clip"))
        config = {**config, "params": {**config["params"], "cond_stage_config": towers}}
    torch.manual_seed(0)
    torch.save({"state_dict": instantiate_from_config(config).state_dict(), "global_step": 1}, "zoo/model.ckpt")
    (tmp_path / "zoo" / "config.yaml").write_text(yaml.safe_dump({"model": config}))
    pixels = np.random.default_rng(0).integers(0, 256, (4, 20, 24, 3), dtype=np.uint8)
    for k, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "images" / f"{k}.png")
    return request.param


def test_a_config_of_directions_trains_on_a_run(name):
    kind, size = EXPECTED[name]
    params, train = "model.params", "data.params.train.params"
    words = [f"{params}.denoiser_config.params.run=zoo", f"{params}.num_directions=5"]
    words += [f"{params}.directions_per_iteration=2", f"{train}.path=images", f"{train}.image_size={size}"]
    words += ["data.params.batch_size=2", "data.params.num_workers=0", "lightning.trainer.max_steps=2"]
    base = ["--base", str(ROOT / "configs" / "directions" / f"{name}.yaml"), "--accelerator", "cpu", "-n", "x"]
    assert front_door.main([*base, *words, "-t"]) == 0
    (run,) = Path("logs").iterdir()
    directions = DirectionSet.load(run)
    assert (len(directions), directions.kind) == (5, kind) and directions.values.isfinite().all()
    assert (run / "learned_embeds.bin").is_file() == (kind == "token")


def test_a_config_of_directions_is_checked_without_a_run(name, capsys):
    words = ["--base", str(ROOT / "configs" / "directions" / f"{name}.yaml"), "data.params.train.params.path=images"]
    assert front_door.main(words) == 0
    shown = capsys.readouterr().out
    assert "missing: " in shown and "no finished run" in shown
    assert len(Path(words[1]).read_text().splitlines()) <= 15
