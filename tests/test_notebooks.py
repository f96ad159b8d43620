"""Notebooks of ``examples``: their format, and that they run from top to bottom."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from notebook_runner import execute

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
# The stages of the recipe in seconds instead of minutes.
SHORT = """
clip.lightning.trainer.max_steps=4 clip.lightning.trainer.limit_test_batches=1
judge.lightning.trainer.max_steps=4 judge.lightning.trainer.limit_test_batches=1
vq.lightning.trainer.max_steps=4 vq.lightning.trainer.limit_test_batches=1
text_to_image.lightning.trainer.max_steps=6 text_to_image.lightning.trainer.log_every_n_steps=2
text_to_image.lightning.trainer.limit_test_batches=1
text_to_image.lightning.callbacks.prompt_score.params.num_prompts=8
"""
EDITS = "ten within across steps strengths two real real-composed null".split()
PICTURES = {
    "directions": dict.fromkeys(EDITS, ["image/png"]) | {"animation": ["image/gif"]},
    "text_to_image": dict.fromkeys(("losses", "sample", "strengths", "unseen", "heat"), ["image/png"])
    | {"denoise": ["image/gif"]},
}


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def sources(path, kind):
    return ["".join(cell["source"]) for cell in read(path)["cells"] if cell["cell_type"] == kind]


def pictures(notebook):
    """Return the formats of the pictures of each code cell that shows any, by its id."""
    found = {}
    for cell in notebook["cells"]:
        shown = [name for output in cell.get("outputs", ()) for name in output.get("data", ()) if "image/" in name]
        found |= {cell["id"]: shown} if shown else {}
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_format(path):
    notebook = read(path)
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids) and all(re.fullmatch(r"[\w-]{1,64}", name) for name in ids)
    for cell in notebook["cells"]:
        required = {"cell_type", "id", "metadata", "source"}
        assert set(cell) == (required | {"execution_count", "outputs"} if cell["cell_type"] == "code" else required)
        assert all(output["output_type"] != "error" for output in cell.get("outputs", ()))
    for source in sources(path, "code"):
        ast.parse(source)
    is_executed = any(cell.get("execution_count") for cell in notebook["cells"])
    assert is_executed or path.stem == "directions"
    assert pictures(notebook) == (PICTURES[path.stem] if is_executed else {})  # for readers who do not run it


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_named_files_exist(path):
    text = "\n".join([*sources(path, "code"), *sources(path, "markdown")])
    names = re.findall(r"(?:configs|docs|scripts)/[\w/-]+\.\w+", text)
    assert names and all((ROOT / name).is_file() for name in names)


def test_cells_share_a_namespace_and_their_outputs_are_stored(tmp_path, monkeypatch):
    from PIL import Image

    Image.new("RGB", (2, 2)).save(tmp_path / "a.gif")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    texts = [
        "from IPython.display import Image as File\nfrom PIL import Image\nx = 1\nprint(x)",
        "x + 1",
        "x;",
        "File(filename='a.gif')",
        "Image.new('RGB', (2, 2))",
    ]
    cells = [{"cell_type": "code", "id": f"c{i}", "metadata": {}, "source": [text]} for i, text in enumerate(texts)]
    notebook = {"cells": [{"cell_type": "markdown", "id": "text", "metadata": {}, "source": ["a"]}, *cells]}
    execute(notebook)
    assert [cell["execution_count"] for cell in cells] == [1, 2, 3, 4, 5]
    assert cells[0]["outputs"] == [{"name": "stdout", "output_type": "stream", "text": ["1\n"]}]
    assert cells[1]["outputs"][0]["data"] == {"text/plain": ["<int>"]} and cells[2]["outputs"] == []
    assert pictures(notebook) == {"c3": ["image/gif"], "c4": ["image/png"]}
    cells[1]["source"] = ["1 / 0"]
    with pytest.raises(ZeroDivisionError) as caught:
        execute(notebook)
    assert "in cell c1" in caught.value.__notes__[0]


@pytest.mark.slow
def test_clip_guided_notebook_runs_from_top_to_bottom(tmp_path):
    output, environment = tmp_path / "executed.ipynb", {"TEXT_TO_IMAGE_LOGDIR": str(tmp_path / "logs")}
    environment |= {"TEXT_TO_IMAGE_OVERRIDES": " ".join(SHORT.split()), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "tests/notebook_runner.py", "examples/text_to_image.ipynb", "--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert pictures(read(output)) == PICTURES["text_to_image"]
    printed = {
        cell["id"]: "".join(cell["outputs"][0].get("text", ())) for cell in read(output)["cells"] if cell.get("outputs")
    }
    assert re.search(r"attribute +w = -1 .*chance", printed["score"]) and "floor hue" in printed["score"]
    assert "text_to_image" in printed["train"]


@pytest.mark.slow
def test_noiseclr_notebook_runs_from_top_to_bottom(tmp_path):
    from direction_models import save_text_model, train_noiseclr

    run, output = train_noiseclr(tmp_path, save_text_model(tmp_path / "zoo")), tmp_path / "executed.ipynb"
    environment = {"DIRECTIONS_RUN": str(run), "DIRECTIONS_OUTPUT": str(tmp_path / "out"), "OMP_NUM_THREADS": "1"}
    environment |= {"DIRECTIONS_SAMPLER_STEPS": "4", "DIRECTIONS_TRAINING_STEPS": "2"}
    command = [sys.executable, "tests/notebook_runner.py", "examples/directions.ipynb", "--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert pictures(read(output)) == PICTURES["directions"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "strengths.gif",
        "world.safetensors",
        "sphere.safetensors",
    }
