"""A sampler in a user's file works in sampling, image logging and the edit score through YAML and options alone."""

import importlib
import json

import pytest
import pytorch_lightning as pl
import torch
import yaml
from script_modules import load_script
from test_sampling import CLIP_DISDIFF, DDIM, LDM, WORLD, distance, draw, write_run

from ldm.data.module import DataModuleFromConfig
from ldm.models.judge import AttributeJudge
from ldm.util import instantiate_from_config

EULER = '''
"""Euler steps of the probability-flow equation (Song et al. 2021, Eq. 13)."""

import torch
from ldm.diffusion.samplers import Sampler


class Euler(Sampler):
    def step(self, state):
        sigma, sigma_prev = (torch.sqrt(1 / abar - 1) for abar in (state.abar, state.abar_prev))
        scaled = state.x / torch.sqrt(state.abar) + (sigma_prev - sigma) * state.eps
        return torch.sqrt(state.abar_prev) * scaled
'''


@pytest.fixture
def euler(tmp_path, monkeypatch):
    (tmp_path / "users_sampler.py").write_text(EULER)
    monkeypatch.syspath_prepend(tmp_path)
    return importlib.import_module("users_sampler").Euler


def test_sampling_by_dotted_path(tmp_path, euler):
    write_run(tmp_path / "run", LDM)
    words = ["-r", str(tmp_path / "run"), "-n", "2", "-c", "2", "--sampler", "users_sampler.Euler"]
    assert load_script("sample_diffusion").main(words) == 0
    record = json.loads(next(tmp_path.glob("run/samples/last/*/sampling.json")).read_text())
    assert record["sampler"] == "users_sampler.Euler" and record["num_steps"] == 2
    samples = draw(tmp_path / "run", sampler=euler(2), count=2).samples()
    assert distance(samples, draw(tmp_path / "run", sampler=DDIM, count=2).samples()) < 1e-3  # the same equation


class Counted:
    """Counts the steps of a sampler class."""

    def __init__(self, monkeypatch, kind):
        self.steps, step = 0, kind.step

        def counted(sampler, state):
            self.steps += 1
            return step(sampler, state)

        monkeypatch.setattr(kind, "step", counted)


def trainer(folder, callback, **options):
    return pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback],
        default_root_dir=folder,
        **options,
    )


def test_image_logging_through_yaml(tmp_path, euler, monkeypatch):
    callback = yaml.safe_load("""
        target: ldm.training.callbacks.image_logger.ImageLogger
        params:
          batch_frequency: 1
          max_images: 2
          log_images_kwargs:
            sampler: {target: users_sampler.Euler, params: {num_steps: 2}}
            inpaint: false
            quantize_denoised: false
            plot_progressive_rows: false
            plot_diffusion_rows: false
    """)
    counted = Counted(monkeypatch, euler)
    data = DataModuleFromConfig(2, train=WORLD)
    fit = trainer(tmp_path, instantiate_from_config(callback), max_steps=1)
    fit.fit(instantiate_from_config(LDM), data)
    assert counted.steps == 2
    assert list((tmp_path / "images" / "train").glob("samples_*.png"))


def test_edit_score_through_yaml(tmp_path, euler):
    judge = AttributeJudge(space="shapes3d", channels=4, hidden=8)
    torch.save({"hyper_parameters": dict(judge.hparams), "state_dict": judge.state_dict()}, tmp_path / "judge.ckpt")
    callback = yaml.safe_load(f"""
        target: ldm.evaluation.editing.callback.EditScore
        params:
          judge: {tmp_path / "judge.ckpt"}
          num_samples: 2
          columns: 1
          sampler: {{target: users_sampler.Euler, params: {{num_steps: 2}}}}
    """)
    model = write_run(tmp_path / "run", CLIP_DISDIFF)
    data = DataModuleFromConfig(2, test=WORLD)
    trainer(tmp_path, instantiate_from_config(callback), limit_test_batches=1).test(model, data, verbose=False)
    report = json.loads((tmp_path / "edit_score" / "0.json").read_text())
    assert report["sampler"]["name"] == "users_sampler.Euler" and report["sampler"]["num_steps"] == 2
