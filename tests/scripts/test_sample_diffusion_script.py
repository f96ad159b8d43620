"""``scripts/sample_diffusion.py``: latent-diffusion's flags, samplers, files and errors."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from golden_recipe import fill
from script_modules import load_script
from stand_ins import TINY_UNET, vq_config

from ldm.util import instantiate_from_config

# As latent-diffusion and DisDiff write it.
MODEL = {
    "base_learning_rate": 2e-6,
    "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
    "params": {
        "linear_start": 0.0015,
        "linear_end": 0.0155,
        "num_timesteps_cond": 1,
        "timesteps": 20,
        "first_stage_key": "image",
        "cond_stage_key": "image",
        "cond_stage_trainable": False,
        "concat_mode": False,
        "scale_by_std": True,
        "image_size": 8,
        "channels": 4,
        "cond_stage_config": "__is_unconditional__",
        "first_stage_config": vq_config(ckpt_path="/my/checkpoint/path", monitor="val/rec_loss"),
        "unet_config": {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": TINY_UNET},
    },
}


@pytest.fixture
def script():
    return load_script("sample_diffusion")


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint file with the weights of the golden figures, and its config."""
    config = json.loads(json.dumps(MODEL))
    config["params"]["first_stage_config"]["params"]["ckpt_path"] = None
    model = instantiate_from_config({"target": config["target"], "params": config["params"]})
    fill(model.model.diffusion_model)
    fill(model.first_stage_model)
    model.model_ema.restart(model.model)
    (tmp_path / "zoo").mkdir()
    torch.save({"global_step": 3, "state_dict": model.state_dict()}, tmp_path / "zoo" / "model.ckpt")
    (tmp_path / "ldm.yaml").write_text(yaml.safe_dump({"model": MODEL}))
    return tmp_path / "zoo" / "model.ckpt"


def test_start_up_imports_no_packages_of_scores_or_clip():
    code = (
        "import sys; sys.path.insert(0, 'scripts'); import sample_diffusion; "
        "print(*{'dask', 'distributed', 'numba', 'open_clip', 'pandas', 'sklearn', 'IPython'} & set(sys.modules))"
    )
    root = Path(__file__).parents[2]
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout
        == "\n"
    )


def test_the_flags_of_latent_diffusion(script, checkpoint, tmp_path, capsys):
    words = ["-r", str(checkpoint), "--base", str(tmp_path / "ldm.yaml"), "-n", "5", "-e", "0.0", "-c", "2"]
    words += ["--batch_size", "2", "-l", str(tmp_path / "out"), "model.params.loss_type=l1"]
    assert script.main(words) == 0
    paths = [Path(line) for line in capsys.readouterr().out.splitlines() if line.startswith(str(tmp_path))]
    assert [path.name for path in paths] == ["5x32x32x3-samples.npz", "samples.png", "sampling.json"]
    assert paths[0].parents[2] == tmp_path / "out" / "samples"
    pixels = np.load(paths[0])["arr_0"]
    assert pixels.shape == (5, 32, 32, 3) and pixels.std() > 1
    record = json.loads(paths[2].read_text())
    assert record["checkpoint"] == str(checkpoint) and record["num_steps"] == 2 and record["eta"] == 0.0
    assert record["sampler"] == "ddim" and record["count"] == 5
    assert record["overrides"] == ["model.params.loss_type=l1"]


def test_vanilla(script, checkpoint, tmp_path):
    words = ["-r", str(checkpoint), "-b", str(tmp_path / "ldm.yaml"), "-n", "1", "-v"]
    assert script.main(words) == 0
    record = json.loads(next(checkpoint.parent.glob("samples/model/*/sampling.json")).read_text())
    assert record["num_steps"] is None and record["sampler"] == "ddpm"  # without -l beside the checkpoint


def test_samplers_by_name(script, checkpoint, tmp_path, capsys):
    words = ["-r", str(checkpoint), "-b", str(tmp_path / "ldm.yaml"), "-n", "1", "-l", str(tmp_path / "out")]
    for name in ("plms", "dpm_solver"):
        assert script.main([*words, "--sampler", name, "-c", "3", "-l", str(tmp_path / name)]) == 0
        record = json.loads(next((tmp_path / name).glob("samples/model/*/sampling.json")).read_text())
        assert record["sampler"] == name and record["num_steps"] == 3
    for options, message in (
        (["--sampler", "plsm"], "Did you mean 'plms'"),
        (["--sampler", "plms", "-e", "1.0"], "unexpected option 'eta'"),
        (["-c", "3", "-e", "4.0"], "expected eta of at most"),
        (["-c", "3", "-e", "-1.0"], "expected eta of at least 0"),
    ):
        assert script.main([*words, *options]) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_errors_are_one_message_and_nothing_is_written(script, checkpoint, tmp_path, capsys):
    base = ["-r", str(checkpoint), "-b", str(tmp_path / "ldm.yaml")]
    for words, message in (
        (["-r", str(tmp_path / "nothing")], "does not exist"),
        (["-r", str(checkpoint)], "--base"),
        ([*base, "--swap"], "--swap: LatentDiffusion samples from noise"),
        ([*base, "-c", "21"], "between 2 and 20"),
        ([*base, "model.params.timestep=3"], "Did you mean 'timesteps'"),
    ):
        assert script.main(words) == 1
        assert message in capsys.readouterr().err
    assert not (checkpoint.parent / "samples").exists()


def test_the_sampler_of_the_config_is_the_default(script, checkpoint, tmp_path):
    base = ["-r", str(checkpoint), "--base", str(tmp_path / "ldm.yaml"), "-n", "2", "--device", "cpu", "-l"]
    target = "model.params.sampler={target: ldm.diffusion.samplers.PLMSSampler, params: {num_steps: 3}}"
    for words, expected in (([], ("plms", 3)), (["-c", "4"], ("ddim", 4))):
        logdir = tmp_path / str(expected[1])
        assert script.main([*base, str(logdir), *words, target]) == 0
        record = json.loads(next(logdir.rglob("sampling.json")).read_text())
        assert (record["sampler"], record["num_steps"]) == expected
