"""Runs of EncDiff and CLIP-DisDiff whose optimizers hold other tensors than today's are continued."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import legacy_configs
import numpy as np
import pytest
import torch
from legacy_configs import LIGHTNING, data, save_clip, with_clip
from omegaconf import OmegaConf
from torch import Tensor

import main as front_door
from ldm.data.formats.text_writers import write_text_lmdb
from ldm.legacy.optimizers import fit_optimizer_state
from ldm.util import instantiate_from_config

UNITS, WIDTH, STEPS = legacy_configs.TOKENS["latent_unit"], legacy_configs.TOKENS["context_dim"], 40


def state_of(shapes: list[tuple[int, ...]], count: int | None = None) -> dict[str, Any]:
    """An Adam state as torch 1 wrote it: entry i is full of i; parameters from ``count`` on have no state."""
    states = {
        index: {"step": STEPS, "exp_avg": torch.full(shape, 1e-3 * index), "exp_avg_sq": torch.ones(shape)}
        for index, shape in enumerate(shapes[:count])
    }
    group = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01, "amsgrad": False, "initial_lr": 1e-4}
    return {"state": states, "param_groups": [{**group, "params": list(range(len(shapes)))}]}


def adam(shapes: list[tuple[int, ...]]) -> torch.optim.AdamW:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(shape)) for shape in shapes], lr=0.5)
    optimizer.register_load_state_dict_pre_hook(fit_optimizer_state)
    return optimizer


def averages(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [optimizer.state[parameter]["exp_avg"] for parameter in optimizer.param_groups[0]["params"]]


def test_states_of_units_are_stacked() -> None:
    one_unit = [(64, 1), (64,), (5, 64), (5,)]
    optimizer = adam([(7,), (3, 64, 1), (3, 64), (3, 5, 64), (3, 5), (2, 2)])
    optimizer.load_state_dict(state_of([(7,), *one_unit * 3, (2, 2)]))
    first, weight, bias, *_, last = averages(optimizer)
    assert first.eq(0).all() and last.eq(13e-3).all()
    assert torch.equal(weight[:, 0, 0], torch.tensor([1e-3, 5e-3, 9e-3]))
    assert torch.equal(bias[:, 0], torch.tensor([2e-3, 6e-3, 10e-3]))
    assert optimizer.param_groups[0]["lr"] == 1e-4
    optimizer.step()


def test_frozen_parameters_are_skipped() -> None:
    optimizer = adam([(7,), (2, 2)])
    optimizer.load_state_dict(state_of([(7,), (2, 2), (9,), (9,)], count=2))
    assert [average[0].max().item() for average in averages(optimizer)] == pytest.approx([0.0, 1e-3])


def test_trailing_parameters_without_a_state_start_anew(caplog) -> None:
    optimizer = adam([(7,), (2, 2), (), (3,)])
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(5))]})
    saved = state_of([(7,), (2, 2), (9,)], count=2)
    other = state_of([(5,)])
    saved["state"][3] = other["state"][0]
    saved["param_groups"].append({**other["param_groups"][0], "params": [3]})
    optimizer.load_state_dict(saved)
    first, second, *new = optimizer.param_groups[0]["params"]
    assert optimizer.state[first]["step"] == optimizer.state[second]["step"] == STEPS
    assert not any(parameter in optimizer.state for parameter in new) and not caplog.text
    assert optimizer.state[optimizer.param_groups[1]["params"][0]]["exp_avg"].shape == (5,)
    optimizer.step()


@pytest.mark.parametrize("shapes", [[(7,), (2, 3)], [(2, 2), (7,)], [(7,), (2, 2), (1,)]])
def test_other_states_start_anew_with_one_warning(shapes: list[tuple[int, ...]], caplog) -> None:
    optimizer = adam([(7,), (2, 2)])
    with caplog.at_level(logging.WARNING):
        optimizer.load_state_dict(state_of(shapes))
    assert len(caplog.records) == 1
    assert f"({len(shapes)} tensors, expected 2): training continues from its weights" in caplog.text
    assert not optimizer.state and optimizer.param_groups[0]["lr"] == 0.5


def reference_run(folder: Path, config: dict[str, Any], state: dict[str, Any], images: dict[str, Any]) -> Path:
    """A run folder as the references leave it."""
    (folder / "configs").mkdir(parents=True)
    (folder / "checkpoints").mkdir()
    model = instantiate_from_config(copy.deepcopy(config))
    content = {
        "epoch": 3,
        "global_step": STEPS,
        "pytorch-lightning_version": "1.4.2",
        "state_dict": model.state_dict(),
        "callbacks": {},
        "optimizer_states": [state],
        "lr_schedulers": [],
    }
    torch.save(content, folder / "checkpoints" / "last.ckpt")
    project = {"model": config, "data": images, "lightning": LIGHTNING}
    OmegaConf.save(OmegaConf.create(copy.deepcopy(project)), folder / "configs" / "a-project.yaml")
    return folder


def continued(run: Path) -> dict[str, Any]:
    """The optimizer state of a run after two further steps."""
    assert front_door.main(["-r", str(run), "-t", "--max_steps", str(STEPS + 2), "--no-test"]) == 0
    saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == STEPS + 2
    return saved["optimizer_states"][0]


@pytest.fixture
def database(tmp_path: Path) -> Path:
    pytest.importorskip("lmdb")
    pictures = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)
    path = tmp_path / "db"
    write_text_lmdb(path, [(picture, ["red floor", "blue wall", ""]) for picture in pictures], resolution=128)
    return path


def test_a_run_of_encdiff_is_continued(tmp_path: Path, database: Path, caplog) -> None:
    """The reference has six tensors per unit where there are six in all."""
    params = {**legacy_configs.ENCDIFF, "eval_name": None}
    config = legacy_configs.model("ldm.models.diffusion.ddpm_enc.LatentDiffusion", **params)
    model = instantiate_from_config(copy.deepcopy(config))
    ours = [tuple(parameter.shape) for parameter in model.configure_optimizers()[0][0].param_groups[0]["params"]]
    units = [(64, 1), (64,), (128, 64), (128,), (WIDTH, 128), (WIDTH,)]
    assert ours[-6:] == [(UNITS, *shape) for shape in units]
    state = state_of([*ours[:-6], *units * UNITS])
    run = reference_run(tmp_path / "2026-01-01T00-00-00_encdiff", config, state, data(path=str(database)))
    after = continued(run)
    assert "does not fit this model" not in caplog.text
    assert len(after["state"]) == len(ours) and float(after["state"][len(ours) - 1]["step"]) == STEPS + 2
    weight = after["state"][len(ours) - 6]["exp_avg"][:, 0, 0]  # two steps decay the average by 0.81
    expected = 0.81e-3 * (len(ours) - 6 + 6 * torch.arange(UNITS))
    torch.testing.assert_close(weight, expected, rtol=0, atol=2e-3)


def test_a_run_of_clip_disdiff_is_continued(tmp_path: Path, database: Path, caplog) -> None:
    """The reference has the frozen CLIP in its optimizer."""
    config = with_clip(legacy_configs.model(**legacy_configs.CLIP), save_clip(tmp_path / "clip"), 64)
    model = instantiate_from_config(copy.deepcopy(config))
    ours = [tuple(parameter.shape) for parameter in model.configure_optimizers()[0][0].param_groups[0]["params"]]
    state = state_of([*ours, (8, 8), (8,)], count=len(ours))
    images = data("ldm.data.dis.CustomDatasetTrainCLIP", path=str(database))
    run = reference_run(tmp_path / "2026-01-01T00-00-00_clip", config, state, images)
    after = continued(run)
    assert "does not fit this model" not in caplog.text
    assert len(after["state"]) == len(ours) and float(after["state"][0]["step"]) == STEPS + 2
