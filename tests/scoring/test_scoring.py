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
from ldm.metrics import Metric
from ldm.scoring import run as scoring
from ldm.scoring.arrays import array_source, open_array
from ldm.scoring.files import find_runs, read_latent_file
from ldm.scoring.tasks import ScoreTask, read_record
from ldm.scoring.workers import Job, Outcome
from ldm.util import UserError

QUICK = {"spread": cases.SPREAD, "sizes": cases.SIZES}


class PoolInProcess:
    """Runs jobs at once in this process, as ``WorkerPool`` would in others; counts them."""

    keys: list = []
    num_workers = 1

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
    assert sorted(path.name for path in (tmp_path / "b/dis_metrics").iterdir()) == ["100.json", "50.json", "records"]
    assert sorted(path.name for path in (tmp_path / "b/dis_metrics/records").iterdir()) == ["100.json", "50.json"]
    in_process.clear()
    assert not scoring.score_folder(tmp_path / "b", 1, metrics=QUICK).written
    assert in_process == []


def test_longest_parts_go_first(tmp_path, in_process):
    cases.write_latents(tmp_path)
    slow = Metric(
        "Sizes",
        cases.total_size,
        "total",
        seconds=lambda units, values: float(values * units),
        part=cases.factor_size,
        join=cases.total_size,
    )
    scoring.score_folder(tmp_path, 1, metrics={"spread": cases.SPREAD, "sizes": slow})
    names = [key[-1] for key in in_process]
    assert names == ["prepare", "sizes/2", "sizes/0", "sizes/1", "spread", "information"]


def test_another_seed_has_its_own_place(tmp_path, in_process):
    cases.write_latents(tmp_path)
    scoring.score_folder(tmp_path, 1, seeds=(7,), metrics=QUICK)
    content = json.loads((tmp_path / "dis_metrics/seed=7/100.json").read_text())
    assert content["Spread"]["draw"] == np.random.RandomState(7).randint(1000)
    assert not (tmp_path / "results.json").exists()


def test_seeds_share_one_reduction_and_one_table(tmp_path, in_process):
    cases.write_latents(tmp_path)
    report = scoring.score_folder(tmp_path, 1, seeds=(0, 1, 2), metrics=QUICK)
    assert len(report.written) == 3
    names = [key[-1] for key in in_process]
    assert names.count("prepare") == 1 and names.count("spread") == 3 and names.count("information") == 1
    draws = {json.loads(path.read_text())["Spread"]["draw"] for path in report.written}
    assert draws == {np.random.RandomState(seed).randint(1000) for seed in (0, 1, 2)}


def test_the_record_says_what_stands_behind_each_result(tmp_path, in_process):
    cases.write_latents(tmp_path)
    config_of(tmp_path, "ldm.data.factors.mpi3d.MPI3D", "variant: real")
    space = FactorSpace(("hue", "shape", "size"), (4, 3, 5))
    cases.write_latents(tmp_path, factor_space=np.array(json.dumps(space.to_dict())))
    report = scoring.score_folder(tmp_path, 1, metrics=QUICK)
    record = read_record(report.written[0])
    assert sorted(record) == ["information", "sizes/0", "sizes/1", "sizes/2", "spread"]
    entry = record["sizes/2"]
    assert entry["result"] == {"size": 5} and entry["seed"] == 0 and entry["protocol"] == "disdiff"
    assert entry["dataset"]["name"] == "mpi3d_real" and entry["dataset"]["variant"] == {"variant": "real"}
    assert entry["versions"]["numpy"] == np.__version__ and entry["seconds"] >= 0
    told = np.array(record["information"]["result"]["mutual_information"])
    assert told.shape == (3, 3) and (told.argmax(axis=1) == [0, 1, 2]).all()


def test_more_metrics_lengthen_the_score_file(tmp_path, in_process):
    cases.write_latents(tmp_path)
    path = scoring.score_folder(tmp_path, 1, metrics={"spread": cases.SPREAD}).written[0]
    foreign = json.loads(path.read_text()) | {"MIG": {"discrete_mig": 0.5}}
    path.write_text(json.dumps(foreign))
    in_process.clear()
    assert scoring.score_folder(tmp_path, 1, metrics=QUICK).written == [path]
    assert {key[-1] for key in in_process} == {"prepare", "sizes/0", "sizes/1", "sizes/2"}
    content = json.loads(path.read_text())
    assert content["MIG"] == {"discrete_mig": 0.5} and set(content) == {"MIG", "Spread", "Sizes"}
    assert {"spread", "sizes/1"} <= read_record(path).keys()


