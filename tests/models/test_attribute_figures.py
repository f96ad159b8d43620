"""Figures of CLIP and judge: unknown values, held-out combinations, batches of users, two processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset

from ldm.data.vocabulary import AttributeVocabulary
from ldm.models.attribute_accuracy import AttributeAccuracy
from ldm.models.clip import AttributeCLIP
from ldm.models.judge import AttributeJudge
from ldm.util import UserError

VOCABULARY = AttributeVocabulary(
    ["hue", "size", "mood"],
    [["red", "green", "blue"], ["small", "large"], ["calm", "wild"]],
    [[0, 1, 2], [0, 0, 1], [0, 1]],
    [["{} thing"], ["{} in size"], ["a {} one"]],
)
CLIP = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "patch_size": 8, "head_width": 8},
    "text_cfg": {"width": 16, "heads": 2, "layers": 1},
}
VALUES = np.array([[0, 0, -1], [1, -1, -1], [2, 2, -1], [-1, 1, -1], [-1, -1, -1], [1, 2, -1]])
KNOWN = (VALUES != -1).sum(axis=0)


class Cells(Dataset):
    """Random images with missing values; ``mood`` is never known."""

    def __init__(self, **entries):
        self.entries = {"attributes": torch.from_numpy(VALUES), **entries}

    def __len__(self):
        return len(VALUES)

    def __getitem__(self, index):
        image = torch.randint(0, 256, (16, 16, 3), generator=torch.Generator().manual_seed(index), dtype=torch.uint8)
        mask = torch.from_numpy(VALUES[index] != -1)
        text = VOCABULARY.caption(VOCABULARY.texts(VALUES[index : index + 1])[0])
        values = {name: entry[index] for name, entry in self.entries.items()}
        return {"image": image, "text": text, "caption_mask": mask, **values}


def build(kind):
    torch.manual_seed(0)
    if kind == "clip":
        return AttributeCLIP(**CLIP, vocabulary=VOCABULARY.to_dict())
    return AttributeJudge(vocabulary=VOCABULARY.to_dict(), image_size=16, channels=4, hidden=8)


def trainer(root, **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(default_root_dir=root, accelerator="cpu", enable_checkpointing=False, **quiet, **options)


@pytest.mark.parametrize("kind", ["clip", "judge"])
def test_missing_values_are_left_out_of_loss_and_figures(kind, tmp_path):
    model, data = build(kind), DataLoader(Cells(), batch_size=4)
    run = trainer(tmp_path, max_steps=2)
    run.fit(model, data, data)
    assert run.callback_metrics["train/loss"].isfinite()
    (figures,) = run.test(model, data, verbose=False)
    name = f"figure/{kind}_accuracy"
    assert {key for key in figures if key.startswith(name)} == {name, f"{name}_hue", f"{name}_size"}
    assert figures[name] == pytest.approx((figures[f"{name}_hue"] + figures[f"{name}_size"]) / 2)
    assert figures[f"{name}_hue"] * KNOWN[0] == pytest.approx(round(figures[f"{name}_hue"] * KNOWN[0]))


@pytest.mark.parametrize("kind", ["clip", "judge"])
def test_nothing_known(kind, tmp_path):
    model, nothing = build(kind), torch.full((len(VALUES), 3), -1)
    masked = Cells(attributes=nothing, caption_mask=torch.zeros(len(VALUES), 3, dtype=torch.bool))
    run = trainer(tmp_path, max_steps=1)
    run.fit(model, DataLoader(masked, batch_size=6), DataLoader(masked, batch_size=6))
    assert run.callback_metrics["train/loss"] == 0
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("kind", ["clip", "judge"])
def test_groups(kind, tmp_path):
    model, unseen = build(kind), torch.tensor([True, False, True, False, False, False])
    (figures,) = trainer(tmp_path).test(model, DataLoader(Cells(unseen=unseen), batch_size=4), verbose=False)
    name = f"figure/{kind}_accuracy"
    plain = {key for key in figures if key.startswith(name) and not key.endswith("seen")}
    assert plain == {name, f"{name}_hue", f"{name}_size"}
    assert all(figures[key] == figures[f"{key}_unseen"] and f"{key}_seen" in figures for key in plain)
    assert figures[f"{name}_hue_unseen"] in (0, 0.5, 1) and figures[f"{name}_size_unseen"] in (0, 0.5, 1)


def test_accuracy_counts():
    accuracy = AttributeAccuracy(["hue", "size"])
    hits = torch.tensor([[True, False], [True, True], [False, True]])
    accuracy.update(hits, torch.tensor([[True, True], [False, True], [True, False]]))
    assert accuracy.figures("a") == {"a": 0.5, "a_hue": 0.5, "a_size": 0.5}
    accuracy.reset()
    accuracy.update(hits, None, torch.tensor([True, False, False]))
    figures = accuracy.figures("a")
    assert figures["a_hue_unseen"] == figures["a_hue"] == 1 and figures["a_hue_seen"] == 0.5
    accuracy.reset()
    accuracy.update(hits, torch.zeros(3, 2, dtype=torch.bool))
    assert accuracy.figures("a") == {}


def batch_of(**entries):
    return {"image": torch.zeros(2, 16, 16, 3, dtype=torch.uint8), **entries}


@pytest.mark.parametrize("kind", ["clip", "judge"])
def test_factors_of_a_users_data_set_take_the_place_of_attributes(kind):
    model, factors = build(kind), torch.tensor([[2, 0, 1], [1, 2, 0]])
    expected = model.get_labels(batch_of(attributes=factors))
    assert torch.equal(model.get_labels(batch_of(factors=factors)), expected)
    assert torch.equal(model.get_labels(batch_of(attributes=factors, factors=factors[:, :1])), expected)
    with pytest.raises(UserError, match=r"'factors'\]: expected values of 3 attributes .hue: 0 to 2.*got values up to"):
        model.get_labels(batch_of(factors=factors + 1))
    with pytest.raises(UserError, match=r"'factors'\].*shape \(2, 2\).*data:vocabulary"):
        model.get_labels(batch_of(factors=factors[:, :2]))
    with pytest.raises(UserError, match=r"'attributes'\].*shape \(2, 2\)"):
        model.get_labels(batch_of(attributes=factors[:, :2], factors=factors))
    with pytest.raises(UserError, match="expected an entry 'attributes', got image"):
        model.get_labels(batch_of())


@pytest.mark.parametrize("kind", ["clip", "judge"])
def test_data_with_other_words_are_refused_before_the_first_step(kind, tmp_path):
    model, train, other, same = build(kind), Cells(), Cells(), Cells()
    state = VOCABULARY.to_dict()
    same.vocabulary = AttributeVocabulary.from_dict({**state, "templates": [["{}"], ["{}"], ["{}"]]})
    other.vocabulary = AttributeVocabulary.from_dict(
        {**state, "words": [["blue", "green", "red"], *state["words"][1:]]}
    )
    train, other, same = (DataLoader(data, batch_size=3) for data in (train, other, same))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserError, match="Cells: expected the attributes and words of the model, {'hue': .'red'.*got"):
        trainer(tmp_path, max_steps=1).fit(model, train, other)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(UserError, match="one table for the images of all splits"):
        trainer(tmp_path).test(model, other, verbose=False)
    trainer(tmp_path, max_steps=1).fit(model, train, same)
    trainer(tmp_path).test(model, same, verbose=False)


SCRIPT = """
import json, sys
import torch
sys.path[:0] = [{root!r}, {tests!r}]
torch.set_num_threads(1)
from test_attribute_figures import Cells, build, trainer, DataLoader
for kind in ("clip", "judge"):
    run = trainer({folder!r} + "/" + kind, strategy="ddp", devices=2)
    (figures,) = run.test(build(kind), DataLoader(Cells(unseen=torch.arange(6) < 2), batch_size=2), verbose=False)
    if run.is_global_zero:
        with open({folder!r} + f"/{{kind}}.json", "w") as stream:
            json.dump(figures, stream)
"""


@pytest.mark.slow
def test_two_processes_give_the_same_figures(tmp_path):
    tests, root = Path(__file__).parent, Path(__file__).parents[2]
    script = tmp_path / "run.py"
    script.write_text(SCRIPT.format(root=str(root), tests=str(tests), folder=str(tmp_path)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    for kind in ("clip", "judge"):
        data = DataLoader(Cells(unseen=torch.arange(6) < 2), batch_size=2)
        (expected,) = trainer(tmp_path).test(build(kind), data, verbose=False)
        assert json.loads((tmp_path / f"{kind}.json").read_text()) == pytest.approx(expected)
