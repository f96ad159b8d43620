"""The plan of the house: rooms import only from floors below, files and functions stay small."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = {
    "ldm.util": 1,
    "ldm.legacy": 1,
    "ldm.lr_scheduler": 1,
    "ldm.data": 1,
    "ldm.metrics": 1,
    "ldm.modules": 2,
    "ldm.diffusion": 3,
    "ldm.losses": 3,
    "ldm.models": 4,
    "ldm.training": 5,
    "ldm.evaluation": 5,
}
FILES = sorted((ROOT / "ldm").rglob("*.py"))


def room_of(module):
    return next((room for room in FLOORS if module == room or module.startswith(f"{room}.")), None)


def imports_of(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_room(path):
    tree = ast.parse(path.read_text())
    own = room_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
    for name in imports_of(tree):
        other = room_of(name)
        if other is None or own is None or other == own or other == "ldm.util":
            continue
        if {own, other} <= {"ldm.training", "ldm.evaluation"} or (own, other) == ("ldm.util", "ldm.legacy"):
            continue
        assert FLOORS[other] < FLOORS[own], f"{own} imports {name}, which is not on a floor below"
        assert FLOORS[own] > 1, f"{own} is a leaf, but imports {name}"
    if own == "ldm.metrics":
        assert not any(name.split(".")[0] == "torch" for name in imports_of(tree))
    assert len(path.read_text().splitlines()) <= 420
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            lines = node.end_lineno - body[0].lineno + 1 if body else 0
            assert lines <= 60, f"{node.name} has {lines} lines of code"


def test_front_doors_are_short():
    doors = ("main.py", "run_para_metrics.py")
    assert sum(len((ROOT / door).read_text().splitlines()) for door in doors) < 300
