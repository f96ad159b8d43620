"""NoiseCLR: the loss, what trains, bad input, several processes, and a CUDA device that does not exist."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from direction_models import save_text_model, train_noiseclr
from test_fake_device import fake_mode, on_fake_cuda

from ldm.diffusion.samplers import DDIMSampler
from ldm.losses.directions import noiseclr_loss, unit_changes
from ldm.models.diffusion.methods.noiseclr.model import NoiseCLR
from ldm.runs.load import load_run
from ldm.training.callbacks.step_seed import StepSeed
from ldm.util import ConfigError, UserError

DENOISER = "ldm.models.diffusion.methods.noiseclr.denoiser.RunDenoiser"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    return save_text_model(tmp_path_factory.mktemp("text") / "zoo")


def build(zoo, num_directions=5, directions_per_iteration=2, space="auto", **options):
    torch.manual_seed(0)
    config = {"target": DENOISER, "params": {"run": str(zoo), "row_space": space}}
    return NoiseCLR(config, num_directions, directions_per_iteration, **options)


def batch_of(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {"image": torch.randint(0, 256, (count, 32, 32, 3), dtype=torch.uint8, generator=generator)}


def test_loss_of_a_case_by_hand():
    # Two images that change alike (product 1), one other direction at products 0 and -1.
    chosen = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    loss = noiseclr_loss(chosen, torch.tensor([[0.0, -1.0]]), temperature=0.5)
    assert loss.item() == pytest.approx(-math.log(math.exp(2) / ((1 + math.exp(-2)) / 2)))


def test_loss_equals_the_equation_in_float64():
    rng = np.random.default_rng(0)
    changes = rng.normal(size=(1 + 4, 6, 4, 3, 3))
    units = changes.reshape(5, 6, -1)
    units = units / (np.linalg.norm(units, axis=-1, keepdims=True) + 1e-20)
    positives = [np.exp(units[0, i] @ units[0, k] / 0.3) for i in range(6) for k in range(i + 1, 6)]
    negatives = [np.exp(units[0, i] @ units[j, i] / 0.3) for j in range(1, 5) for i in range(6)]
    expected = -np.log(np.mean(positives) / np.mean(negatives))
    vectors = unit_changes(torch.from_numpy(changes))
    loss = noiseclr_loss(vectors[0], torch.einsum("bn,mbn->mb", vectors[0], vectors[1:]), 0.3)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_changes_of_all_directions_equal_one_pass_per_direction(zoo):
    model = build(zoo)
    x, t = torch.randn(3, 4, 8, 8), torch.full((3,), 20)
    together = model.changes(x, t, model.rows)
    for row, change in zip(model.rows, together):
        cond = model.denoiser.conditions(row.expand(3, -1))
        alone = model.denoiser.predict_eps(x, t, cond) - model.denoiser.predict_eps(x, t, model.denoiser.null(3))
        torch.testing.assert_close(change, alone, atol=1e-5, rtol=1e-4)
    assert together.flatten(1).norm(dim=1).min() > 0


@pytest.mark.parametrize("space", ["token", "condition"])
def test_only_the_rows_that_were_drawn_move(zoo, space):
    model = build(zoo, space=space, weight_decay=0.0)
    model.learning_rate = 0.1
    frozen = {name: value.clone() for name, value in model.denoiser.named_parameters()}
    before, table = model.rows.detach().clone(), model.denoiser.model.cond_stage_model.state_dict()
    table = {name: value.clone() for name, value in table.items()}
    optimizer = model.configure_optimizers()
    assert [id(p) for group in optimizer.param_groups for p in group["params"]] == [id(model.rows)]
    drawn = torch.tensor([3, 0, 1])
    model.loss_at(torch.randn(2, 4, 8, 8), torch.full((2,), 20), drawn).backward()
    optimizer.step()
    moved = (model.rows != before).any(dim=1)
    assert moved.tolist() == [True, True, False, True, False]
    for name, value in model.denoiser.named_parameters():
        assert torch.equal(value, frozen[name]) and value.grad is None and not value.requires_grad
    now = model.denoiser.model.cond_stage_model.state_dict()
    assert all(torch.equal(now[name], value) for name, value in table.items())


def test_initial_rows_of_words_and_of_length_one(zoo):
    model = build(zoo, initializer_tokens=["red", "floor"])
    table = model.denoiser._splice.table.weight
    red, floor = (model.denoiser._splice.row_of(word) for word in ("red", "floor"))
    assert any(torch.equal(red, row) for row in table) and not torch.equal(red, floor)
    expected = torch.stack([red, floor, red, floor, red])
    assert torch.equal(model.rows.detach(), expected)
    lengths = build(zoo, normalize_rows=True).rows.norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones(5))


def test_a_row_with_the_embedding_of_a_word_gives_the_condition_of_the_word(zoo):
    denoiser = build(zoo).denoiser
    row = denoiser._splice.row_of("cube")
    torch.testing.assert_close(denoiser.conditions(row[None]).value, denoiser.condition_from_texts(["cube"]).value)


def test_time_steps_are_equal_and_in_the_range(zoo):
    model = build(zoo, min_timestep=5, max_timestep=8)
    drawn = torch.stack([model.draw_timestep(3) for _ in range(40)])
    assert (drawn == drawn[:, :1]).all() and set(drawn[:, 0].tolist()) == {5, 6, 7}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_directions": 4, "directions_per_iteration": 4}, "directions_per_iteration: expected 1 to 3"),
        ({"directions_per_iteration": 0}, "directions_per_iteration"),
        ({"temperature": 0.0}, "temperature: expected a positive"),
        ({"temperature": float("nan")}, "temperature"),
        ({"min_timestep": 30, "max_timestep": 20}, "expected 0 <= min < max, got"),
        ({"max_timestep": 41}, "0 <= min < max <= 40"),
        ({"space": "tokens"}, "row_space"),
        ({"space": "condition", "initializer_tokens": ["red"]}, "initializer_tokens"),
    ],
)
def test_options_are_checked(zoo, options, message):
    with pytest.raises(ConfigError, match=message):
        build(zoo, **options)


def test_unknown_initial_words_are_refused(zoo):
    with pytest.raises(UserError, match="expected words of"):
        build(zoo, initializer_tokens=["lipstick"])
    with pytest.raises(UserError, match="one token"):
        build(zoo, initializer_tokens=["red floor"])


def test_a_batch_of_one_is_refused(zoo):
    model = build(zoo)
    with pytest.raises(UserError, match="at least 2 images"):
        model.training_step(batch_of(1), 0)
    with pytest.raises(ValueError, match="at least 2"):
        noiseclr_loss(torch.ones(1, 3), torch.ones(2, 1), 0.5)


def test_checkpoints_contain_the_rows_alone(zoo, tmp_path):
    run = train_noiseclr(tmp_path, zoo)
    state = torch.load(run / "checkpoints" / "last.ckpt", map_location="cpu", weights_only=False)["state_dict"]
    assert list(state) == ["rows"]
    loaded = load_run(str(run)).model
    assert torch.equal(loaded.rows, state["rows"])
    assert loaded.directions.fingerprint == build(zoo).denoiser.fingerprint()
    pictures = loaded.log_images(batch_of(2), N=2, sampler=DDIMSampler(2), num_directions=3)
    assert pictures["directions"].images.shape == (8, 3, 32, 32)
    assert pictures["directions"].rows == ["no edit", "<t1>", "<t2>", "<t3>"]


def trainer_of(folder, **options):
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    return pl.Trainer(accelerator="cpu", default_root_dir=folder, **quiet, **options)


def test_resumed_training_equals_uninterrupted(zoo, tmp_path):
    def train(steps, resume=None, folder="a"):
        model = build(zoo)
        trainer = trainer_of(tmp_path / folder, max_steps=steps, callbacks=[StepSeed(3)])
        loader = torch.utils.data.DataLoader(_Batches(), batch_size=None)
        trainer.fit(model, loader, ckpt_path=resume)
        path = tmp_path / folder / "kept.ckpt"
        trainer.save_checkpoint(path)
        return model, path

    whole, _ = train(4)
    _, half = train(2, folder="b")
    resumed, _ = train(4, half, folder="c")
    assert torch.equal(whole.rows, resumed.rows)


class _Batches(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return batch_of(2)


def test_gradients_accumulate_and_mixed_precision_trains(zoo, tmp_path):
    model = build(zoo)
    before = model.rows.detach().clone()
    trainer = trainer_of(tmp_path, max_steps=1, accumulate_grad_batches=2, precision="bf16-mixed")
    trainer.fit(model, torch.utils.data.DataLoader(_Batches(), batch_size=None))
    assert trainer.global_step == 1 and not torch.equal(model.rows, before) and model.rows.isfinite().all()


def test_checkpointing_of_activations_gives_equal_gradients(zoo):
    def gradient(use_checkpoint):
        torch.manual_seed(0)
        params = {"run": str(zoo), "use_checkpoint": use_checkpoint}
        model = NoiseCLR({"target": DENOISER, "params": params}, 5, 2)
        x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        model.loss_at(x, torch.full((2,), 20), torch.tensor([3, 0, 1])).backward()
        return model.rows.grad

    torch.testing.assert_close(gradient(True), gradient(False))


def test_a_step_on_a_fake_cuda_device_does_not_wait_for_the_host(zoo, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)  # needs a driver
    model = build(zoo)
    with fake_mode() as mode:
        fake = on_fake_cuda(model, mode)
        x = torch.empty(2, 4, 8, 8, device="cuda")
        t = fake.draw_timestep(2)
        loss = fake.loss_at(x, t, fake.draw_directions())
        assert loss.device.type == "cuda" and loss.requires_grad


SCRIPT = """
import json, os, sys
import pytorch_lightning as pl
import torch
sys.path[:0] = [{tests!r}, {models!r}, {root!r}]
torch.set_num_threads(1)
from test_noiseclr import build, batch_of

