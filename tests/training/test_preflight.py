"""Errors that are found before a run is created: data items, shapes, pictures, callbacks, monitors, memory."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import Dataset

import main as front_door
from ldm.data.module import DataModuleFromConfig
from ldm.models.diffusion.latent import LatentDiffusion
from ldm.training.preflight import resources
from ldm.training.preflight.trace import Batch, trace_steps

OWN = "test_preflight.OwnData"
UNET = {
    "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
    "params": {
        "image_size": 16,
        "in_channels": 3,
        "out_channels": 3,
        "model_channels": 32,
        "attention_resolutions": [2],
        "num_res_blocks": 1,
        "channel_mult": [1, 1],
        "num_heads": 2,
    },
}
DATA = {
    "target": "ldm.data.module.DataModuleFromConfig",
    "params": {"batch_size": 4, "num_workers": 0, "train": {"target": OWN}, "validation": {"target": OWN}},
}
PIXELS = {
    "model": {
        "base_learning_rate": 1e-4,
        "target": "ldm.models.diffusion.latent.LatentDiffusion",
        "params": {
            "timesteps": 20,
            "image_size": 16,
            "monitor": "val/loss_simple_ema",
            "first_stage_config": {"target": "ldm.models.autoencoder.IdentityFirstStage"},
            "cond_stage_config": "__is_unconditional__",
            "unet_config": UNET,
        },
    },
    "data": DATA,
    "lightning": {
        "logger": "csv",
        "scale_lr": False,
        "trainer": {"max_steps": 2, "accelerator": "cpu", "log_every_n_steps": 1},
        "callbacks": {"image_logger": {"params": {"batch_frequency": 50, "increase_log_steps": False}}},
    },
}
CLASSES = {
    "model": {
        "params": {
            "cond_stage_key": "class_label",
            "conditioning_key": "crossattn",
            "cond_stage_trainable": True,
            "cond_stage_config": {
                "target": "ldm.modules.encoders.modules.ClassEmbedder",
                "params": {"embed_dim": 8, "n_classes": 6, "key": "class_label"},
            },
            "unet_config": {"params": {"use_spatial_transformer": True, "transformer_depth": 1, "context_dim": 8}},
        }
    }
}
AUTOENCODER = {
    "model": {
        "base_learning_rate": 1e-4,
        "target": "ldm.models.autoencoder.VQModel",
        "params": {
            "embed_dim": 3,
            "n_embed": 16,
            "monitor": "val/rec_loss",
            "ddconfig": {
                "double_z": False,
                "z_channels": 3,
                "resolution": 16,
                "in_channels": 3,
                "out_ch": 3,
                "ch": 32,
                "ch_mult": [1, 1],
                "num_res_blocks": 1,
                "attn_resolutions": [],
                "dropout": 0.0,
            },
            "lossconfig": {
                "target": "ldm.modules.losses.vqperceptual.VQLPIPSWithDiscriminator",
                "params": {"disc_start": 0, "perceptual_weight": 0.0, "disc_ndf": 8, "disc_num_layers": 2},
            },
        },
    },
    "data": DATA,
    "lightning": PIXELS["lightning"],
}


class OwnData(Dataset):
    """Images in [-1, 1] and classes, in one of the forms in which data sets deliver them."""

    def __init__(self, form: str = "plain", label: Any = 5, size: int = 16, count: int = 12) -> None:
        self.form, self.label, self.size, self.count = form, label, size, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        image = (np.random.RandomState(index).rand(self.size, self.size, 3) * 2 - 1).astype(np.float32)
        if self.form == "error":
            return {"image": image, "class_label": [][index]}
        if self.form == "tuple":
            return image, self.label
        if self.form == "mixed" and index % 2:
            image = image[:8]
        if self.form == "nan" and index == 0 or self.form == "late nan" and index == 9:
            image[0, 0] = np.nan
        forms = {
            "first": lambda: image.transpose(2, 0, 1).copy(),
            "double": lambda: image.astype(np.float64),
            "list": lambda: image.tolist(),
            "bytes": lambda: ((image + 1) * 127.5).astype(np.uint8),
            "pillow": lambda: Image.fromarray(((image + 1) * 127.5).astype(np.uint8)),
            "palette": lambda: Image.fromarray(((image + 1) * 127.5).astype(np.uint8)).convert("P"),
            "levels": lambda: (image + 1) * 127.5,
            "integers": lambda: ((image + 1) * 127).astype(np.int64),
        }
        return {"image": forms.get(self.form, lambda: image)(), "class_label": self.label, "file_path_": f"f{index}"}


class Hooked(LatentDiffusion):
    """A method that changes batches while it trains."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Return the batch, flipped in training."""
        if self.trainer.training:
            batch = {**batch, "image": batch["image"].flip(2)}
        return super().on_before_batch_transfer(batch, dataloader_idx)


