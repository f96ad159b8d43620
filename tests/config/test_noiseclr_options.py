"""Options of NoiseCLR: the check of a config and training refuse the same values, with the same message."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import main as front_door
from ldm.config.loading import load_config
from ldm.config.validation import validate
from ldm.models.diffusion.methods.noiseclr.options import ContrastOptions
from ldm.util import UserError

ROOT = Path(__file__).parents[2]
PARAMS, METHOD = "model.params", "ldm.models.diffusion.methods.noiseclr"


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A config whose denoiser is an empty folder, so that training ends where the denoiser is loaded."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    denoiser = {"target": f"{METHOD}.denoiser.RunDenoiser", "params": {"run": "run"}}
    params = {"denoiser_config": denoiser, "num_directions": 6, "directions_per_iteration": 2}
    world = {"target": "ldm.data.world.World3D", "params": {"size": 32, "limit": 16}}
    content = {
        "model": {"base_learning_rate": 0.1, "target": f"{METHOD}.model.NoiseCLR", "params": params},
        "data": {"target": "ldm.data.module.DataModuleFromConfig", "params": {"batch_size": 2, "train": world}},
        "lightning": {"trainer": {"accelerator": "cpu", "max_steps": 1}},
    }
    (tmp_path / "noiseclr.yaml").write_text(yaml.safe_dump(content))
    return str(tmp_path / "noiseclr.yaml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("directions_per_iteration=6", "directions_per_iteration: expected 1 to 5 (num_directions - 1), got 6"),
        ("directions_per_iteration=0", "directions_per_iteration: expected an integer from 1 to 1000000, got 0"),
        ("num_directions=2", "directions_per_iteration: expected 1 to 1 (num_directions - 1), got 2"),
        ("num_directions=1", "num_directions: expected an integer of at least 2, got 1"),
        ("temperature=0", "temperature: expected a number above 0, got 0"),
        ("temperature=-0.5", "temperature: expected a number above 0, got -0.5"),
        ("temperature=.nan", "temperature: expected a number above 0, got nan"),
        ("temperature=.inf", "temperature: expected a positive number, got inf"),
        ("min_timestep=-1", "min_timestep: expected an integer from 0 to 1000000, got -1"),
        ("max_timestep=0", "min_timestep, max_timestep: expected 0 <= min < max, got [0, 0]"),
        ("weight_decay=-1", "weight_decay: expected a number from 0 to 1000000, got -1"),
        ("betas=[0.9]", "betas: expected two numbers from 0 to below 1, got [0.9]"),
        ("betas=[0.9, 1]", "betas: expected a list, each entry a number of at least 0 and below 1, got [0.9, 1]"),
        ("betas=[a, b]", "betas: expected a list, each entry a number of at least 0 and below 1, got ['a', 'b']"),
        ("eps=0", "eps: expected a number above 0, got 0"),
        ("num_directions=many", "num_directions: expected an integer from 1 to 1000000, got 'many'"),
        ("denoiser_config.params.row_space=tokens", "row_space: expected auto, token, condition, got 'tokens'"),
        ("denoiser_config.params.run=null", "run: expected a text, got None"),
    ],
)
def test_values_are_refused_by_the_check_and_by_training(config, capsys, override, message):
    found = []
    for words in ([], ["-t"]):
        assert front_door.main(["--base", config, f"{PARAMS}.{override}", *words]) == 1
        found.append(capsys.readouterr().err)
    assert f"{PARAMS}.{override.partition('=')[0].rpartition('.')[0]}".rstrip(".") in found[0] and message in found[0]
    assert found[0] == found[1]


def test_errors_name_the_source_of_the_value(config, capsys):
    assert front_door.main(["--base", config, f"{PARAMS}.directions_per_iteration=9"]) == 1
    assert f"command line: {PARAMS}.directions_per_iteration" in capsys.readouterr().err
    assert front_door.main(["--base", config, f"{PARAMS}.num_directions=2"]) == 1  # the value of the file is too large
    assert f"noiseclr.yaml: {PARAMS}.directions_per_iteration" in capsys.readouterr().err


def test_time_steps_out_of_order_are_refused(config, capsys):
    for words in ([], ["-t"]):
        both = [f"{PARAMS}.min_timestep=30", f"{PARAMS}.max_timestep=20"]
        assert front_door.main(["--base", config, *both, *words]) == 1
        assert f"{PARAMS}.min_timestep, max_timestep: expected 0 <= min < max, got [30, 20]" in capsys.readouterr().err


def test_a_run_that_does_not_exist_is_reported_before_training(config, tmp_path):
    loaded = load_config([config], [f"{PARAMS}.denoiser_config.params.run=missing"])
    validate(loaded, check_files=False)
    with pytest.raises(UserError, match=r"denoiser_config.params.run: the run missing does not exist. \./ contains: "):
        validate(loaded)
    validate(load_config([config]))
    text = "from torch.utils.data import Dataset\nclass Data(Dataset):\n    def __init__(self, run, size, limit): ...\n"
    (tmp_path / "own.py").write_text(text)
    validate(load_config([config], ["data.params.train.params.run=missing", "data.params.train.target=own.Data"]))


def test_the_check_does_not_import_torch(config):
    code = (
        "import sys\nfrom ldm.config.loading import load_config\nfrom ldm.config.validation import validate\n"
        f"validate(load_config([{config!r}]), check_files=False)\nsys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_defaults_are_in_range():
    assert ContrastOptions().num_directions == 100
