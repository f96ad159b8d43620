"""Trainer arguments of Lightning 1.4 in today's words."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import pytorch_lightning as pl

from ldm.config.trainer_args import TRAINER_ARGS, parse_gpus, translate_trainer_args


def test_the_list_is_lightnings() -> None:
    accepted = set(inspect.signature(pl.Trainer.__init__).parameters)
    assert accepted >= TRAINER_ARGS


@pytest.mark.parametrize(
    ("value", "devices"),
    [("0,", [0]), ("0,1", [0, 1]), ("2", 2), (1, 1), ("-1", -1), (0, None), ("", None), (None, None), ([0, 3], [0, 3])],
)
def test_gpus(value: Any, devices: Any) -> None:
    assert parse_gpus(value) == devices


@pytest.mark.parametrize(
    ("given", "today"),
    [
        ({"gpus": "0,"}, {"accelerator": "gpu", "devices": [0]}),
        ({"gpus": 0}, {"accelerator": "cpu"}),
        ({"gpus": "0,1", "accelerator": "ddp"}, {"strategy": "ddp", "accelerator": "gpu", "devices": [0, 1]}),
        ({"num_processes": 2}, {"accelerator": "cpu", "devices": 2}),
        ({"tpu_cores": 8}, {"accelerator": "tpu", "devices": 8}),
        ({"devices": "0,1", "accelerator": "gpu"}, {"devices": [0, 1], "accelerator": "gpu"}),
        ({"checkpoint_callback": False}, {"enable_checkpointing": False}),
        ({"terminate_on_nan": True}, {"detect_anomaly": True}),
        ({"replace_sampler_ddp": False}, {"use_distributed_sampler": False}),
        ({"weights_summary": None}, {"enable_model_summary": False}),
        ({"progress_bar_refresh_rate": 0}, {"enable_progress_bar": False}),
        ({"reload_dataloaders_every_epoch": True}, {"reload_dataloaders_every_n_epochs": 1}),
        ({"precision": 16}, {"precision": "16-mixed"}),
        ({"max_steps": None, "max_epochs": 3}, {"max_steps": -1, "max_epochs": 3}),
    ],
)
def test_translation(given: dict[str, Any], today: dict[str, Any]) -> None:
    assert translate_trainer_args(given).arguments == today


def test_what_is_no_trainer_argument_any_more() -> None:
    settings = translate_trainer_args(
        {"resume_from_checkpoint": "a.ckpt", "progress_bar_refresh_rate": 5, "amp_level": "O1", "ipus": 1}
    )
    assert settings.arguments == {}
    assert (settings.resume_from_checkpoint, settings.refresh_rate) == ("a.ckpt", 5)
    assert settings.dropped == ["amp_level", "ipus"]
