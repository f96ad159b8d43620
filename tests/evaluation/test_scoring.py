"""From stored representations to score files: planning, resuming, failures, and what each message says."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import score_cases as cases

from ldm.data.factors import FactorSpace
from ldm.evaluation import scoring
from ldm.evaluation.score_files import find_runs, open_latents, read_latent_file
from ldm.evaluation.score_workers import Job, Outcome
from ldm.metrics import Metric
from ldm.util import UserError

QUICK = {"spread": cases.SPREAD, "sizes": cases.SIZES}


class PoolInProcess:
    """Runs jobs at once in this process, as ``WorkerPool`` would in others; counts them."""

    keys: list = []

    def __init__(self, num_workers: int) -> None:
        self._jobs: list[tuple[float, Job]] = []

    def __enter__(self):
        return self

    def __exit__(self, *exception) -> None:
        pass

    def submit(self, job: Job, priority: float = 0.0) -> None:
        self._jobs.append((priority, job))

    def outcomes(self):
        while self._jobs:
            self._jobs.sort(key=lambda entry: -entry[0])
            job = self._jobs.pop(0)[1]
            PoolInProcess.keys.append(job.key)
            try:
                outcome = Outcome(job, job.function(*job.args))
            except Exception as err:
                outcome = Outcome(job, error=str(err))
            yield outcome


@pytest.fixture
def in_process(monkeypatch):
    PoolInProcess.keys = []
    monkeypatch.setattr(scoring, "WorkerPool", PoolInProcess)
    return PoolInProcess.keys


def reasons(report) -> str:
    return "\n".join(failure.reason for failure in report.failures)


def test_scores_every_run_and_only_once(tmp_path, in_process):
    for name in ("a/2026-01-01T00-00-00_x_s0", "b"):
        cases.write_latents(tmp_path / name, epoch=1, step=50)
        cases.write_latents(tmp_path / name, epoch=2, step=100)
    steps = []
    report = scoring.score_folder(tmp_path, 1, metrics=QUICK, on_progress=lambda *seconds: steps.append(seconds))
    assert not report.failures and len(report.written) == 4
    content = json.loads((tmp_path / "b/dis_metrics/100.json").read_text())
    assert content["Sizes"] == {"total": 12}
    assert content["Spread"]["draw"] == np.random.RandomState(0).randint(1000)
    assert content["Spread"]["units"] == 3
    assert list(content) == ["Spread", "Sizes"]
    assert steps[0][0] == 0 and steps[-1][0] == pytest.approx(steps[-1][1])
    assert [path.name for path in (tmp_path / "b/dis_metrics").iterdir() if path.name.startswith(".")] == []
    in_process.clear()
    assert not scoring.score_folder(tmp_path / "b", 1, metrics=QUICK).written
    assert in_process == []


def test_longest_parts_go_first(tmp_path, in_process):
    cases.write_latents(tmp_path)
    slow = Metric("Sizes", cases.total_size, "total", seconds=lambda units, values: float(values * units),
                  part=cases.factor_size, join=cases.total_size)
    scoring.score_folder(tmp_path, 1, metrics={"spread": cases.SPREAD, "sizes": slow})
    assert [name for _, name in in_process] == ["prepare", "sizes/2", "sizes/0", "sizes/1", "spread"]


def test_another_seed_has_its_own_place(tmp_path, in_process):
    cases.write_latents(tmp_path)
    scoring.score_folder(tmp_path, 1, seed=7, metrics=QUICK)
    content = json.loads((tmp_path / "dis_metrics/seed=7/100.json").read_text())
    assert content["Spread"]["draw"] == np.random.RandomState(7).randint(1000)
    assert not (tmp_path / "results.json").exists()


def test_a_part_that_fails_costs_only_itself(tmp_path, in_process):
    cases.write_latents(tmp_path / "run")
    broken = QUICK | {"broken": Metric("Broken", cases.raise_error, "none")}
    report = scoring.score_folder(tmp_path, 1, metrics=broken)
    assert [failure.reason for failure in report.failures] == ["broken: no such number"]
    assert not report.written
    in_process.clear()
    repaired = QUICK | {"broken": Metric("Broken", cases.spread, "spread")}
    assert len(scoring.score_folder(tmp_path, 1, metrics=repaired).written) == 1
    assert [name for _, name in in_process] == ["prepare", "broken"], "finished parts are not computed again"


def test_an_interrupted_command_continues(tmp_path, in_process, monkeypatch):
    cases.write_latents(tmp_path / "run")
    add = scoring.ScoreTask.add

    def interrupt_after_two(task, name, result):
        add(task, name, result)
        if len(task.missing) == 2:
            raise KeyboardInterrupt
        return not task.missing

    monkeypatch.setattr(scoring.ScoreTask, "add", interrupt_after_two)
    with pytest.raises(KeyboardInterrupt):
        scoring.score_folder(tmp_path, 1, metrics=QUICK)
    monkeypatch.setattr(scoring.ScoreTask, "add", add)
    done = {name for _, name in in_process}
    in_process.clear()
    assert len(scoring.score_folder(tmp_path, 1, metrics=QUICK).written) == 1
    assert not done & {name for _, name in in_process} - {"prepare"}


def test_kept_parts_of_another_file_are_dropped(tmp_path, in_process):
    cases.write_latents(tmp_path)
    broken = QUICK | {"broken": Metric("Broken", cases.raise_error, "none")}
    scoring.score_folder(tmp_path, 1, metrics=broken)
    cases.write_latents(tmp_path, latents=np.ones((60, 3), np.float32))
    in_process.clear()
    scoring.score_folder(tmp_path, 1, metrics=QUICK | {"broken": cases.SPREAD})
    assert len(in_process) == 6


@pytest.mark.parametrize(
    "change,message",
    [
        ({"latents": np.ones((59, 3, 2))}, r"holds 59 images, but its factors make 60 \(4 x 3 x 5"),
        ({"latents": np.ones((600, 3, 2))}, "every image 10 times"),
        ({"latents": np.full((60, 3, 2), np.nan)}, "nan in unit 0, first in row 0"),
        ({"latents": None}, "expected latents and num_samples"),
        ({"num_samples": None}, "expected latents and num_samples"),
        ({"latents": np.ones(60)}, r"shape \(60,\)"),
        ({"latents": np.array([["a"]])}, "expected numbers"),
        ({"factor_sizes": None}, "name the data set with -d"),
        ({"factor_sizes": np.array([4, 0, 5])}, "every size must be at least 1"),
    ],
)
def test_files_that_cannot_be_scored_say_why_and_others_go_on(tmp_path, in_process, change, message):
    bad = cases.write_latents(tmp_path / "bad", **change)
    cases.write_latents(tmp_path / "good")
    report = scoring.score_folder(tmp_path, 1, metrics=QUICK)
    assert [path.parts[-3] for path in report.written] == ["good"]
    assert [failure.path for failure in report.failures] == [bad]
    with pytest.raises(UserError, match=message):
        raise UserError(reasons(report))


def test_damaged_files(tmp_path, in_process):
    whole = cases.write_latents(tmp_path / "good")
    data = whole.read_bytes()
    for name, content in (
        ("cut", data[: len(data) // 2]),
        ("empty", b""),
        ("flipped", data[:400] + bytes([data[400] ^ 1]) + data[401:]),
    ):
        path = cases.write_latents(tmp_path / name)
        path.write_bytes(content)
    (whole.parent / ".epoch=000009.npz.abc.tmp").write_bytes(b"being written")
    (whole.parent / ".epoch=000009.npz").write_bytes(b"being written")
    report = scoring.score_folder(tmp_path, 1, metrics=QUICK)
    assert len(report.written) == 1
    assert len(report.failures) == 3
    assert all("is damaged or not complete" in failure.reason for failure in report.failures)
    again = scoring.score_folder(tmp_path, 1, metrics=QUICK, skip=frozenset(map(scoring.file_state, report.failures)))
    assert not again.failures


def test_compressed_and_plain_files_give_the_same_latents(tmp_path):
    plain = cases.write_latents(tmp_path / "plain")
    packed = tmp_path / "packed.npz"
    with np.load(plain) as content:
        np.savez_compressed(packed, **content)
    assert isinstance(open_latents(plain), np.memmap)
    assert np.array_equal(open_latents(plain), open_latents(packed))
    assert zipfile.ZipFile(packed).testzip() is None
    assert (read_latent_file(plain).epoch, read_latent_file(packed).epoch) == (0, None)


def config_of(run: Path, target: str) -> None:
    (run / "configs").mkdir(parents=True)
    text = f"data:\n  target: main.DataModuleFromConfig\n  params:\n    test:\n      target: {target}\n"
    (run / "configs" / "2026-01-01T00-00-00-project.yaml").write_text(text)


def test_the_saved_config_names_the_data_set(tmp_path, in_process):
    cars = FactorSpace(("elevation", "azimuth", "object"), (4, 24, 183))
    config_of(tmp_path / "cars", "ldm.data.dis.Cars3DTrain")
    cases.write_latents(tmp_path / "cars", space=None, latents=np.random.rand(cars.size, 2).astype(np.float32))
    report = scoring.score_folder(tmp_path, 1, metrics=QUICK)
    assert json.loads(report.written[0].read_text())["Sizes"] == {"total": 211}


def test_sources_that_disagree(tmp_path, in_process):
    cases.write_latents(tmp_path / "run")
    config_of(tmp_path / "run", "ldm.data.world.World3D")
    assert "its run's config says shapes3d" in reasons(scoring.score_folder(tmp_path, 1, metrics=QUICK))
    assert "-d says mpi3d" in reasons(scoring.score_folder(tmp_path, 1, "mpi3d", metrics=QUICK))
    cases.write_latents(tmp_path / "bare")
    assert "leave -d away" in reasons(scoring.score_folder(tmp_path / "bare", 1, "cars3d", metrics=QUICK))
    assert "Did you mean 'cars3d'" in reasons(scoring.score_folder(tmp_path / "bare", 1, "cars3", metrics=QUICK))


def test_a_config_that_is_no_yaml(tmp_path, in_process):
    cases.write_latents(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "x-project.yaml").write_text("a: [")
    assert "is no YAML file" in reasons(scoring.score_folder(tmp_path, 1, metrics=QUICK))


def test_find_runs(tmp_path):
    for folder in ("a/dis_repre", "b/c/checkpoints", "d/configs", "a/clip/checkpoints"):
        (tmp_path / folder).mkdir(parents=True)
    assert [run.relative_to(tmp_path).as_posix() for run in find_runs(tmp_path)] == ["a", "a/clip", "b/c"]
    with pytest.raises(UserError, match="no folder"):
        find_runs(tmp_path / "none")


def test_workers_killed_in_the_middle_cost_their_metric_alone(tmp_path):
    cases.write_latents(tmp_path / "run")
    deadly = {"spread": cases.SPREAD, "deadly": Metric("Deadly", cases.kill_itself, "none"), "sizes": cases.SIZES}
    report = scoring.score_folder(tmp_path, 2, metrics=deadly)
    assert len(report.failures) == 1 and "deadly: its process was killed 2 times" in report.failures[0].reason
    kept = json.loads((tmp_path / "run/dis_metrics/.100.partial.json").read_text())["results"]
    assert sorted(kept) == ["sizes/0", "sizes/1", "sizes/2", "spread"]


def test_scoring_never_imports_torch():
    code = "import ldm.evaluation.score_command, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
