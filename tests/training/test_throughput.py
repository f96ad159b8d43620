"""Operations per second of a training and of the device, and what the progress shows of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from tiny_training import TinyDataset, TinyModel
from torch.utils.data import DataLoader

from ldm.training.callbacks import speed_bar
from ldm.training.callbacks.speed_bar import SpeedBar
from ldm.training.throughput import Throughput, measure_peak, precision_dtype


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        ("bf16-mixed", torch.bfloat16),
        ("bf16-true", torch.bfloat16),
        ("16-mixed", torch.float16),
        (16, torch.float16),
        ("32-true", torch.float32),
        ("64-true", torch.float64),
        ("transformer-engine", torch.float32),
    ],
)
def test_type_of_numbers_of_a_precision(precision: str | int, dtype: torch.dtype) -> None:
    assert precision_dtype(precision) == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_is_measured_and_random_numbers_stay(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    assert 1e6 < measure_peak(torch.device("cpu"), dtype, seconds=0.0) < 1e18
    assert torch.equal(torch.get_rng_state(), state)


def test_throughput_in_words() -> None:
    whole = Throughput(images=100, seconds=2.0, waited=0.1, batches=10)
    assert whole.describe() == "50 images/s, 5 % waiting for data"
    assert whole.describe(operations_per_image=4.0, peak=500.0) == "50 images/s, 40 % of peak, 5 % waiting for data"
    assert Throughput(images=4, seconds=0.5, batches=1).describe() == ""
    whole += Throughput(images=100, seconds=2.0, waited=1.1, batches=10)
    assert vars(whole) == {"images": 200, "seconds": 4.0, "waited": pytest.approx(1.2), "batches": 20}


def test_progress_and_summary(tmp_path: Path, caplog, monkeypatch) -> None:
    """The peak is measured once, in the precision of the run; images per second are those of the whole training."""
    measured = []
    monkeypatch.setattr(speed_bar, "measure_peak", lambda device, dtype: measured.append((str(device), dtype)) or 1e4)
    bar = SpeedBar(refresh_rate=2, line_seconds=0.0)
    bar.operations_per_image = 100.0
    options = {"logger": False, "enable_checkpointing": False, "accelerator": "cpu", "default_root_dir": tmp_path}
    trainer = pl.Trainer(max_steps=7, callbacks=[bar], precision="bf16-mixed", **options)
    with caplog.at_level("INFO", "ldm"):
        trainer.fit(TinyModel(), DataLoader(TinyDataset(), batch_size=4))
    assert measured == [("cpu", torch.bfloat16)]
    *lines, last = caplog.messages
    shown = re.compile(r"\d+ images/s, \d+ % of peak, \d+ % waiting for data")
    assert all(shown.search(text) for text in lines if "  step " in text)
    assert re.fullmatch(rf"trained 7 batches: {shown.pattern}", last)


def test_a_single_batch_has_no_summary(tmp_path: Path, caplog) -> None:
    options = {"logger": False, "enable_checkpointing": False, "accelerator": "cpu", "default_root_dir": tmp_path}
    trainer = pl.Trainer(max_steps=1, limit_val_batches=0, callbacks=[SpeedBar()], **options)
    with caplog.at_level("INFO", "ldm"):
        trainer.fit(TinyModel(), DataLoader(TinyDataset(), batch_size=4))
    assert not [text for text in caplog.messages if text.startswith("trained")]
