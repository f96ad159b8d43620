"""Every command line of README, docs and the head comments of configs is run, with small sizes and few steps."""

from __future__ import annotations

import os
import re
from pathlib import Path
from types import SimpleNamespace

import docs_files
import pytest
import torch
from docs_commands import ROOT, commands
from docs_runner import Checkout, SerialEngine

import main as front_door
import run_para_metrics
from ldm.metrics.registry import METRICS
from ldm.modules import inception
from ldm.training import recipe as recipes
from ldm.util import UserError

# Slow are recipes of many stages or of the sizes of the papers, and the commands in the heads of configs that other
# fast tests train: stages of recipes, which the recipes train, and the variants of a config for other data sets and first
# stages, which test_configs.py trains.
SLOW_STAGES, SLOW_RECIPE = 6, r"size=64|full_size"
SLOW_HEAD = r"configs/(quickstart|own_data|emoji)/(?!recipe)|configs/.*(cars3d|mpi3d|celeba|_kl|-kl)"


def listed() -> list:
    """Return the commands as parameters; those of large recipes are slow.

    The examples of CONTRIBUTING.md are run by test_contributing.py, in a folder with their files.
    """
    own = [command for command in commands() if command.page.name != "CONTRIBUTING.md" or command.words[0] == "bash"]
    return [pytest.param(c, id=c.place, marks=[pytest.mark.slow] if is_slow(c) else []) for c in own]


def is_slow(command) -> bool:
    """Return whether a command is run by the slow tests only; see above."""
    if re.match(SLOW_HEAD, command.place):
        return True
    recipes = [word for word in command.words if "recipe" in word and word.endswith(".yaml")]
    text = (ROOT / recipes[0]).read_text() if recipes else ""
    return text.count("base: [") > SLOW_STAGES or bool(re.search(SLOW_RECIPE, text))


def checkout_of(command) -> str:
    """Return a name for the folder of a command: recipes with a ``logdir`` of their own have their own, and so has
    docs/datasets.md, whose small autoencoder would be the newest one of its name."""
    if command.page.name == "datasets.md":
        return "datasets"
    text = " ".join(command.words)
    if re.search(r"\bmine\w*\.yaml", text):
        return "own_data"
    if found := re.search(r"logs/(\w+)", text):
        return found[1]
    if "--recipe" in command.words:
        file = ROOT / command.words[command.words.index("--recipe") + 1]
        return re.search(r"^logdir: logs/(\w+)", file.read_text(), re.MULTILINE)[1]
    return "quickstart"


class MeanColour(inception.Inception):
    """Six simple features in the place of a network of 90 MB."""

    def __init__(self, weights=None, device="cpu"):
        pass

    def __call__(self, images):
        pixels = inception.to_bytes(images).float().flatten(2)
        return torch.cat([pixels.mean(dim=2), pixels.std(dim=2)], dim=1).numpy()


@pytest.fixture(scope="module")
def checkouts(tmp_path_factory):
    root, found, environment = tmp_path_factory.mktemp("docs"), {}, dict(os.environ)

    def call(words: list[str], task: str, again: str) -> None:
        """Run a stage of a recipe, or its scores, in this process."""
        module, arguments = {"main": front_door, "run_para_metrics": run_para_metrics}[Path(words[1]).stem], words[2:]
        code = front_door.main(arguments) if module is front_door else Checkout._call(module, arguments)
        if code:
            raise UserError(f"{task} failed: {words}")

    def wait(seconds: float) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        docs_files.small_spaces(patch.setitem)
        patch.setattr(recipes, "_call", call)
        patch.setattr("ldm.scoring.run.Engine", SerialEngine)
        patch.setattr("ldm.scoring.command.time", SimpleNamespace(sleep=wait))
        for metric in METRICS.values():
            for name in metric.protocol.keys() & {"num_train", "num_test", "num_eval", "num_variance_estimate"}:
                patch.setitem(metric.protocol, name, 400)
        patch.setattr("ldm.modules.inception.Inception", MeanColour)
        yield lambda name: found.get(name) or found.setdefault(name, Checkout(root / name))
    os.environ.clear()
    os.environ.update(environment)


@pytest.mark.parametrize("command", listed())
def test_command(command, checkouts):
    checkouts(checkout_of(command)).run(command)
