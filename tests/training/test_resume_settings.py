"""A resumed run does what its command line says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import tiny_training
import torch
from test_resume import CONFIG, curve, record, train

import main as front_door
from ldm.lr_scheduler import with_schedule
from ldm.runs.records import update_run


class Scheduled(tiny_training.TinyModel):
    """Two parameter groups, a schedule and settings of the optimizer."""

    def __init__(self, scheduler_config: Any = None, betas: Any = (0.9, 0.999), decay: float = 0.0, width: int = 3):
        super().__init__(width)
        self.scheduler_config, self.betas, self.decay = scheduler_config, tuple(betas), decay

    def configure_optimizers(self) -> Any:
        groups = [{"params": [self.layer.weight], "weight_decay": self.decay}, {"params": [self.layer.bias]}]
        return with_schedule(
            [torch.optim.AdamW(groups, lr=self.learning_rate, betas=self.betas)], self.scheduler_config
        )


class Seen(pl.Callback):
    """Records the settings with which each step is done."""

    groups: list[list[dict[str, Any]]] = []

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        keys = ("lr", "betas", "weight_decay")
        self.groups.append([{key: group[key] for key in keys} for group in optimizer.param_groups])


LINEAR = "{target: ldm.lr_scheduler.LambdaLinearScheduler, params: {warm_up_steps: [2], cycle_lengths: [%s], "
LINEAR += "f_start: [0.1], f_max: [1.0], f_min: [0.0]}}"


@pytest.fixture
def resume(tmp_path: Path):
    config = tmp_path / "c.yaml"
    text = CONFIG.replace("tiny_training.TinyModel", "test_resume_settings.Scheduled").replace(
        "max_epochs: 3", "max_epochs: 9"
    )
    config.write_text(
        text.replace("image_logger: null", "image_logger: null, seen: {target: test_resume_settings.Seen}")
    )

    def run(first: list[str], *words: str, code: int = 0) -> list[list[dict[str, Any]]]:
        _, run.folder = train(config, tmp_path / "logs", "--max_steps", "4", *first)
        Seen.groups.clear()
        assert front_door.main(["-r", str(run.folder), "-t", "--max_steps", "8", *words]) == code
        return Seen.groups.copy()

    return run


def rates(steps: list[list[dict[str, Any]]]) -> list[float]:
    assert all(first["lr"] == second["lr"] for first, second in steps)
    return [groups[0]["lr"] for groups in steps]


def test_a_smaller_learning_rate_applies(resume, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        assert rates(resume([], "model.base_learning_rate=1e-6")) == [1e-6] * 4
    assert "applied from here on: lr of optimizer 0: 0.05 is now 1e-06" in caplog.text


@pytest.mark.parametrize(
    ("words", "rate"), [(["--scale_lr", "true"], 0.2), (["data.params.batch_size=8", "--scale_lr", "true"], 0.4)]
)
def test_a_scaled_learning_rate_applies(resume, words: list[str], rate: float) -> None:
    assert rates(resume([], *words)) == pytest.approx([rate] * 4)


def test_unchanged_settings_are_equal(resume, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        scheduled = rates(resume(["model.params.scheduler_config=" + LINEAR % 20]))
    assert scheduled == pytest.approx([0.05 * (20 - step) / 20 for step in (4, 5, 6, 7)])
    assert "applied from here" not in caplog.text and "learning rate is 0" not in caplog.text


def test_the_schedule_applies_on_top_of_a_new_rate(resume) -> None:
    steps = resume(["model.params.scheduler_config=" + LINEAR % 20], "model.base_learning_rate=1e-6")
    assert rates(steps) == pytest.approx([1e-6 * (20 - step) / 20 for step in (4, 5, 6, 7)])


def test_a_schedule_that_has_ended_is_named_and_a_longer_one_applies(resume, caplog) -> None:
    schedule = "model.params.scheduler_config=" + LINEAR % 4
    assert rates(resume([schedule])) == [0.0] * 4
    assert caplog.text.count("the learning rate is 0 from step 4 on") == 1
    caplog.clear()
    with caplog.at_level("INFO"):
        longer = rates(resume([schedule], "model.params.scheduler_config.params.cycle_lengths=[8]"))
    assert longer == pytest.approx([0.05 * (8 - step) / 8 for step in (4, 5, 6, 7)])
    assert "the learning rate is 0" not in caplog.text and "schedule of the learning rate" in caplog.text


def test_a_schedule_is_added_or_removed(resume) -> None:
    schedule = "model.params.scheduler_config=" + LINEAR % 20
    assert rates(resume([], schedule)) == pytest.approx([0.05 * (20 - step) / 20 for step in (4, 5, 6, 7)])
    assert rates(resume([schedule], "model.params.scheduler_config=null")) == [0.05] * 4


def test_other_settings_of_the_optimizer_apply(resume) -> None:
    (first, second) = resume([], "model.params.decay=0.5", "model.params.betas=[0.5,0.9]")[0]
    assert first == {"lr": 0.05, "betas": (0.5, 0.9), "weight_decay": 0.5}
    assert second == {"lr": 0.05, "betas": (0.5, 0.9), "weight_decay": 0.01}


def test_another_width_is_one_line(resume, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr("ldm.training.run.preflight", lambda *_: None)  # would find that the data do not fit either
    resume([], "model.params.width=4", code=1)
    message = capsys.readouterr().err
    assert "error: " in message and "Traceback" not in message
    assert "model.params.width: expected the default, got 4" in message


def test_rows_of_a_run_resumed_twice_from_one_checkpoint(resume) -> None:
    resume([])
    once = curve(resume.folder)
    assert front_door.main(["-r", str(resume.folder / "checkpoints/last.ckpt"), "-t", "--max_steps", "12"]) == 0
    assert [step for step, _ in curve(resume.folder)] == list(range(12))
    assert curve(resume.folder)[:8] == once


class Diffusion(Scheduled):
    """Arguments of a diffusion model."""

    def __init__(
        self,
        parameterization: str = "eps",
        timesteps: int = 1000,
        note: Any = "",
        signal_step: int = -1,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.signal_step = signal_step


@pytest.fixture
def diffusion(tmp_path: Path):
    """Train 4 steps and return a function that resumes the run."""
    config = tmp_path / "c.yaml"
    text = CONFIG.replace("tiny_training.TinyModel", "test_resume_settings.Diffusion").replace("max_epochs: 3", "")
    config.write_text(text.replace("trainer: {,", "trainer: {"))

    def run(*first: str, steps: int = 4, code: int = 0):
        assert train(config, tmp_path / "logs", "--max_steps", str(steps), *first)[0] == code
        (run.folder,) = (tmp_path / "logs").iterdir()
        return lambda *words: front_door.main(["-r", str(run.folder), "-t", *words])

    return run


def changed(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [text for text in caplog.messages if text.startswith("changed since the checkpoint")]


def test_an_unchanged_run_reports_no_changes(diffusion, caplog, tmp_path) -> None:
    resume = diffusion("model.params.scheduler_config=" + LINEAR % 20, "model.params.betas=[0.8,0.99]")
    with caplog.at_level("INFO"):
        assert resume("--max_steps", "8", "data.params.num_workers=0", "model.params.parameterization=eps") == 0
    assert changed(caplog) == []


def test_every_changed_setting_is_in_one_line(diffusion, caplog) -> None:
    resume = diffusion("model.params.scheduler_config=" + LINEAR % 20, "model.params.note=/a/run/checkpoints/x.ckpt")
    words = ["--max_steps", "8", "-s", "5", "data.params.train.params.size=16", "--accumulate_grad_batches", "2"]
    words += ["model.params.scheduler_config=null", "model.params.note=b/run/checkpoints/x.ckpt"]
    with caplog.at_level("INFO"):
        assert resume(*words) == 0
    (line,) = changed(caplog)
    assert line == (
        "changed since the checkpoint: model.params.scheduler_config: ldm.lr_scheduler.LambdaLinearScheduler is now "
        "None; data.params.train.params.size: the default is now 16; "
        "lightning.trainer.accumulate_grad_batches: the default is now 2; seed: 23 is now 5"
    )


def test_many_changes_are_counted(diffusion, caplog) -> None:
    resume = diffusion()
    with caplog.at_level("INFO"):
        assert resume("--max_steps", "5", *(f"model.params.note.n{number}=1" for number in range(11))) == 0
    (line,) = changed(caplog)
    assert line.count(" is now ") == 8 and line.endswith("; and 3 more")


def test_settings_that_give_weights_another_meaning_are_warned_of(diffusion, caplog) -> None:
    resume = diffusion()
    assert resume("--max_steps", "8", "model.params.timesteps=500") == 0
    (line,) = [entry.getMessage() for entry in caplog.records if entry.levelname == "WARNING"]
    assert "weights were trained with the other value: model.params.timesteps: 1000 is now 500" in line


@pytest.mark.parametrize(("first", "then"), [(["x0"], "eps"), ([], "v")])
def test_another_parameterization_is_refused(diffusion, capsys, first, then) -> None:
    resume = diffusion(*(f"model.params.parameterization={value}" for value in first))
    before = {path: path.read_bytes() for path in diffusion.folder.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert resume("--max_steps", "8", f"model.params.parameterization={then}") == 1
    message = capsys.readouterr().err
    assert f"model.params.parameterization: {first[0] if first else 'eps'} is now {then}" in message
    assert f"python main.py --base CONFIG -t model.params.ckpt_path={diffusion.folder}" in message
    assert before == {path: path.read_bytes() for path in before}
    assert resume("--max_steps", "8") == 0


@pytest.mark.parametrize(
    ("words", "unit"),
    [("--max_steps 5", "step 8 of 5"), ("--max_steps 8", "step 8 of 8"), ("--max_epochs 1", "epoch 1 of 1")],
)
def test_an_interrupted_run_that_is_past_its_end_stays_interrupted(diffusion, capsys, words, unit) -> None:
    resume = diffusion("model.params.signal_step=7", steps=9, code=130)
    before = {path: path.read_bytes() for path in diffusion.folder.rglob("*") if path.is_file()}
    assert f"Continue with: python main.py -r {diffusion.folder} -t" in capsys.readouterr().err
    assert resume("model.params.signal_step=-1", *words.split()) == 1
    message = capsys.readouterr().err
    assert f"error: already at {unit}" in message
    assert f"nothing to train; raise lightning.trainer.{words[2:11].strip()}" in message
    assert {path: path.read_bytes() for path in diffusion.folder.rglob("*") if path.is_file()} == before
    assert resume("model.params.signal_step=-1") == 0


def test_a_run_that_was_killed_after_its_last_step_is_finished(diffusion, caplog) -> None:
    resume = diffusion()
    update_run(diffusion.folder, status="running")
    with caplog.at_level("INFO"):
        assert resume() == 0
    assert "already at step 4 of 4: nothing to train; raise lightning.trainer.max_steps" in caplog.messages
    assert record(diffusion.folder)["status"] == "finished"


def test_a_finished_run_with_a_lower_limit_is_one_line(diffusion, caplog) -> None:
    resume = diffusion()
    with caplog.at_level("INFO"):
        assert resume("--max_steps", "2") == 0
    assert "already at step 4 of 2: nothing to train; raise lightning.trainer.max_steps" in caplog.messages
    assert record(diffusion.folder)["status"] == "finished"