def test_another_protocol_has_its_own_place(tmp_path, in_process):
    cases.write_latents(tmp_path)
    scoring.score_folder(tmp_path, 1, metrics=QUICK, protocol="fast", seeds=(0, 3))
    assert (tmp_path / "dis_metrics/protocol=fast/100.json").is_file()
    assert (tmp_path / "dis_metrics/protocol=fast/seed=3/100.json").is_file()
    assert not (tmp_path / "dis_metrics/100.json").exists() and not (tmp_path / "results.json").exists()


def test_units_that_are_not_reduced(tmp_path, in_process):
    cases.write_latents(tmp_path)
    flat = Metric("Flat", cases.spread, "spread", reduce=False)
    path = scoring.score_folder(tmp_path, 1, metrics={"flat": flat, "spread": cases.SPREAD}).written[0]
    content = json.loads(path.read_text())
    assert content["Flat"]["units"] == 6 and content["Spread"]["units"] == 3


def test_a_part_that_fails_costs_only_itself(tmp_path, in_process):
    cases.write_latents(tmp_path / "run")
    broken = QUICK | {"broken": Metric("Broken", cases.raise_error, "none")}
    report = scoring.score_folder(tmp_path, 1, metrics=broken)
    assert [failure.reason for failure in report.failures] == ["broken: no such number"]
    assert set(json.loads(report.written[0].read_text())) == {"Spread", "Sizes"}
    in_process.clear()
    assert len(scoring.score_folder(tmp_path, 1, metrics=broken).failures) == 1, "tried again"
    in_process.clear()
    repaired = QUICK | {"broken": Metric("Broken", cases.spread, "spread")}
    assert len(scoring.score_folder(tmp_path, 1, metrics=repaired).written) == 1
    assert [key[-1] for key in in_process] == ["prepare", "broken"], "finished parts are not computed again"


def test_an_interrupted_command_continues(tmp_path, in_process, monkeypatch):
    cases.write_latents(tmp_path / "run")
    add = ScoreTask.add

    def interrupt_after_three(task, name, outcome):
        add(task, name, outcome)
        if len(task.missing) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(ScoreTask, "add", interrupt_after_three)
    with pytest.raises(KeyboardInterrupt):
        scoring.score_folder(tmp_path, 1, metrics=QUICK)
    monkeypatch.setattr(ScoreTask, "add", add)
    kept = {path.stem for path in (tmp_path / "run/dis_metrics/records/100").iterdir()}
    assert len(kept) == 3 and not (tmp_path / "run/dis_metrics/100.json").exists()
    in_process.clear()
    assert len(scoring.score_folder(tmp_path, 1, metrics=QUICK).written) == 1
    assert len(in_process) == 3 and not kept & {key[-1].replace("/", "-") for key in in_process}
    assert not (tmp_path / "run/dis_metrics/records/100").exists()


def test_interrupted_just_before_the_score_file(tmp_path, in_process, monkeypatch):
    cases.write_latents(tmp_path / "run")
    finish = ScoreTask.finish
    monkeypatch.setattr(ScoreTask, "finish", lambda task: sys.exit("killed"))
    with pytest.raises(SystemExit):
        scoring.score_folder(tmp_path, 1, metrics=QUICK)
    monkeypatch.setattr(ScoreTask, "finish", finish)
    in_process.clear()
    assert len(scoring.score_folder(tmp_path, 1, metrics=QUICK).written) == 1
    assert in_process == []