class Untraceable(LatentDiffusion):
    """A method whose step needs values."""

    def shared_step(self, batch: Any) -> Any:
        if float(batch["image"].float().mean()) > 1e6:
            raise AssertionError
        return super().shared_step(batch)


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Return a function that trains configs for two steps and returns exit code, error, and the new files."""
    monkeypatch.chdir(tmp_path)

    def run(*parts: dict[str, Any] | str, root: str = "logs") -> tuple[int, str, list[Path]]:
        words = [part for part in parts if isinstance(part, str)]
        for number, part in enumerate(part for part in parts if isinstance(part, dict)):
            Path(f"c{number}.yaml").write_text(json.dumps(part))
            words += ["-b", f"c{number}.yaml"]
        before = {path for path in tmp_path.rglob("*") if "__pycache__" not in path.parts}
        code = front_door.main([*words, "-t", "-l", root])
        after = [path for path in tmp_path.rglob("*") if path not in before and "__pycache__" not in path.parts]
        return code, capsys.readouterr().err, after

    return run


def refused(train, *parts: dict[str, Any] | str) -> str:
    """Return the error of a config that is refused in one line before anything is written."""
    code, error, files = train(*parts)
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert code == 1 and not files and len(lines) == 1 and error.endswith(f"{lines[0]}\n"), error
    return lines[0]


FORMS = ["plain", "first", "double", "list", "bytes", "pillow", "palette"]


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_images_whose_meaning_is_certain(train, form: str) -> None:
    code, error, _ = train(PIXELS, f"data.params.train.params.form={form}")
    assert code == 0, error


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("tuple", "expected a dict of entries such as 'image' for each image, got a tuple of 2"),
        ("mixed", r"'image' of one shape.*\(16, 16, 3\) of item 0 .*f0\) and \(8, 16, 3\) of item 1 .*f1\)"),
        ("levels", r"expected uint8 in \[0, 255\] or float in \[-1, 1\] in 'image', got torch.float32 from"),
        ("integers", r"expected uint8 in \[0, 255\] or float .*, got torch.int64 from"),
        ("nan", "expected finite numbers in 'image', got NaN"),
        ("error", r"IndexError: list index out of range \(test_preflight.py, line \d+\)"),
    ],
)
def test_items_that_cannot_be_used(train, form: str, message: str) -> None:
    for section in ("train", "validation"):
        error = refused(train, PIXELS, f"data.params.{section}.params.form={form}")
        assert re.search(f"data.params.{section}: .*{message}", error), error


@pytest.mark.parametrize(("label", "shown"), [(6, "6"), (-1, "-1"), (2.0, "2.0"), ("two", "'two'"), ([1], r"\[1\]")])
def test_class_labels(train, label: Any, shown: str) -> None:
    wrong = {"data": {"params": {"train": {"params": {"label": label}}}}}
    error = refused(train, PIXELS, CLASSES, wrong)
    assert "data.params.train: batch['class_label']: expected one integer class in [0, 6)" in error
    assert f"got {shown}".replace("\\", "") in error


UNET_KEY = "model.params.unet_config.params"


@pytest.mark.parametrize(
    ("base", "words", "message"),
    [
        (PIXELS, ["model.params.image_size=8"], "model.params.image_size: expected 16 x 16, the size of the images"),
        (PIXELS, ["model.params.channels=1"], "model.params.channels: expected the 3 channels of the data, got 1"),
        (PIXELS, [f"{UNET_KEY}.in_channels=4"], f"{UNET_KEY}.in_channels: expected 3, the channels of the data, got 4"),
        (PIXELS, [f"{UNET_KEY}.out_channels=6"], f"{UNET_KEY}.out_channels: expected 3, the channels of the data"),
        (PIXELS, ["data.params.validation.params.size=15"], "15 x 15"),
        (PIXELS, ["model.params.monitor=val/loss_simpel"], "got 'val/loss_simpel'. Did you mean 'val/loss_simple'?"),
        (PIXELS, ["model.params.monitor=train/loss_simpel"], "Did you mean 'train/loss_simple'?"),
        (PIXELS, ["lightning.trainer.val_check_interval=4"], "expected at most 3, the batches of an epoch, got 4"),
        (PIXELS, ["data.params.batch_size=13"], "expected at least one batch of 13 images, got 12 images"),
        (PIXELS, ["data.params.train.params.count=0"], "data.params.train: expected images, got an empty data set"),
        (AUTOENCODER, ["data.params.train.params.size=15"], "data.params.train: autoencoder: .* multiples of 2"),
        (AUTOENCODER, ["model.params.lossconfig.params.disc_num_layers=4"], "disc_num_layers: expected at most 2 for"),
        (AUTOENCODER, ["model.params.monitor=val/rec_los"], "Did you mean 'val/rec_loss'?"),
    ],
)
def test_shapes_monitors_and_epochs(train, base: dict[str, Any], words: list[str], message: str) -> None:
    error = refused(train, base, *words)
    assert message in error or re.search(message, error), error


PICTURES = "lightning.callbacks.image_logger.params.log_images_kwargs"


@pytest.mark.parametrize(
    ("base", "word", "message"),
    [
        (PIXELS, "N=-1", "N: expected an integer from 1 to 1000000, got -1"),
        (PIXELS, "n_row=0", "n_row: expected an integer from 1 to 1000000, got 0"),
        (PIXELS, "sample=[1]", "sample: expected true or false, got [1]"),
        (PIXELS, "plot_denoise_row=true", "plot_denoise_row: .* Did you mean 'plot_denoise_rows'?"),
        (PIXELS, "sampler={target: ldm.diffusion.samplers.DDIMSampler, params: {steps: 4}}", "steps"),
        (AUTOENCODER, "N=many", "N: expected an integer from 1 to 1000000, got 'many'"),
    ],
)
def test_options_of_pictures(train, base: dict[str, Any], word: str, message: str) -> None:
    error = refused(train, base, f"{PICTURES}.{word}")
    assert PICTURES in error and (message in error or re.search(message, error)), error


@pytest.mark.parametrize(
    ("word", "message"),
    [
        (f"{PICTURES}.sampler=ddim", f"{PICTURES}.sampler: sampler: expected num_steps between 2 and 20"),
        (f"{PICTURES}.ddim_eta=1.3", f"{PICTURES}.sampler: sampler: expected"),
        ("model.params.sampler=plms", "model.params.sampler: sampler: expected num_steps between 2 and 20"),
    ],
)
def test_samplers_of_pictures(train, word: str, message: str) -> None:
    error = refused(train, PIXELS, word, *([f"{PICTURES}.ddim_steps=5"] if "eta" in word else []))
    assert message in error and "command line" in error


def test_options_of_other_models_of_the_family_are_accepted(train) -> None:
    code, error, _ = train(PIXELS, f"{PICTURES}.plot_swapped_concepts=true", f"{PICTURES}.ddim_steps=4")
    assert code == 0, error
    code, error, _ = train(AUTOENCODER, f"{PICTURES}.plot_diffusion_rows=true", f"{PICTURES}.N=2")
    assert code == 0, error


def test_the_context_of_a_network_of_own_code(train) -> None:
    """The check of a config does not know the width of this condition."""
    own = {"model": {"params": {"cond_stage_config": {"target": "test_preflight.Embedder", "params": None}}}}
    words = [f"data.params.{section}.target=test_preflight.Labelled" for section in ("train", "validation")]
    error = refused(train, PIXELS, CLASSES, own, "model.params.cond_stage_key=label", *words)
    assert "expected tokens of width 8 (unet_config.params.context_dim), got tokens of width 12" in error


def test_own_hooks_have_the_trainer(train) -> None:
    code, error, _ = train(PIXELS, "model.target=test_preflight.Hooked", "--max_steps=1")
    assert code == 0, error


class Embedder(nn.Module):
    """A condition stage of own code, of another width than the network's."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 12)

    def forward(self, labels: torch.Tensor) -> torch.Tensor:
        """Return (B, 1, 12)."""
        return self.table(labels)[:, None]


