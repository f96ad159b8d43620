"""The layout of the package: layers, import cycles, sizes of files, folders and functions."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = {
    "ldm.errors": 0,
    "ldm.ranges": 0,
    "ldm.csv_files": 0,
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
# ldm.util.load_config is the one call that users need; it imports the loader when it is called.
EXEMPT = {("ldm.util", "ldm.config")}
FILES = sorted((ROOT / "ldm").rglob("*.py"))
MOST_LINES = {"ldm": 42_100, "scoring evaluation runs pictures": 9_480, "scoring": 3_900}
MOST_PROBES = 25  # lines with hasattr or getattr


def module_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def package_of(module):
    return next((name for name in LAYERS if module == name or module.startswith(f"{name}.")), None)


def imports_of(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def lines_in(*packages):
    paths = [path for path in FILES if not packages or path.relative_to(ROOT).parts[1] in packages]
    return sum(len(path.read_text().splitlines()) for path in paths)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_layers_and_sizes(path):
    text = path.read_text()
    tree = ast.parse(text)
    own = package_of(module_of(path))
    for name in imports_of(tree):
        other = package_of(name)
        if other is not None and own is not None and other != own and (own, other) not in EXEMPT:
            assert LAYERS[other] <= LAYERS[own], f"{own} imports {name} of a higher layer"
    if own in ("ldm.metrics", "ldm.scoring"):
        assert not any(name.split(".")[0] == "torch" for name in imports_of(tree))
    if own in ("ldm.training", "ldm.scoring"):
        other = "ldm.scoring" if own == "ldm.training" else "ldm.training"
        assert not any(name.startswith((other, "ldm.evaluation")) for name in imports_of(tree))
    assert len(text.splitlines()) <= 400
    assert not re.search(r"# fmt: (skip|off)", text)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            lines = node.end_lineno - body[0].lineno + 1 if body else 0
            assert lines <= 60, f"{node.name} has {lines} lines of code"


def test_no_module_imports_itself_by_way_of_others():
    modules = {module_of(path) for path in FILES}
    graph = {
        module_of(path): {name for name in imports_of(ast.parse(path.read_text())) if name in modules} for path in FILES
    }
    graph["ldm.util"] -= {name for name in graph["ldm.util"] if name.startswith("ldm.config")}
    done, path = set(), []

    def visit(module):
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module in done:
            return
        path.append(module)
        for name in graph[module]:
            # A package's own __init__ may re-export its modules.
            if name != module and not module.startswith(f"{name}."):
                visit(name)
        path.pop()
        done.add(module)

    for module in sorted(graph):
        visit(module)


@pytest.mark.parametrize("packages", MOST_LINES)
def test_packages_stay_small(packages):
    names = () if packages == "ldm" else packages.split()
    assert lines_in(*names) <= MOST_LINES[packages]


def test_folders_stay_readable():
    for folder in {path.parent for path in FILES}:
        assert len(list(folder.glob("*.py"))) <= 20, folder


def test_objects_are_not_probed():
    found = [line for path in FILES for line in path.read_text().splitlines() if re.search("hasattr|getattr", line)]
    assert len(found) <= MOST_PROBES, "\n".join(found)


def test_front_doors_are_short():
    doors = ("main.py", "run_para_metrics.py")
    assert sum(len((ROOT / door).read_text().splitlines()) for door in doors) < 300
