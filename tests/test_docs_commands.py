"""Every command line of README, docs and the head comments of configs is run, with small sizes and few steps."""

from __future__ import annotations

import itertools
import os
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import docs_files
import pytest
from docs_commands import ROOT, commands
from docs_runner import Checkout, SerialEngine

import main as front_door
import run_para_metrics
from ldm.metrics.registry import METRICS
from ldm.training import recipe as recipes
from ldm.training.cli import parse_arguments
from ldm.util import UserError

COMMANDS = [command for command in commands()]


def checkout_of(command) -> str:
    """Return a name for the folder of a command: recipes of other pictures than the quickstart's have their own."""
    text = " ".join(command.words)
    if found := re.search(r"logs/(\w+)", text):
        return found[1]
    if "--recipe" in command.words:
        file = ROOT / command.words[command.words.index("--recipe") + 1]
        return re.search(r"^logdir: logs/(\w+)", file.read_text(), re.MULTILINE)[1]
    return "quickstart"


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
                patch.setitem(metric.protocol, name, 200)
        yield lambda name: found.get(name) or found.setdefault(name, Checkout(root / name))
    os.environ.clear()
    os.environ.update(environment)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.place)
def test_command(command, checkouts):
    checkouts(checkout_of(command)).run(command)
