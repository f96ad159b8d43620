"""Earlier names of the models of attributes: configs, options and checkpoints keep their meaning."""

from __future__ import annotations

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from ldm.data.world import World3D, world_vocabulary
from ldm.models.clip import AttributeCLIP
from ldm.models.judge import AttributeJudge, load_judge
from ldm.util import instantiate_from_config

CLIP = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "patch_size": 8, "head_width": 8},
    "text_cfg": {"width": 16, "heads": 2, "layers": 1},
}


@pytest.mark.parametrize("params", [{}, {"vocabulary": {"target": "ldm.data.world.world_vocabulary"}}])
def test_a_clip_without_a_vocabulary_is_one_of_the_world(params):
    model = instantiate_from_config({"target": "ldm.models.clip.WorldCLIP", "params": {**CLIP, **params}})
    assert type(model) is AttributeCLIP and model.vocabulary == world_vocabulary()


@pytest.mark.parametrize(
    ("params", "names"),
    [
        ({}, world_vocabulary().factor_names),
        ({"space": "mpi3d"}, None),
        ({"space": {"names": ["hue", "size"], "sizes": [3, 2]}}, ("hue", "size")),
    ],
)
def test_a_judge_of_a_space(params, names):
    target = "ldm.models.judge.FactorJudge"
    judge = instantiate_from_config({"target": target, "params": {"channels": 4, "hidden": 8, **params}})
    assert type(judge) is AttributeJudge and judge.vocabulary is None
    assert names is None or tuple(judge.names) == names


def test_a_checkpoint_with_a_space_gives_the_words_of_the_test_data(tmp_path):
    torch.manual_seed(0)
    judge = AttributeJudge(space="shapes3d", channels=4, hidden=8)
    options = {"space": "shapes3d", "image_size": 32, "channels": 4, "hidden": 8, "weight_decay": 0.05}
    state = {"hyper_parameters": {**options, "image_key": "image"}, "state_dict": judge.state_dict()}
    torch.save(state, tmp_path / "judge.ckpt")
    loaded, world = load_judge(tmp_path / "judge.ckpt"), World3D(split="validation", limit=40)
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    loader = DataLoader(world, batch_size=20, collate_fn=lambda batch: batch)
    (figures,) = trainer.test(loaded, loader, verbose=False)
    images = torch.from_numpy(world.images(world.rows)).permute(0, 3, 1, 2) / 127.5 - 1
    guesses, truth = loaded.predict_values(images).numpy(), world.space.factors_of(world.rows)
    words = world.vocabulary.word_labels
    assert figures["figure/judge_value_accuracy"] == pytest.approx((guesses == truth).mean())
    assert figures["figure/judge_accuracy"] == pytest.approx((words(guesses) == words(truth)).mean())


@pytest.mark.parametrize("target", ["ldm.data.world.World3D", "ldm.data.world.dataset.World3D"])
def test_unseen_share_is_the_holdout(target):
    params = {"split": "validation", "limit": 50}
    before = instantiate_from_config({"target": target, "params": {**params, "unseen_share": 0.2}})
    today = World3D(**params, holdout=0.2)
    assert before.holdout == 0.2 and np.array_equal(before.rows, today.rows)
