"""CONTRIBUTING.md: its examples are written to files, and the commands shown with them are run."""

import csv
import glob
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from script_modules import load_script

import main as main_script
from ldm.metrics.registry import ALL_METRICS
from ldm.util import get_obj_from_str

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
FILES = {
    source.partition("\n")[0].removeprefix("# "): source
    for source in re.findall(r"```(?:python|yaml)\n(.*?)```", TEXT, re.DOTALL)
}
NEEDS = {"Method": ("Data set",), "Metric": ("Method",), "Sampler": ("Method",)}  # sections whose runs are used


def commands_of(section):
    """Return the commands of a section, as shown."""
    text = re.search(rf"^### {section}\n(.*?)(?=^##|\Z)", TEXT, re.DOTALL | re.MULTILINE).group(1)
    lines = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).splitlines()
    return [shlex.split(line, comments=True) for line in lines]


def expand(word):
    return sorted(glob.glob(word)) or [word]


class Shell:
    """Runs the commands of sections in a folder with the files, each section once; modules stay loaded in between."""

    def __init__(self, folder):
        self.folder, self.done, self.output = folder, set(), {}

    def run(self, section):
        for needed in NEEDS.get(section, ()):
            self.run(needed)
        if section not in self.done:
            self.done.add(section)
            self.output[section] = [self.call(*command) for command in commands_of(section)]

    def call(self, python, program, *words):
        assert python == "python"
        words = [found for word in words for found in expand(word)]
        if program == "run_para_metrics.py":
            command = [sys.executable, str(ROOT / program), *words]
            done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
            return done.stdout
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [program, *words])
            module = main_script if program == "main.py" else load_script(Path(program).stem)
            assert module.main() == 0, f"{program} {' '.join(words)}"
        return ""

    def one(self, pattern):
        """Return the only path that matches."""
        (found,) = self.folder.glob(pattern)
        return found

    def json(self, pattern):
        return json.loads(self.one(pattern).read_text())


@pytest.fixture(scope="module")
def shell(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own_files")
    for name, source in FILES.items():
        (folder / name).write_text(source)
    environment, others = dict(os.environ), own_modules()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield Shell(folder)
    own_modules()
    sys.modules.update(others)
    ALL_METRICS.pop("alignment", None)
    os.environ.clear()
    os.environ.update(environment)


def own_modules():
    """Remove the modules with names of the examples, and return them."""
    names = {name.removesuffix(".py") for name in FILES} & set(sys.modules)
    return {name: sys.modules.pop(name) for name in names}


def test_files_have_names_and_clean_code(tmp_path):
    assert len(FILES) == 12 and all(re.fullmatch(r"\w+\.(py|yaml)", name) for name in FILES)
    for name, source in FILES.items():
        (tmp_path / name).write_text(source)
    for command in (["check", "--config", "lint.isort.known-first-party=['ldm']"], ["format", "--check"]):
        ruff = [sys.executable, "-m", "ruff", command[0], "--config", str(ROOT / "pyproject.toml"), *command[1:]]
        subprocess.run([*ruff, str(tmp_path)], check=True)
    assert 60 <= len(FILES["my_method.py"].splitlines()) <= 80
    assert len(FILES["my_sampler.py"].splitlines()) <= 13


def test_data_set(shell):
    shell.run("Data set")
    assert shell.one("logs/*_small/images/train/samples_gs*.png").is_file()
    assert shell.one("logs/*_small/checkpoints/last.ckpt").is_file()


def test_method_is_trained_drawn_scored_and_edited(shell):
    shell.run("Method")
    run = shell.one("logs/*_my_method")
    assert shell.one("logs/*_my_method/images/train/edits_gs*.png").is_file()
    stored = np.load(run / "dis_repre" / "epoch=000000.npz")
    assert stored["latents"].shape == (24, 3, 16) and stored["num_samples"] == 2
    scores = json.loads((run / "dis_metrics" / "2.json").read_text())
    assert {"factor_VAE", "dci", "MIG", "beta_VAE"} <= set(scores)
    assert "my_method" in shell.output["Method"][2]
    edits = json.loads((run / "edit_score" / "2.json").read_text())
    assert 0 <= edits["edit_accuracy"] <= 1 and (run / "edit_score" / "2.png").is_file()
    assert shell.json("logs/*_my_method/samples/last/*/sampling.json")["swap"] is True


def test_metric_scores_during_training_and_afterwards(shell):
    shell.run("Metric")
    with shell.one("logs/*_my_metric/scores.csv").open() as stream:
        (row,) = csv.DictReader(stream)
    assert 0 < float(row["alignment"]) <= 1
    for name in ("my_method", "my_metric"):
        assert 0 < shell.json(f"logs/*_{name}/dis_metrics/2.json")["alignment"]["alignment"] <= 1
    table = shell.output["Metric"][-1]
    assert "alignment" in table and "my_metric" in table


def test_sampler_is_used_in_pictures_edit_score_and_sampling(shell, monkeypatch):
    shell.run("Method")
    kind, steps = get_obj_from_str("my_sampler.RenoisingSampler"), []
    step = kind.step
    monkeypatch.setattr(kind, "step", lambda own, state: steps.append(1) or step(own, state))
    counts = []
    for command in commands_of("Sampler"):
        shell.call(*command)
        counts.append(len(steps))
    record = shell.json("logs/*_my_sampler/edit_score/2.json")["sampler"]
    assert record["name"] == "my_sampler.RenoisingSampler" and record["num_steps"] == 4
    assert shell.json("logs/*_my_sampler/samples/last/*/sampling.json")["sampler"] == "my_sampler.RenoisingSampler"
    edits_alone = 4 * (1 + 3) * 2  # steps, base images and three attributes, score and picture
    assert counts[0] > edits_alone and counts[1] == counts[0] + 4


def test_condition_stage_is_trained_and_sampled_with_guidance(shell):
    shell.run("Condition stage")
    record = shell.json("logs/*_my_conditioner/samples/last/*/sampling.json")
    assert record["guidance"] == 3 and record["texts"] == [["red figure, disc"]]
    pixels = np.load(shell.one("logs/*_my_conditioner/samples/last/*/*-samples.npz"))["arr_0"]
    assert pixels.shape == (2, 16, 16, 3)
