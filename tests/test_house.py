"""The layout of the package: layers, import cycles, sizes of files and functions."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = {
    "ldm.util": 0,
    "ldm.legacy": 0,
    "ldm.lr_scheduler": 1,
    "ldm.data": 1,
    "ldm.metrics": 1,
    "ldm.modules": 2,
    "ldm.losses": 3,
    "ldm.diffusion": 3,
    "ldm.pictures": 3,
    "ldm.models": 4,
    "ldm.config": 4,
    "ldm.runs": 4,
    "ldm.evaluation": 5,
    "ldm.training": 6,
    "ldm.scoring": 6,
}
FILES = sorted((ROOT / "ldm").rglob("*.py"))


def package_of(module):
    return next((name for name in LAYERS if module == name or module.startswith(f"{name}.")), None)


def imports_of(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_layers(path):
    tree = ast.parse(path.read_text())
    own = package_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
    for name in imports_of(tree):
        other = package_of(name)
        if other is None or own is None or other == own:
            continue
        assert LAYERS[other] <= LAYERS[own], f"{own} imports {name} of a higher layer"
    if own == "ldm.metrics":
        assert not any(name.split(".")[0] == "torch" for name in imports_of(tree))
    assert len(path.read_text().splitlines()) <= 400
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            lines = node.end_lineno - body[0].lineno + 1 if body else 0
            assert lines <= 60, f"{node.name} has {lines} lines of code"


def test_front_doors_are_short():
    doors = ("main.py", "run_para_metrics.py")
    assert sum(len((ROOT / door).read_text().splitlines()) for door in doors) < 300
