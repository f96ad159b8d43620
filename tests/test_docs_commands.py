"""Every command line of README, docs and the head comments of configs is run, with small sizes and few steps."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import docs_files
import pytest
import yaml
from docs_commands import ROOT, Command, commands, of_config, of_page
from docs_runner import Checkout, SerialEngine
from stand_ins import MeanColour

import main as front_door
import run_para_metrics
from ldm.metrics.registry import METRICS
from ldm.training import recipe as recipes
from ldm.util import UserError

# Slow are recipes of many stages, of the sizes of the papers, of the emoji, of other methods on other images, and those
# that are repeated with another seed and folder; benchmarks, which have tests of their own; and the commands in the
# heads of configs that other fast tests train: stages, which the recipes train, configs that a command on a page
# trains, and variants of a config for other data sets and first stages, which test_configs.py trains.
# scripts/quickstart.sh, scripts/test.sh and .ci/run create an environment and take the whole quickstart, or all tests:
# they are run with a Python that records its words. The recorded recipe is then run as any other.
SLOW_STAGES, SLOW_RECIPE = 6, r"size=64|full_size"
SLOW_HEAD = r"configs/(quickstart|own_data|emoji)/(?!recipe)|configs/.*(cars3d|mpi3d|celeba|_kl|-kl)"
SLOW_WORDS = r"logs/SEED|own_data/recipe_|emoji/recipe|bench_training"
ON_PAGES = {word for command in commands() if command.page.suffix == ".md" for word in command.words}


def listed() -> list:
    """Return the commands as parameters.

    The examples of CONTRIBUTING.md are run by test_contributing.py, in a folder with their files.
    """
    own = [command for command in commands() if command.page.name != "CONTRIBUTING.md" or command.words[0] == "bash"]
    return [pytest.param(c, id=c.place, marks=[pytest.mark.slow] if is_slow(c) else []) for c in own]


def is_slow(command) -> bool:
    """Return whether a command is run by the slow tests only; see above."""
    config = command.place.partition(":")[0]
    if re.match(SLOW_HEAD, config) or config in ON_PAGES or re.search(SLOW_WORDS, " ".join(command.words)):
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
        content = yaml.safe_load(file.read_text())
        return Path(content.get("logdir", content["name"])).name
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
                patch.setitem(metric.protocol, name, 400 if metric.key == "MIG" else 60)
        patch.setattr("ldm.modules.inception.Inception", MeanColour)
        yield lambda name: found.get(name) or found.setdefault(name, Checkout(root / name))
    os.environ.clear()
    os.environ.update(environment)


@pytest.mark.parametrize("command", listed())
def test_command(command, checkouts):
    checkouts(checkout_of(command)).run(command)


def test_examples_of_contributing_are_run_by_their_own_test():
    page, tests = (ROOT / "CONTRIBUTING.md").read_text(), (ROOT / "tests" / "test_contributing.py").read_text()
    sections = re.findall(r"^### (.+)\n", page, re.MULTILINE)
    assert len(sections) >= 5
    for name in sections:
        assert f'run("{name}")' in tests or f'commands_of("{name}")' in tests, name


PAGE = """Text `python main.py --base
a.yaml -t`, `main.py` and `python`.

```bash
# a comment
export DATA_ROOT=data
python scripts/x.py "a # b" \\
    --flag 1   # a comment

cp a b
```

```yaml
a: 1  # python main.py
```
"""


def test_commands_of_a_page_and_a_config(tmp_path):
    page, config = tmp_path / "page.md", tmp_path / "c.yaml"
    page.write_text(PAGE)
    found = [(command.line, command.words, command.exports) for command in of_page(page)]
    assert found == [
        (1, ("python", "main.py", "--base", "a.yaml", "-t"), ()),
        (6, ("export", "DATA_ROOT=data"), ()),
        (7, ("python", "scripts/x.py", "a # b", "--flag", "1"), ("DATA_ROOT=data",)),
        (10, ("cp", "a", "b"), ("DATA_ROOT=data",)),
    ]
    config.write_text(
        "# Text:  python main.py -t\n#   python main.py a \\\n#       b\n# python is a word\nx: 1\n# python y\n"
    )
    assert [(c.line, c.words) for c in of_config(config)] == [
        (1, ("python", "main.py", "-t")),
        (2, ("python", "main.py", "a", "b")),
    ]


@pytest.mark.parametrize(
    "line",
    ["python scripts/new.py -r RUN", "make all", "python scripts/edit_score.py -r MY_RUN", "bash scripts/new.sh"],
)
def test_commands_without_a_rule_fail_with_their_place(line, checkouts):
    command = Command(tuple(line.split()), ROOT / "README.md", 7)
    with pytest.raises((UserError, subprocess.CalledProcessError)) as caught:
        checkouts("quickstart").run(command)
    assert caught.value.__notes__ == [f"README.md:7: {line}"]