def test_interrupted_just_after_the_score_file(tmp_path, in_process, monkeypatch):
    cases.write_latents(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr("ldm.scoring.tasks.shutil.rmtree", lambda *args, **options: None)
        path = scoring.score_folder(tmp_path, 1, metrics=QUICK).written[0]
    left, record = path.parent / "records/100", path.parent / "records/100.json"
    before = record.stat().st_mtime_ns, path.stat().st_mtime_ns
    assert left.is_dir()
    in_process.clear()
    assert not scoring.score_folder(tmp_path, 1, metrics=QUICK).written and in_process == []
    assert not left.exists() and (record.stat().st_mtime_ns, path.stat().st_mtime_ns) == before


def test_kept_parts_of_another_file_are_dropped(tmp_path, in_process):
    cases.write_latents(tmp_path)
    path = scoring.score_folder(tmp_path, 1, metrics=QUICK).written[0]
    path.unlink()
    cases.write_latents(tmp_path, latents=np.random.default_rng(0).normal(size=(60, 3)))
    in_process.clear()
    scoring.score_folder(tmp_path, 1, metrics=QUICK)
    assert len(in_process) == 6


def test_what_a_report_draws_is_added_to_scores_from_elsewhere(tmp_path, in_process):
    cases.write_latents(tmp_path, epoch=1, step=50)
    cases.write_latents(tmp_path, epoch=2, step=100)
    for step in (50, 100):
        (tmp_path / "dis_metrics").mkdir(exist_ok=True)
        (tmp_path / f"dis_metrics/{step}.json").write_text('{"dci": {"disentanglement": 0.5}}')
    sizes = {"dci": Metric("dci", cases.total_size, "disentanglement", part=cases.factor_size, join=cases.total_size)}
    assert not scoring.score_folder(tmp_path, 1, metrics=sizes).written and in_process == []
    report = scoring.score_folder(tmp_path, 1, metrics=sizes, for_report=True)
    assert not report.written and not report.failures
    assert {key[-1] for key in in_process} == {"prepare", "information", "dci/0", "dci/1", "dci/2"}
    assert "information" in read_record(tmp_path / "dis_metrics/100.json")
    assert not read_record(tmp_path / "dis_metrics/50.json")


@pytest.mark.parametrize(
    "change,message",
    [
        ({"latents": np.ones((59, 3, 2))}, r"holds 59 images, but its factors make 60 \(4 x 3 x 5"),
        ({"latents": np.ones((600, 3, 2))}, "every image 10 times"),
        ({"latents": np.full((60, 3, 2), np.nan)}, "nan in unit 0, first in row 0"),
        ({"latents": np.ones((60, 3))}, "no unit varies"),
        ({"latents": None}, "expected latents and num_samples"),
        ({"num_samples": None}, "expected latents and num_samples"),
        ({"latents": np.ones(60)}, r"shape \(60,\)"),
        ({"latents": np.array([["a"]])}, "expected numbers"),
        ({"factor_sizes": None}, "name the data set with -d"),
        ({"factor_sizes": np.array([4, 0, 5])}, "every size must be at least 1"),
        ({"latents": np.ones((60, 5000))}, "are the axes exchanged"),
        ({"latents": np.ones((0, 3))}, "not empty"),
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
    assert not any(failure.is_settled for failure in report.failures)
    assert "--watch waits for it" in report.failures[0].reason
    again = scoring.score_folder(tmp_path, 1, metrics=QUICK, skip=frozenset(map(scoring.file_state, report.failures)))
    assert not again.failures


def test_compressed_and_plain_files_give_the_same_latents(tmp_path):
    plain = cases.write_latents(tmp_path / "plain")
    packed = tmp_path / "packed.npz"
    with np.load(plain) as content:
        np.savez_compressed(packed, **content)
    mapped, unpacked = (open_array(array_source(path), tmp_path / "scratch") for path in (plain, packed))
    assert isinstance(mapped, np.memmap) and isinstance(unpacked, np.memmap)
    assert np.array_equal(mapped, unpacked)
    assert zipfile.ZipFile(packed).testzip() is None
    assert (read_latent_file(plain).epoch, read_latent_file(packed).epoch) == (0, None)


def config_of(run: Path, target: str, params: str = "{}") -> None:
    (run / "configs").mkdir(parents=True)
    text = f"data:\n  target: main.DataModuleFromConfig\n  params:\n    test:\n      target: {target}\n"
    text += f"      params: {{{params}}}\n" if params != "{}" else ""
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
    assert sorted(read_record(tmp_path / "run/dis_metrics/100.json")) == [
        "information",
        "sizes/0",
        "sizes/1",
        "sizes/2",
        "spread",
    ]


def test_scoring_never_imports_torch():
    code = "import ldm.scoring.command, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
