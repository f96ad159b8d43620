"""The edit score of data sets with held-out, missing and unknown combinations; its ceiling and its requirements."""

from __future__ import annotations

import csv
import json
import logging

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image

from ldm.data.formats.folder import ImageFolder
from ldm.data.module import DataModuleFromConfig
from ldm.data.vocabulary import AttributeVocabulary
from ldm.data.world import World3D
from ldm.diffusion.conditions import TensorCondition
from ldm.evaluation.editing.callback import EditScore
from ldm.evaluation.editing.editor import build_editor, check_needs
from ldm.evaluation.editing.measure import choose_guidance, edit_grid, edit_score, plan_edits, summarise_edits
from ldm.evaluation.editing.truth import TruePictures, first_of_each
from ldm.models.judge import AttributeJudge
from ldm.util import ConfigError, UserError

WORDS = {"hue": ["amber", "blue", "coral", "dun"], "size": ["large", "small"], "mood": ["calm", "wild"]}
LATENT = (1, 4, 4)


def draw(folder, rows):
    """Write 16-pixel images whose three channels are the numbers of the words, and their table."""
    folder.mkdir()
    with open(folder / "table.csv", "w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(["path", *WORDS])
        for number, row in enumerate(rows):
            level = [words.index(entry) * 60 if entry else 0 for words, entry in zip(WORDS.values(), row)]
            Image.new("RGB", (16, 16), tuple(level)).save(folder / f"{number:03d}.png")
            table.writerow([f"{number:03d}.png", *row])
    return {"path": str(folder), "attributes": str(folder / "table.csv"), "image_size": 16}


def rows_of(skip=(), copies=1, sizes=("large", "small")):
    every = [(hue, size, mood) for hue in WORDS["hue"] for size in sizes for mood in WORDS["mood"]]
    return [row for number, row in enumerate(every) if number not in skip] * copies


def read(images):
    """Judge the images of ``draw``."""
    return ((images.mean(dim=(2, 3)) + 1) * 127.5 / 60).round().long()


def paint(dataset):
    """Return an editor that draws the images of texts."""
    phrases = [
        {dataset.vocabulary.phrases(k, w)[0]: w for w in range(len(words))}
        for k, words in enumerate(dataset.vocabulary.words)
    ]

    def edit(texts, x_T):
        values = torch.tensor([[own[text] for own, text in zip(phrases, row)] for row in texts])
        return (values * 60 / 127.5 - 1)[..., None, None].expand(-1, -1, 16, 16)

    return edit


@pytest.fixture
def pictures(tmp_path):
    return ImageFolder(**draw(tmp_path / "pictures", rows_of(copies=3)), holdout=0.25)


def test_anchors_are_held_out_and_neighbours_lead_to_them(pictures):
    truth = TruePictures(pictures, read)
    plans = truth.plans(LATENT, 100, seed=0)
    assert list(plans) == ["_unseen", "_seen"]
    for group, plan in plans.items():
        assert (pictures.is_unseen(plan.factors) == (group == "_unseen")).all() and plan.is_reversed
        counts = np.unique(plan.factors, axis=0, return_counts=True)[1]
        assert counts.max() - counts.min() <= 1  # combinations in turn
        for row, k in enumerate(plan.units):
            changed = plan.edited_words(row) != plan.words
            assert changed[:, k].all() and changed.sum() == 100
    result = edit_score(paint(pictures), read, plans["_unseen"], 32)
    assert result.edit_accuracy == result.all_right == 1 and result.edit_leakage == 0
    assert truth.ceiling(plans["_seen"]).to_dict() == edit_score(paint(pictures), read, plans["_seen"], 32).to_dict()


def test_the_figures_of_reversed_edits_are_those_of_anchors(pictures):
    plan = TruePictures(pictures, read).plans(LATENT, 8, seed=0)["_unseen"]
    base, edited = plan.words.copy(), np.stack([plan.edited_words(row) for row in range(3)])
    base[:2, 0] = (base[:2, 0] + 1) % 4  # two anchors have the wrong hue, also in the eyes of their neighbours
    result = summarise_edits(plan, base, edited)
    assert np.diag(result.matrix).tolist() == [0.75, 1, 1] and result.all_right == 0.75
    assert result.matrix[1, 0] == result.matrix[2, 0] == 0.25 and result.matrix[0, 1] == 0
    figures = result.figures("_unseen")
    assert figures["edit_accuracy_hue_unseen"] == 0.75 and figures["all_right_unseen"] == 0.75
    assert set(figures) == {
        f"{name}_unseen"
        for name in ("edit_accuracy", "edit_leakage", "all_right")
        + tuple(f"edit_{figure}_{attribute}" for figure in ("accuracy", "leakage") for attribute in WORDS)
    }


def test_errors_between_neighbouring_words(pictures):
    plan = plan_edits(pictures.vocabulary, LATENT, 40, seed=0)
    edited = np.stack([plan.edited_words(row) for row in range(3)])
    right = summarise_edits(plan, plan.words, edited).to_dict({"hue": WORDS["hue"]})
    assert right["edit_neighbour_errors_hue"] is None and "edit_neighbour_errors_size" not in right
    edited[0, :10, 0] = np.where(plan.asked[0, :10] < 3, plan.asked[0, :10] + 1, 2)  # next to the requested word
    far = np.flatnonzero((plan.asked[0] == 0) & (np.arange(40) >= 10))
    edited[0, far, 0] = 2
    report = summarise_edits(plan, plan.words, edited).to_dict({name: WORDS[name] for name in ("hue", "size")})
    assert len(far) and report["edit_neighbour_errors_hue"] == pytest.approx(10 / (10 + len(far)), abs=1e-6)
    assert report["edit_neighbour_errors_size"] is None
    other = summarise_edits(plan, plan.words, edited).neighbour_errors("hue", [WORDS["hue"][k] for k in (0, 2, 1, 3)])
    assert other != report["edit_neighbour_errors_hue"]


def test_incomplete_grids_are_edited_from_existing_combinations(tmp_path):
    dataset = ImageFolder(**draw(tmp_path / "part", rows_of(skip=(0, 3, 10))))
    truth = TruePictures(dataset, read)
    plan = truth.plans(LATENT, 26, seed=0)[""]
    existing = {tuple(row) for row in dataset.attribute_values(np.arange(13)).tolist()}
    assert {tuple(row) for row in plan.factors.tolist()} == existing and not plan.is_reversed
    ceiling = truth.ceiling(plan)
    pairs = sum(tuple(words) in existing for row in range(3) for words in plan.edited_words(row).tolist())
    assert (
        ceiling.num_samples == 26
        and ceiling.num_edits == pairs < 3 * 26
        and ceiling.edit_accuracy == 1
        and ceiling.edit_leakage == 0
    )
    missing = truth.rows(np.array([[0, 0, 0]]))
    assert missing.tolist() == [-1] and (truth.images(missing) == -1).all()


def test_a_full_grid_keeps_its_draws(tmp_path):
    dataset = ImageFolder(**draw(tmp_path / "full", rows_of()))
    found, expected = TruePictures(dataset, read).plans(LATENT, 9, 3)[""], plan_edits(dataset.vocabulary, LATENT, 9, 3)
    for name in ("factors", "words", "asked"):
        assert np.array_equal(getattr(found, name), getattr(expected, name))


def test_draws_of_the_world():
    plan = plan_edits(World3D(limit=1).vocabulary, LATENT, 3, seed=0)
    random_state = np.random.RandomState(0)
    assert plan.factors.T.tolist() == [random_state.randint(size, size=3).tolist() for size in (10, 10, 10, 8, 4, 15)]
    assert plan.units.tolist() == list(range(6)) and not plan.is_reversed


def test_unknown_cells_and_single_words(tmp_path, caplog):
    rows = [("amber", "", "calm"), *rows_of(skip=(0, 1), sizes=["large"])] * 2
    dataset = ImageFolder(**draw(tmp_path / "holes", rows))
    truth = TruePictures(dataset, read)
    with caplog.at_level(logging.WARNING):
        plan = truth.plans(LATENT, 12, seed=0)[""]
    assert "single word are not edited: size" in caplog.text
    assert plan.units.tolist() == [0, 2] and (plan.factors >= 0).all()
    result = edit_score(paint(dataset), read, plan, 5)
    assert result.factor_names == ("hue", "mood") and result.matrix.tolist() == [[1, 0], [0, 1]]
    assert len(edit_grid(paint(dataset), plan, 2).rows) == 3
    accuracy, count = truth.judge_accuracy()
    assert count == 1 and (accuracy[~np.isnan(accuracy)] == 1).all() and accuracy[0] == 1


def test_no_picture_with_all_attributes(tmp_path):
    rows = [("amber", "", "calm"), ("", "small", "wild")] * 5
    dataset = ImageFolder(**draw(tmp_path / "holes", rows))
    with pytest.raises(UserError, match="attributes are all known, got none"):
        TruePictures(dataset, read).plans(LATENT, 4, seed=0)


def test_first_of_each():
    rows = np.random.default_rng(0).integers(0, 3, (200, 3))
    expected, first = np.unique(rows, axis=0, return_index=True)
    assert np.array_equal(first_of_each(rows), first) and np.array_equal(rows[first], expected)
    assert len(first_of_each(np.zeros((0, 3), dtype=np.int64))) == 0


def test_the_grid_starts_with_true_pictures(pictures):
    truth = TruePictures(pictures, read)
    plan = truth.plans(LATENT, 6, seed=0)["_unseen"]
    grid = edit_grid(paint(pictures), plan, 4, true=truth.images(truth.rows(plan.words[:4])))
    assert grid.rows[:2] == ["pictures of the data set", "as in the text above"] and len(grid.rows) == 5
    assert torch.equal(read(grid.images[:4]), torch.from_numpy(plan.words[:4]))
    assert torch.allclose(grid.images[:4], grid.images[4:8], atol=1e-2)


def test_the_best_guidance():
    class Result:
        def __init__(self, accuracy, leakage):
            self.edit_accuracy, self.edit_leakage = accuracy, leakage

    figures = {1.0: Result(0.5, 0.1), 2.0: Result(0.8, 0.2), 4.0: Result(0.9, 0.5)}
    best, curve = choose_guidance(figures.get, [1.0, 2.0, 4.0])
    assert best == 2.0 and curve[2] == {"guidance_scale": 4.0, "edit_accuracy": 0.9, "edit_leakage": 0.5}
    assert choose_guidance(lambda scale: Result(scale, float("nan")), [1.0, 2.0])[0] == 2.0


class Captioned(pl.LightningModule):
    """A model that is sampled from one text, and trained without being changed; it draws more with more guidance."""

    latent_shape = LATENT
    steps = 0

    def __init__(self):
        super().__init__()
        self.level = torch.nn.Parameter(torch.zeros(1))

    def condition_from_texts(self, texts):
        self.texts = list(texts)
        return TensorCondition(torch.zeros(len(texts), 1))

    def sample(self, x_T, cond=None, sampler=None, guidance_scale=1.0):
        self.guidance_scale = guidance_scale
        return x_T

    def decode_first_stage(self, z):
        words = [[WORDS[name].index(part) for name, part in zip(WORDS, text.split(", "))] for text in self.texts]
        level = (torch.tensor(words) * (60 if self.guidance_scale == 2 else 0)) / 127.5 - 1
        return level[..., None, None].expand(-1, -1, 16, 16)

    def training_step(self, batch, batch_idx):
        self.steps += 1
        return self.level.sum()

    def test_step(self, batch, batch_idx):
        return None

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_texts_are_joined_to_captions_and_guided(pictures):
    model = Captioned()
    edit = build_editor(model, pictures.vocabulary, sampler=None, guidance_scale=2)
    images = edit([["blue", "large", "calm"], ["dun", "small", "wild"]], torch.zeros(2, *LATENT))
    assert model.texts == ["blue, large, calm", "dun, small, wild"] and model.guidance_scale == 2
    assert read(images).tolist() == [[1, 0, 0], [3, 1, 1]]


def save_judge(path, vocabulary, **options):
    options = {"image_size": 16, "channels": 4, "hidden": 8} | options
    judge = AttributeJudge(vocabulary=vocabulary.to_dict(), **options)
    torch.save({"hyper_parameters": dict(judge.hparams), "state_dict": judge.state_dict()}, path)
    return str(path)


def fit(tmp_path, params, model, **options):
    """Train a model for a step with the callback, and test it."""
    section = {"target": "ldm.data.formats.folder.ImageFolder", "params": params}
    data = DataModuleFromConfig(2, train=section, test=section, num_workers=0)
    callback = EditScore(**{"num_samples": 6, "batch_size": 4, "columns": 2, **options})
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = pl.Trainer(**quiet, callbacks=[callback], default_root_dir=tmp_path, max_steps=1)
    trainer.fit(model, data)
    built = data.datasets["test"]
    trainer.test(model, data, verbose=False)
    assert data.datasets["test"] is built


def test_a_run_reports_groups_ceiling_and_guidance(tmp_path, monkeypatch):
    params = draw(tmp_path / "pictures", rows_of(copies=3)) | {"holdout": 0.25, "text": "caption"}
    judge = save_judge(tmp_path / "judge.ckpt", ImageFolder(**params).vocabulary)
    monkeypatch.setattr(AttributeJudge, "predict_values", lambda self, images: read(images))
    options = {"guidance_scale": [1.0, 2.0], "num_guidance_samples": 5, "ordered": {"hue": WORDS["hue"][::-1]}}
    fit(tmp_path / "run", params, Captioned(), judge=judge, **options)
    report = json.loads((tmp_path / "run" / "edit_score" / "1.json").read_text())
    assert report["sampler"]["guidance_scale"] == 2 and len(report["sampler"]["guidance_curve"]) == 2
    assert report["edit_accuracy"] == report["groups"]["unseen"]["edit_accuracy"] == 1
    assert report["groups"]["seen"]["ceiling"]["all_right"] == 1 and "edit_neighbour_errors_hue" in report
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    attributes = [f"{name}_{attribute}" for name in ("edit_accuracy", "edit_leakage") for attribute in WORDS]
    for name in ("edit_accuracy", "edit_leakage", "all_right", *attributes):
        assert results[name] == results[f"{name}_unseen"] and f"{name}_seen" in results
    assert results["edit_accuracy_ceiling"] == 1 and results["edit_leakage_ceiling"] == 0
    assert results["edit_accuracy_chance"] == pytest.approx((0.25 + 0.5 + 0.5) / 3, abs=1e-6)


def test_unknown_accuracy_of_the_judge(tmp_path, monkeypatch):
    """No attribute of the validation images is known."""
    params = draw(tmp_path / "pictures", rows_of(copies=3)) | {"text": "caption"}
    judge = save_judge(tmp_path / "judge.ckpt", ImageFolder(**params).vocabulary)
    monkeypatch.setattr(TruePictures, "judge_accuracy", lambda self: (np.full(3, np.nan), 4))
    fit(tmp_path / "run", params, Captioned(), judge=judge)
    assert json.loads((tmp_path / "run" / "results.json").read_text())["judge_accuracy"] is None


def test_a_judge_of_other_attributes_is_refused_before_the_first_step(tmp_path):
    params = draw(tmp_path / "pictures", rows_of(copies=3))
    other = AttributeVocabulary(["hue", "size"], [["a", "b"], ["c", "d"]], [[0, 1], [0, 1]], [["{}"], ["{}"]])
    model = Captioned()
    judge = save_judge(tmp_path / "judge.ckpt", other)
    expected = r"hue \(4 values\), size \(2 values\), mood \(2 values\); got hue \(2 values\), size \(2 values\)"
    with pytest.raises(UserError, match=expected):
        fit(tmp_path / "run", params, model, judge=judge)
    assert model.steps == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"judge": "nowhere"}, "checkpoint of a factor judge"),
        ({"image_size": 8}, "8 x 8 pixels, got 16 x 16"),
        ({"ordered": {"shade": []}}, "expected one of hue, size, mood; got 'shade'"),
        ({"ordered": {"size": ["small"]}}, "EditScore.ordered.size: expected the words"),
        ({"ordered": {"size": [1, "small"]}}, "EditScore.ordered.size: expected the words .* got 1, small"),
        ({"words": True}, "the words .*amber.*got the words"),
        ({"skip": range(8)}, "at least 10 images"),
        ({"plain": True}, "with a vocabulary, got ImageFolder"),
        ({"model": pl.LightningModule()}, "lacks latent_shape, latent_unit, sample_edit"),
    ],
)
def test_requirements_are_checked_before_training(tmp_path, options, message):
    params = draw(tmp_path / "pictures", rows_of(skip=options.pop("skip", ())))
    vocabulary = ImageFolder(**params).vocabulary
    if options.pop("words", False):
        state = vocabulary.to_dict()
        state["words"][0].reverse()
        vocabulary = AttributeVocabulary.from_dict(state)
    size = {"image_size": options.pop("image_size", 16)}
    params = {key: params[key] for key in ("path", "image_size")} if options.pop("plain", False) else params
    model = options.pop("model", None) or Captioned()
    options = {"judge": save_judge(tmp_path / "judge.ckpt", vocabulary, **size)} | options
    if type(model) is pl.LightningModule:
        with pytest.raises(UserError, match=message):
            check_needs(ImageFolder(**params), model, AttributeJudge(vocabulary.to_dict(), image_size=16), {})
        return
    with pytest.raises((UserError, ConfigError), match=message):
        fit(tmp_path / "run", params, model, **options)
    assert model.steps == 0


