"""``scripts/image_scores.py``: reconstructions of a run, sets of images against each other, TAD."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from script_modules import load_script
from stand_ins import MeanColour

from ldm.data.formats.image_sets import image_batches
from ldm.util import UserError

MODELS = '''
import pytorch_lightning as pl
import torch


class Darker(pl.LightningModule):
    """An autoencoder that darkens images, and units of brightness."""

    latent_unit, latent_shape, unit_names = 2, (3, 32, 32), None

    def __init__(self):
        super().__init__()
        self.loss = torch.nn.Parameter(torch.tensor(0.25))

    def reconstruct(self, x):
        return x - self.loss, None

    def encode_units(self, x):
        return torch.stack([x.mean(dim=(1, 2, 3)), 0 * x[:, 0, 0, 0]], dim=1)

    def decode_units(self, codes, x_T, sampler=None, only=None):
        raise NotImplementedError


class Unitary(pl.LightningModule):
    """Units alone, and a decoder that shows their level."""

    latent_unit, latent_shape, unit_names = 3, (1, 2, 2), None

    def __init__(self):
        super().__init__()
        self.level = torch.nn.Parameter(torch.tensor(0.0))

    def encode_units(self, x):
        return x.mean(dim=(2, 3))

    def decode_units(self, codes, x_T, sampler=None, only=None):
        assert (sampler.num_steps, getattr(sampler, "eta", 1.0)) in ((200, 1.0), (7, 1.0))
        return codes[:, :, None, None].expand(-1, -1, 32, 32) + self.level
'''


@pytest.fixture
def script():
    return load_script("image_scores")


@pytest.fixture
def make_run(tmp_path, monkeypatch):
    (tmp_path / "image_score_models.py").write_text(MODELS)
    monkeypatch.syspath_prepend(tmp_path)
    import image_score_models

    def make(name: str) -> Path:
        run = tmp_path / "logs" / "2024-01-01T00-00-00_run"
        (run / "checkpoints").mkdir(parents=True)
        state = getattr(image_score_models, name)().state_dict()
        torch.save({"epoch": 1, "global_step": 40, "state_dict": state}, run / "checkpoints" / "last.ckpt")
        world = {"target": "ldm.data.world.World3D", "params": {"limit": 12}}
        config = {
            "model": {"target": f"image_score_models.{name}"},
            "data": {"target": "ldm.data.module.DataModuleFromConfig", "params": {"batch_size": 5, "test": world}},
        }
        (run / "configs").mkdir()
        (run / "configs" / "2024-01-01T00-00-00-project.yaml").write_text(yaml.safe_dump(config))
        return run

    return make


def test_reconstructions_of_an_autoencoder(make_run, script, capsys):
    run = make_run("Darker")
    arguments = ["recon", "-r", str(run), "-n", "7", "--batch-size", "3", "--device", "cpu"]
    assert script.main(arguments) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["num_images"] == 7
    assert 0 < scores["mse"] <= 0.125**2  # a quarter of [-1, 1] is an eighth of [0, 1]; what is black stays so
    kept = json.loads((run / "image_scores" / "40-recon.json").read_text())
    assert kept["psnr"] == scores["psnr"] and kept["options"]["num_images"] == 7


def test_reconstructions_of_a_diffusion_model(make_run, script, capsys):
    run = make_run("Unitary")
    for options in ([], ["--sampler", "dpm_solver", "--num-steps", "7"]):
        assert script.main(["recon", "-r", str(run), "-n", "4", "--device", "cpu", *options]) == 0
        assert 5 < json.loads(capsys.readouterr().out)["psnr"] < 40
    kept = json.loads((run / "image_scores" / "40-recon.json").read_text())["options"]
    assert kept["sampler"] == "dpm_solver" and kept["num_steps"] == 7
    assert script.main(["recon", "-r", str(run), "--sampler", "plms", "--eta", "0.5", "--device", "cpu"]) == 1
    assert "eta" in capsys.readouterr().err


def test_tad_of_a_run(make_run, script, capsys, tmp_path):
    brightness = np.random.default_rng(0).random(40)
    data = np.broadcast_to(brightness[:, None, None, None], (40, 3, 32, 32)).astype(np.float32)
    labels = np.column_stack([brightness > 0.5, np.arange(40) % 2]).astype(int)
    np.savez(tmp_path / "faces.npz", data=data, targ=labels)
    assert script.main(["tad", "-r", str(make_run("Darker")), "--images", str(tmp_path / "faces.npz")]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["captured"] == [0] and scores["tad_score"] > 0.4 and scores["tad_range"] == "signed"


def test_two_sets_of_images(script, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(script, "Inception", MeanColour)
    rng = np.random.default_rng(0)
    real, other = (rng.integers(0, 200, size=(30, 8, 8, 3), dtype=np.uint8) for _ in range(2))
    (tmp_path / "real" / "sub").mkdir(parents=True)
    for number, picture in enumerate(real):
        Image.fromarray(picture).save(tmp_path / "real" / ("sub" if number % 2 else "") / f"{number:02d}.png")
    np.savez(tmp_path / "brighter.npz", other + 55)
    np.save(tmp_path / "signed.npy", np.moveaxis(real, 3, 1) / np.float32(127.5) - 1)

    def scores(*arguments: str) -> dict:
        assert script.main(["fid", *arguments]) == 0
        return json.loads(capsys.readouterr().out)

    kept, folder = str(tmp_path / "kept.npz"), str(tmp_path / "real")
    same = scores("--generated", str(tmp_path / "signed.npy"), "--real", folder, "--keep", kept)
    assert same["fid"] < 1e-6 and same["num_generated"] == same["num_real"] == 30
    brighter = scores("--generated", str(tmp_path / "brighter.npz"), "--real", folder)
    assert brighter["fid"] > 1000 and brighter["kid"] > same["kid"]
    again = scores("--generated", str(tmp_path / "brighter.npz"), "--real", kept)
    assert again == {"num_generated": 30, "fid": pytest.approx(brighter["fid"])}


def test_errors_are_one_message(script, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("INCEPTION_WEIGHTS", str(tmp_path / "nowhere.pth"))
    assert script.main(["fid", "--generated", "a", "--real", "b"]) == 1
    assert "FID and KID: expected InceptionV3's weights" in capsys.readouterr().err
    assert script.main(["recon", "-r", str(tmp_path / "nothing")]) == 1
    assert "nothing" in capsys.readouterr().err


def test_files_without_images(tmp_path):
    np.save(tmp_path / "flat.npy", np.zeros((4, 9)))
    np.savez(tmp_path / "named.npz", other=np.zeros(3))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "named.npz").read_bytes()[:40])
    (tmp_path / "empty").mkdir()
    for name, side in (("a.png", 4), ("b.png", 5)):
        Image.fromarray(np.zeros((side, side, 3), dtype=np.uint8)).save(tmp_path / name)
    for name, message in (
        ("flat.npy", r"got \(4, 9\)"),
        ("named.npz", "got other"),
        ("cut.npz", "expected a folder of pictures"),
        ("absent", "expected a folder of pictures"),
        ("empty", "expected pictures, got none"),
        ("", "expected 4 x 4 pixels, as a.png, got 5 x 5"),
    ):
        with pytest.raises(UserError, match=message):
            list(image_batches(tmp_path / name))


def test_ranges_of_floats(tmp_path):
    np.save(tmp_path / "unit.npy", np.linspace(0, 1, 48).reshape(1, 4, 4, 3))
    (batch,) = image_batches(tmp_path / "unit.npy", is_unit_range=True)
    assert batch.shape == (1, 3, 4, 4) and (batch.min(), batch.max()) == (-1, 1)