class Labelled(OwnData):
    """Items with a label under another name."""

    def __getitem__(self, index: int) -> Any:
        item = super().__getitem__(index)
        return {"image": item["image"], "label": item["class_label"]}


TEST = {"data": {"params": {"test": {"target": OWN, "params": {"form": "tuple"}}}}}
SCORE = {
    "lightning": {
        "callbacks": {
            "edit_score": {"target": "ldm.evaluation.editing.callback.EditScore", "params": {"judge": "nowhere"}}
        }
    }
}


def test_the_test_data_are_read_before_training_if_they_are_used(train, caplog) -> None:
    assert "data.params.test: expected a dict" in refused(train, PIXELS, TEST, SCORE)
    code, error, _ = train(PIXELS, TEST, SCORE, "--no-test")
    assert code == 0, error
    code, error, _ = train(PIXELS, TEST)  # the model has no test pass
    assert code == 0 and re.search("data.params.test: expected a dict.* Training is not affected", caplog.text), error


def test_needs_of_scores(train) -> None:
    good = {"data": {"params": {"test": {"target": OWN, "params": {"form": "plain"}}}}}
    assert "nowhere: expected a checkpoint of a factor judge" in refused(train, PIXELS, good, SCORE)
    scores = {"scores": {"target": "ldm.evaluation.train_scores.ScoreWhileTraining"}}
    error = refused(train, PIXELS, {"lightning": {"callbacks": scores}})
    assert "lightning.callbacks: ScoreWhileTraining: expected a model whose representation" in error