def test_the_check_before_training_draws_no_random_numbers(tmp_path):
    params = draw(tmp_path / "pictures", rows_of(copies=2))
    section = {"target": "ldm.data.formats.folder.ImageFolder", "params": params}
    callback = EditScore(save_judge(tmp_path / "judge.ckpt", ImageFolder(**params).vocabulary))
    trainer = pl.Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path)
    trainer.datamodule = DataModuleFromConfig(2, test=section, num_workers=0)  # set by trainer.fit otherwise
    torch.manual_seed(3)
    state = torch.get_rng_state()
    callback.on_train_start(trainer, Captioned())
    assert torch.equal(state, torch.get_rng_state()) and "test" in trainer.datamodule.datasets


def test_guidance_scales_are_needed():
    with pytest.raises(ConfigError, match="guidance_scale"):
        EditScore("judge", guidance_scale=[])


def test_the_ceiling_prefers_pictures_that_were_not_trained_on(tmp_path):
    dataset = ImageFolder(**draw(tmp_path / "copies", rows_of(copies=20)))
    truth, kept_out = TruePictures(dataset, read), set(dataset.rows_of("validation").tolist())
    combinations = dataset.attribute_values(np.arange(16))
    available = {tuple(row) for row in dataset.attribute_values(np.array(sorted(kept_out))).tolist()}
    rows = truth.rows(combinations)
    assert available and len(available) < 16
    for row, combination in zip(rows.tolist(), combinations.tolist()):
        assert (row in kept_out) == (tuple(combination) in available)