class Model(type(build({zoo!r}))):
    def training_step(self, batch, batch_idx):  # the images and the noise of one process, divided
        x = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(batch_idx))
        rank, count = self.trainer.global_rank, self.trainer.world_size
        torch.manual_seed(7 + 100 * rank + batch_idx)  # draws of the first process hold for all
        x = x.chunk(count)[rank]
        t, drawn = self.draw_timestep(len(x)), self.draw_directions()
        return self.loss_at(x, t, drawn)

    def configure_optimizers(self):
        return torch.optim.SGD([self.rows], lr=1e-4)

model = build({zoo!r})
model.__class__ = Model
devices = int(sys.argv[1])
options = dict(strategy="ddp", devices=2) if devices == 2 else dict(devices=1)
trainer = pl.Trainer(max_steps=3, accelerator="cpu", logger=False, enable_checkpointing=False, barebones=False,
                     enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False, **options)
trainer.fit(model, torch.utils.data.DataLoader(torch.zeros(3, 1), batch_size=1))
if trainer.is_global_zero:
    torch.save(model.rows.detach(), os.path.join({folder!r}, f"rows{{devices}}.pt"))
"""


@pytest.mark.slow
def test_two_processes_equal_one(zoo, tmp_path):
    places = {"tests": str(ROOT / "tests"), "models": str(ROOT / "tests" / "models"), "root": str(ROOT)}
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.format(**places, folder=str(tmp_path), zoo=str(zoo)))
    for devices in ("1", "2"):
        command = [sys.executable, str(script), devices]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (torch.load(tmp_path / f"rows{devices}.pt", weights_only=True) for devices in (1, 2))
    before = build(zoo).rows.detach()
    assert (one - before).abs().max() > 1e-4
    torch.testing.assert_close(one - before, two - before, atol=1e-6, rtol=1e-3)


def test_directions_files_contain_valid_json(zoo, tmp_path):
    path = tmp_path / "directions.safetensors"
    build(zoo).directions.save(path)
    header = path.read_bytes()
    size = int.from_bytes(header[:8], "little")
    record = json.loads(json.loads(header[8 : 8 + size])["__metadata__"]["directions"])
    assert record["kind"] == "token" and record["names"][:2] == ["<t1>", "<t2>"] and record["latent_shape"] == [4, 8, 8]


def test_directions_without_a_fingerprint_are_accepted_with_a_warning(zoo, caplog):
    model = build(zoo)
    model.directions.check(model.denoiser)
    assert "fingerprint" not in caplog.text
    replace(model.directions, fingerprint=None).check(model.denoiser, "--directions a")
    assert "--directions a: the file has no fingerprint" in caplog.text
