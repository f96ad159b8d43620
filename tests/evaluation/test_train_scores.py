"""Scores while a model trains: taken on schedule, logged, drawn, the best checkpoint kept."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from ldm.data.dataset import FactorDataset
from ldm.data.factors import FactorSpace
from ldm.data.module import DataModuleFromConfig
from ldm.evaluation.row_encoder import RowEncoder
from ldm.evaluation.train_scores import ScoreWhileTraining
from ldm.evaluation.train_scores.curve import ScoreCurve
from ldm.evaluation.units.information import name_by_information
from ldm.metrics.protocols import select_metrics
from ldm.models.contexts import evaluating
from ldm.runs.checkpoint_io import AtomicCheckpointIO
from ldm.util import ConfigError, UserError

SETTINGS = {"factor_vae": {"num_train": 60, "num_eval": 40, "num_variance_estimate": 200, "batch_size": 16}}
SPACE = FactorSpace(("hue", "size", "side"), (6, 5, 4))


class Grid(FactorDataset):
    """Images of 2x2 pixels whose first three bytes are the factors."""

    def __init__(self, **options):
        super().__init__(SPACE, **options)

    def images(self, rows):
        pixels = np.zeros((len(rows), 2, 2, 3), np.uint8)
        pixels[:, 0, 0] = 40 * self.space.factors_of(rows)
        return pixels


class Reader(pl.LightningModule):
    """Three scalar units; with every step each is less mixed with the next."""

    monitor = None
    latent_shape = (1, 2, 2)

    def __init__(self, width=1, best_at=4):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.width, self.best_at = width, best_at
        self.unit_names = None
        self.latent_unit = 3
        self.sanity_checked = False

    def encode_representation(self, batch):
        units = batch["image"][:, 0, 0].float() / 40
        mixed = abs(self.global_step - self.best_at) / 4
        units = units + mixed * units.roll(1, dims=1)
        if self.width == 1:
            return units
        direction = torch.linspace(1, 2, self.width)
        return units.unsqueeze(2) * direction + 0.001 * torch.randn(len(units), 3, self.width)

    def encode_units(self, images):
        raise NotImplementedError

    decode_units = encode_units

    def training_step(self, batch, batch_idx):
        self.noise = torch.rand(1)
        return self.weight.square().sum()

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", torch.zeros(1))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(tmp_path, model=None, steps=6, ckpt_path=None, callbacks=(), **options):
    options = {"every_n_train_steps": 2, "metrics": ["factor_vae", "mig"], "settings": SETTINGS, **options}
    scores = ScoreWhileTraining(**options)
    data = {"target": "test_train_scores.Grid"}
    trainer = pl.Trainer(
        max_steps=steps,
        default_root_dir=str(tmp_path),
        callbacks=[scores, *callbacks],
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        plugins=[AtomicCheckpointIO()],
    )
    model = model or Reader()
    trainer.fit(model, DataModuleFromConfig(8, train=data, validation=data), ckpt_path=ckpt_path, weights_only=True)
    return scores, trainer, model


def rows_of(tmp_path):
    with open(tmp_path / "scores.csv", newline="") as stream:
        return list(csv.DictReader(stream))


class Watch(pl.Callback):
    """Keeps what other callbacks can monitor."""

    def __init__(self):
        self.seen = {}

    def on_train_batch_start(self, trainer, *_):
        value = trainer.callback_metrics.get("val/factor_vae_score")
        self.seen[trainer.global_step] = None if value is None else round(float(value), 6)


def test_scores_on_schedule_and_the_best_is_kept(tmp_path):
    watch = Watch()
    scores, trainer, model = fit(tmp_path, callbacks=[watch], baseline=True)
    rows = rows_of(tmp_path)
    assert [row["step"] for row in rows] == ["2", "4", "6"]
    assert float(rows[1]["factor_vae"]) == 1.0 and float(rows[1]["mig"]) > 0.9
    assert float(rows[0]["mig"]) < float(rows[1]["mig"]) > float(rows[2]["mig"])
    assert scores.best["mig"] == {"score": pytest.approx(float(rows[1]["mig"])), "step": 4}
    kept = torch.load(tmp_path / "checkpoints" / "best_mig.ckpt", weights_only=True)
    assert kept["global_step"] == 4
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["mig_fast_best_step"] == 4
    assert results["mig_fast_last"] == pytest.approx(float(rows[2]["mig"]))
    assert results["mig_fast_pixel_pca"] > 0
    assert (tmp_path / "scores.png").stat().st_size > 5000
    assert watch.seen[3] == watch.seen[2] is not None  # what a monitor sees after the step that was scored
    assert len(model.unit_names) == 3
    assert model.training


def test_last_step_is_scored_though_off_schedule_and_by_the_final_protocol(tmp_path):
    fit(tmp_path, steps=3, final_protocol="fast", metrics=["mig"], settings={}, keep_best=False)
    assert [row["step"] for row in rows_of(tmp_path)] == ["2", "3"]
    final = json.loads((tmp_path / "metrics_sin" / "3.json").read_text())
    assert final["MIG"]["discrete_mig"] == pytest.approx(float(rows_of(tmp_path)[1]["mig"]))
    assert not list((tmp_path / "checkpoints").glob("best*"))


def test_training_is_not_disturbed(tmp_path):
    noises = []
    for folder, every in (("often", 1), ("never", 1000)):
        torch.manual_seed(0)
        _, _, model = fit(
            tmp_path / folder, Reader(width=3), steps=4, every_n_train_steps=every, metrics=["mig"], settings={}
        )
        noises.append(model.noise)
    assert torch.equal(*noises)


def test_resumed_run_goes_on_with_curve_and_best(tmp_path):
    fit(tmp_path, steps=4, metrics=["mig"], settings={})
    assert [row["step"] for row in rows_of(tmp_path)] == ["2", "4"]
    checkpoint = tmp_path / "checkpoints" / "best_mig.ckpt"
    scores, _, _ = fit(tmp_path, Reader(), steps=8, ckpt_path=str(checkpoint), metrics=["mig"], settings={})
    assert [row["step"] for row in rows_of(tmp_path)] == ["2", "4", "6", "8"]
    assert scores.best["mig"]["step"] == 4
    seconds = [float(row["seconds"]) for row in rows_of(tmp_path)]
    assert seconds == sorted(seconds)


def test_vector_units_are_reduced(tmp_path):
    model = Reader(width=4).eval()
    model.best_at = 0
    rows = RowEncoder(model, Grid(split=None), batch_size=50)
    wanted = np.array([5, 3, 5, 119])
    units = rows(wanted)
    assert units.shape == (4, 3) and np.array_equal(units[0], units[2])
    factors = SPACE.factors_of(np.arange(120))
    for unit in range(3):
        correlation = np.corrcoef(rows(np.arange(120))[:, unit], factors[:, unit])[0, 1]
        assert abs(correlation) > 0.999
    assert name_by_information(rows) == ["hue", "size", "side"]


def test_evaluating_restores_mode_and_random_state():
    module = torch.nn.Dropout()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    with evaluating(module):
        assert not module.training
        torch.rand(5)
    assert module.training and torch.equal(torch.rand(2), expected)


def test_curve_forgets_what_comes_after_the_resumed_step(tmp_path):
    metrics = select_metrics("fast", ["mig", "unsupervised"])
    curve = ScoreCurve(tmp_path, metrics)
    for step in (10, 20, 30):
        curve.add(step, step / 2, {"mig": 0.1, "unsupervised": step / 100})
    again = ScoreCurve(tmp_path, metrics)
    again.continue_from(20)
    assert [row["step"] for row in again.rows] == [10, 20] and again.seconds == 10.0
    again.continue_from(0)
    assert again.rows == []


def test_best_of_a_score_follows_its_direction(tmp_path, monkeypatch):
    drawn = {}
    chart = "ldm.evaluation.train_scores.curve.score_chart"
    monkeypatch.setattr(chart, lambda steps, curves, best, *_: drawn.update(best))
    curve = ScoreCurve(tmp_path, select_metrics("fast", ["mig", "unsupervised"]))
    curve.add(1, 1.0, {"mig": 0.1, "unsupervised": 0.4})
    curve.add(2, 2.0, {"mig": 0.2, "unsupervised": 0.5})
    curve.draw({}, "")
    assert drawn == {"MIG": 1, "MI (low)": 0}


class NoUnits(Reader):
    """A model without a representation."""

    encode_representation = property()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"every_n_train_steps": 1, "split": "test"}, "'validation' or 'train'"),
        ({"every_n_train_steps": 1, "metrics": ["mig"], "settings": {"dci": {}}}, "'dci'"),
        ({"every_n_train_steps": 1, "protocol": "quick"}, "quick"),
    ],
)
def test_options_that_cannot_be(options, words):
    with pytest.raises(ConfigError, match=words):
        ScoreWhileTraining(**options)


def test_requirements_are_checked_before_the_first_step(tmp_path):
    with pytest.raises(UserError, match="encode_representation"):
        fit(tmp_path, NoUnits())
    model = Reader()
    model.eval_space = FactorSpace(("a", "b"), (2, 2))
    with pytest.raises(UserError, match="eval_name"):
        fit(tmp_path, model)
    with pytest.raises(UserError, match="known factors"):
        RowEncoder(model, [1, 2, 3])
