"""The factor judge: shapes, its checkpoint, its figures, and that it learns the embedded world."""

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from ldm.data.world import World3D, world_vocabulary
from ldm.models.judge import AttributeJudge, load_judge, soften
from ldm.util import ConfigError, UserError

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}


def loader(split, limit, batch_size=32):
    return DataLoader(World3D(split=split, limit=limit), batch_size=batch_size, collate_fn=lambda batch: batch)


def small_judge(**options):
    return AttributeJudge(**{"space": "shapes3d", "channels": 4, "hidden": 16} | options)


@pytest.mark.parametrize("image_size", [8, 13, 16, 32, 40, 64])
def test_predicts_one_value_per_factor(image_size):
    judge = small_judge(space="mpi3d", image_size=image_size).eval()
    values = judge.predict_values(torch.rand(3, 3, image_size, image_size) * 2 - 1)
    assert values.shape == (3, 7) and values.dtype == torch.int64
    assert (values < torch.tensor(judge.sizes)).all()


def test_factors_of_a_data_set_without_a_published_space(tmp_path):
    judge = small_judge(space={"names": ["shape", "hue"], "sizes": [2, 4]}, image_size=16).eval()
    path = tmp_path / "judge.ckpt"
    torch.save({"hyper_parameters": dict(judge.hparams), "state_dict": judge.state_dict()}, path)
    images = torch.rand(3, 3, 16, 16) * 2 - 1
    assert torch.equal(load_judge(path).predict_values(images), judge.predict_values(images))
    assert judge.predict_values(images).shape == (3, 2)


def test_other_sizes_are_refused():
    with pytest.raises(ValueError, match="64, 64"):
        small_judge(image_size=32).predict_values(torch.zeros(1, 3, 64, 64))
    with pytest.raises(UserError, match="image_size"):
        small_judge(image_size=32).get_input({"image": torch.zeros(1, 64, 64, 3)})
    with pytest.raises(ConfigError, match="at least 8 pixels, got 7"):
        small_judge(image_size=7)
    with pytest.raises(ConfigError, match="got neither"):
        AttributeJudge()
    with pytest.raises(ConfigError, match="got both"):
        small_judge(vocabulary=world_vocabulary().to_dict())


def test_softening_is_mild_and_follows_the_global_seed():
    images = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    torch.manual_seed(1)
    first = soften(images)
    torch.manual_seed(1)
    assert torch.equal(first, soften(images))
    assert first.shape == images.shape and first.abs().max() <= 1
    flat = torch.full((64, 3, 16, 16), 0.3)
    assert (soften(flat) - flat).mean(dim=(1, 2, 3)).abs().max() < 0.2


def test_training_testing_and_loading_back(tmp_path):
    judge = small_judge()
    trainer = pl.Trainer(max_steps=3, default_root_dir=tmp_path, **QUIET)
    trainer.fit(judge, loader("train", 96), loader("validation", 32))
    (figures,) = trainer.test(judge, loader("validation", 50), verbose=False)
    assert 0 <= figures["figure/judge_value_accuracy"] <= figures["figure/judge_accuracy"] <= 1
    words = [figures[f"figure/judge_accuracy_{name}"] for name in judge.names]
    assert sum(words) / 6 == pytest.approx(figures["figure/judge_accuracy"])

    trainer.save_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    loaded = load_judge(tmp_path)
    assert not loaded.training and not any(weight.requires_grad for weight in loaded.parameters())
    images = torch.rand(4, 3, 32, 32) * 2 - 1
    assert torch.equal(loaded.predict_values(images), judge.eval().predict_values(images))


def test_the_cosine_needs_an_end(tmp_path):
    trainer = pl.Trainer(max_steps=-1, max_epochs=-1, default_root_dir=tmp_path, **QUIET)
    with pytest.raises(ConfigError, match="max_steps"):
        trainer.fit(small_judge(), loader("train", 32))


def test_what_is_not_a_judge_is_refused_with_its_path(tmp_path):
    with pytest.raises(UserError, match="judge.yaml"):
        load_judge(tmp_path)
    (tmp_path / "damaged.ckpt").write_bytes(b"not a zip")
    with pytest.raises(UserError, match="damaged.ckpt"):
        load_judge(tmp_path / "damaged.ckpt")
    torch.save({"hyper_parameters": {"space": "shapes3d"}, "state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(UserError, match="other.ckpt"):
        load_judge(tmp_path / "other.ckpt")


@pytest.mark.slow
def test_learns_the_world_in_seconds(tmp_path):
    pl.seed_everything(0)
    judge = AttributeJudge(space="shapes3d")
    trainer = pl.Trainer(max_steps=200, default_root_dir=tmp_path, **QUIET)
    trainer.fit(judge, loader("train", 200 * 64, batch_size=64))
    (figures,) = trainer.test(judge, loader("validation", None, batch_size=500), verbose=False)
    assert figures["figure/judge_accuracy"] > 0.97
