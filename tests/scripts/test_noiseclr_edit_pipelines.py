"""``scripts/edit.py`` on pipelines of diffusers, and with directions in the formats of others."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from script_modules import load_script
from stable_diffusion_pipeline import WIDTH, save_pipeline

from ldm.models.diffusion.methods.noiseclr.directions import DirectionSet
from ldm.models.diffusion.methods.noiseclr.files import save_pipeline as save_with_tokens
from ldm.models.diffusion.methods.noiseclr.pipeline import PipelineDenoiser, load_pipeline

TOKENS = {f"<t{k}>": torch.full((WIDTH,), float(k)) for k in (1, 2, 3)}
FORMATS = {
    "reference": "learned_embeds.bin",
    "inversion": "inversion.safetensors",
    "folder": "run",
    "pipeline": "faces",
    "own": "own.safetensors",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pipeline, and the same directions in every format."""
    root = tmp_path_factory.mktemp("diffusers")
    save_pipeline(root / "pipeline")
    torch.save(TOKENS, root / "learned_embeds.bin")
    save_file(TOKENS, root / "inversion.safetensors")
    (root / "run").mkdir()
    torch.save(TOKENS, root / "run" / "learned_embeds.bin")
    save_with_tokens(root / "faces", TOKENS, load_pipeline(str(root / "pipeline")))
    denoiser = PipelineDenoiser(str(root / "pipeline"))
    DirectionSet.of(denoiser, torch.stack([*TOKENS.values()]), "token", "x").save(root / "own.safetensors")
    return root


@pytest.fixture
def edit(tmp_path, capsys):
    """Runs the script; returns its record and its images, or its error."""

    def edit(*words):
        out = tmp_path / "out"
        common = ["-c", "3", "-n", "1", "--device", "cpu", "-o", out]
        code = load_script("edit").main([*map(str, [*words, *common])])
        if code:
            return capsys.readouterr().err
        return json.loads((out / "edit.json").read_text()), sorted((out / "images").glob("*.png"))

    return edit


def test_noiseclr_directions_of_every_format_edit_a_pipeline_alike(edit, folder):
    found = []
    for name in FORMATS.values():
        words = ["--denoiser", folder / "pipeline", "--directions", folder / name, "-d", "<t2>:40", "-d", "3:-20:1:2"]
        record, images = edit(*words, "--text", "a red cube")
        assert record["kind"] == "token" and record["run"] == str(folder / "pipeline")
        assert [each["direction"] for each in record["variants"][1]] == [1, 2]
        found.append([path.read_bytes() for path in images])
        assert found[-1] == found[0] and found[-1][0] != found[-1][1]


def test_noiseclr_directions_of_several_formats_are_combined(edit, folder):
    files = [f"{name}={folder / path}" for name, path in FORMATS.items()]
    words = ["-d", "pipeline/<t1>:5", "-d", "own/<t3>:5", "-d", "inversion/2"]
    assert "direction 'inversion/2': expected" in edit(
        "--denoiser", folder / "pipeline", "--directions", *files, *words
    )
    record, _ = edit("--denoiser", folder / "faces", "--directions", *files[:4], *words[:2], "-d", "reference/<t2>")
    assert [each["direction"] for each in record["variants"][1]] == [9, 1]


def test_noiseclr_pipelines_in_the_cache_are_named(edit, folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *names: asked.append(names) or "a path")
    words = ["--denoiser", "somebody/faces", "--directions", folder / "own.safetensors", "-d", "1"]
    assert "somebody/faces: expected the folder of a complete pipeline" in edit(*words)  # not in the real cache
    assert asked == [("somebody/faces", "model_index.json")]


@pytest.mark.parametrize("name", ["somebody/missing", "missing", "runs/a/missing.ckpt"])
def test_noiseclr_denoisers_that_do_not_exist(edit, folder, name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    message = edit("--denoiser", name, "--directions", folder / "own.safetensors", "-d", "1")
    assert f"--denoiser {name}: expected a run, a checkpoint, the folder of a pipeline" in message


def test_noiseclr_directions_of_other_models_are_named(edit, folder, tmp_path):
    torch.save({"<t1>": torch.ones(WIDTH + 1)}, tmp_path / "wide.bin")
    common = ["--denoiser", folder / "pipeline", "-d", "1", "--directions"]
    message = edit(*common, tmp_path / "wide.bin")
    assert (
        f"--directions wide: expected directions of kind token and width {WIDTH}, got those of kind token and width 17"
        in message
    )
    other = DirectionSet(torch.ones(1, WIDTH), "token", ("<t1>",), "x", "of another model")
    other.save(tmp_path / "other.safetensors")
    message = edit(*common, folder / "learned_embeds.bin", tmp_path / "other.safetensors")
    assert "--directions other: expected directions of the model with fingerprint" in message
    assert "expected a folder with one of directions.safetensors" in edit(*common, folder / "pipeline" / "unet")
    assert "expected a pipeline with learned tokens" in edit(*common, folder / "pipeline")