def test_attributes_of_a_judge(train) -> None:
    images = {"target": "ldm.data.world.World3D", "params": {"size": 32, "limit": 24}}
    judge = {
        "model": {
            "base_learning_rate": 1e-3,
            "target": "ldm.models.judge.AttributeJudge",
            "params": {"space": {"names": ["a", "b"], "sizes": [2, 3]}},
        },
        "data": {**DATA, "params": {"batch_size": 4, "num_workers": 0, "train": images}},
        "lightning": PIXELS["lightning"],
    }
    assert "expected values of 2 attributes (a: 0 to 1, b: 0 to 2)" in refused(train, judge)


def test_a_bad_item_later_in_training_is_named(train) -> None:
    code, error, _ = train(PIXELS, "data.params.train.params.form=late nan", "--max_steps=3")
    assert code == 1 and "in the data at step" in error and "'image' of item" in error and "(f9)" in error


def test_nothing_changes_for_the_run(train) -> None:
    """Losses, random states and data sets are those of a run without the checks."""
    data = DataModuleFromConfig(4, train={"target": OWN}, num_workers=0)
    model = LatentDiffusion(**PIXELS["model"]["params"])
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    batch = {"image": torch.zeros(2, 16, 16, 3), "text": ["a", "b"]}
    traced = trace_steps(model, {"train": Batch(batch, 2, 4), "validation": Batch(batch, 2, 3)})
    assert traced.names["train"] >= {"train/loss", "train/epoch_num"} and "val/loss_ema" in traced.names["val"]
    assert traced.activation_bytes > 4 * 16 * 16 * 32 * 4
    for name, value in model.state_dict().items():
        assert type(value) is torch.Tensor and torch.equal(value, weights[name])
    assert states[0] == random.getstate() and states[1] == np.random.get_state()[1].tolist()
    assert torch.equal(states[2], torch.get_rng_state()) and model.training
    assert "log" not in vars(model) and data.datasets == {}


def test_steps_that_need_values_are_not_traced(train) -> None:
    code, error, _ = train(PIXELS, "model.target=test_preflight.Untraceable")
    assert code == 0, error


def test_two_runs_of_one_second(train, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ldm.training.run.now_text", lambda: "2030-01-01T00-00-00")
    for name in ("2030-01-01T00-00-00_r", "2030-01-01T00-00-00_r-2"):
        code, error, _ = train(PIXELS, "-n", "r")
        assert code == 0 and Path("logs", name, "checkpoints", "last.ckpt").is_file(), error


def test_memory(train, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "_memory", lambda _: 1000)
    assert "memory: expected at most 0.0 GiB, the memory of cpu, got" in refused(train, PIXELS)


def test_a_full_disk_is_a_warning(train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog) -> None:
    usage = resources.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(resources.shutil, "disk_usage", lambda _: usage._replace(free=10))
    code, error, _ = train(PIXELS)
    assert code == 0 and re.search("5 checkpoints of .* are kept. Free some space", caplog.text), error
