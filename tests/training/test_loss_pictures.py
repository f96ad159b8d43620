"""The picture of the losses of a run: finished, interrupted, resumed, and when it cannot be drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_callbacks import CONFIG

import main as front_door
from ldm.training import loggers
from ldm.training.loggers import MetricsCSVLogger

WORDS = ("lightning.logger=csv", "lightning.trainer.max_epochs=3", "lightning.trainer.log_every_n_steps=1")


def train(tmp_path: Path, *words: str) -> tuple[int, Path]:
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    given = ["--base", str(tmp_path / "tiny.yaml"), "-t", "-l", str(tmp_path / "logs"), *WORDS, *words]
    code = front_door.main(given)
    return code, max((tmp_path / "logs").iterdir(), default=tmp_path / "logs" / "no run")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Arguments of the charts."""
    calls: list[tuple[Any, ...]] = []
    chart = loggers.loss_chart
    monkeypatch.setattr(loggers, "loss_chart", lambda *words: (calls.append(words), chart(*words)))
    return calls


def test_an_interrupted_run_has_its_losses_and_a_resumed_one_all_of_them(tmp_path: Path, drawn: list) -> None:
    code, run = train(tmp_path, "model.params.signal_step=7")
    assert code == 130
    losses, rates, path = drawn.pop()
    assert path == run / "losses.png" and Image.open(path).width > 500
    assert losses["loss"]["train"][0].tolist() == list(range(8))
    assert front_door.main(["-r", str(run), "-t", "model.params.signal_step=-1"]) == 0
    losses, rates, _ = drawn.pop()
    assert not drawn  # once for each start of the run, the test pass included
    assert list(losses) == ["loss"] and list(losses["loss"]) == ["train", "val"]
    assert losses["loss"]["train"][0].tolist() == list(range(18))
    assert losses["loss"]["val"][0].tolist() == [5, 11, 17]
    assert rates["Adam"].shape == (2, 18) and (rates["Adam"][1] == 0.2).all()


def test_a_failed_run_has_its_losses(tmp_path: Path) -> None:
    code, run = train(tmp_path, "model.params.broken_step=4")
    assert code == 1 and (run / "losses.png").is_file()


def test_a_picture_that_cannot_be_drawn_does_not_fail_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no font")

    monkeypatch.setattr(loggers, "loss_chart", fail)
    code, run = train(tmp_path)
    assert code == 0 and not (run / "losses.png").exists()
    assert f"{run / 'losses.png'} could not be drawn: no font" in caplog.text
    assert "no font" in (run / "log.txt").read_text()


def test_a_test_pass_alone_and_a_dry_run_draw_nothing(tmp_path: Path, drawn: list) -> None:
    _, run = train(tmp_path)
    drawn.clear()
    assert front_door.main(["-r", str(run)]) == 0
    code, _ = train(tmp_path, "--fast_dev_run", "1")
    assert code == 0 and not drawn


def test_columns_of_losses(tmp_path: Path, drawn: list) -> None:
    logger = MetricsCSVLogger(str(tmp_path))
    names = ["train/loss", "train/aeloss", "val/loss_simple", "train/psnr", "test/loss", "figure/loss", "lr-AdamW/pg1"]
    rows = dict.fromkeys(names, -1.0)
    rows |= {"train/p_loss": 0.0, "val/loss_simple_ema": 2.0, "my_loss_epoch": float("nan")}
    logger.log_metrics({**rows, "once_loss": 1.0}, 0)
    logger.log_metrics(rows, 5)
    logger.save()
    logger.draw_losses()
    ((losses, rates, path),) = drawn
    labels = {name: sorted(curves) for name, curves in losses.items()}
    assert labels == {"loss": ["train"], "aeloss": ["train"], "loss_simple": ["val", "val ema"], "my_loss": ["epoch"]}
    np.testing.assert_array_equal(losses["loss_simple"]["val ema"], [[0, 5], [2, 2]])
    assert list(rates) == ["AdamW/pg1"] and path.is_file()


@pytest.mark.parametrize(
    "content", [None, "", "step,train/loss\r\n", "step,train/loss\r\n0,1.0\r\n", "step,x\r\n0,1\r\n1,2\r\n"]
)
def test_files_without_curves(tmp_path: Path, content: str | None, caplog: pytest.LogCaptureFixture) -> None:
    logger = MetricsCSVLogger(str(tmp_path))
    if content is not None:
        logger.path.parent.mkdir(parents=True)
        logger.path.write_text(content, newline="")
    logger.draw_losses()
    assert not (tmp_path / "losses.png").exists() and not caplog.text
