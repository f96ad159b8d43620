"""From stored representations to score files: planning, resuming, failures and messages."""

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
from ldm.scoring.engine import Job, Outcome
from ldm.scoring.files import find_runs, read_latent_file, read_record, record_file
from ldm.scoring.plan import ScorePlan
from ldm.util import UserError

QUICK = {"spread": cases.SPREAD, "sizes": cases.SIZES}


class EngineInProcess:
    """Runs jobs in this process, as ``Engine`` does in others; collects their keys."""

    keys: list = []
    num_workers = 1

    def __init__(self, num_workers: int, folder: Path, scheduler: str | None) -> None:
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
            EngineInProcess.keys.append(job.key)
            try:
                outcome = Outcome(job, job.function(*job.args))
            except Exception as error:
                outcome = Outcome(job, error=str(error))
            yield outcome


@pytest.fixture
def in_process(monkeypatch):
    EngineInProcess.keys = []
    monkeypatch.setattr(scoring, "Engine", EngineInProcess)
    return EngineInProcess.keys


def reasons(report) -> str:
    return "\n".join(failure.reason for failure in report.failures)


def test_scores_every_run_and_only_once(tmp_path, in_process):
    for name in ("a/2026-01-01T00-00-00_x_s0", "b"):
        cases.write_latents(tmp_path / name, epoch=1, step=50)
        cases.write_latents(tmp_path / name, epoch=2, step=100)
    steps = []
    report = cases.score(tmp_path, 1, metrics=QUICK, on_progress=lambda *seconds: steps.append(seconds))
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
    assert not cases.score(tmp_path / "b", 1, metrics=QUICK).written
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
    cases.score(tmp_path, 1, metrics={"spread": cases.SPREAD, "sizes": slow})
    names = [key[-1] for key in in_process]
    assert names == ["prepare", "sizes/2", "sizes/0", "sizes/1", "spread", "information"]


def test_another_seed_has_its_own_place(tmp_path, in_process):
    cases.write_latents(tmp_path)
    cases.score(tmp_path, 1, seeds="7", metrics=QUICK)
    content = json.loads((tmp_path / "dis_metrics/seed=7/100.json").read_text())
    assert content["Spread"]["draw"] == np.random.RandomState(7).randint(1000)
    assert not (tmp_path / "results.json").exists()


def test_seeds_share_one_reduction_and_one_table(tmp_path, in_process):
    cases.write_latents(tmp_path)
    report = cases.score(tmp_path, 1, seeds="0-2", metrics=QUICK)
    assert len(report.written) == 3
    names = [key[-1] for key in in_process]
    assert names.count("prepare") == 1 and names.count("spread") == 3 and names.count("information") == 1
    draws = {json.loads(path.read_text())["Spread"]["draw"] for path in report.written}
    assert draws == {np.random.RandomState(seed).randint(1000) for seed in (0, 1, 2)}


def test_the_record_has_protocol_data_set_seed_and_versions(tmp_path, in_process):
    cases.write_latents(tmp_path)
    config_of(tmp_path, "ldm.data.factors.mpi3d.MPI3D", "variant: real")
    space = FactorSpace(("hue", "shape", "size"), (4, 3, 5))
    cases.write_latents(tmp_path, factor_space=np.array(json.dumps(space.to_dict())))
    report = cases.score(tmp_path, 1, metrics=QUICK)
    record = read_record(record_file(report.written[0]))
    assert sorted(record) == ["information", "sizes/0", "sizes/1", "sizes/2", "spread"]
    entry = record["sizes/2"]
    assert entry["result"] == {"size": 5} and entry["seed"] == 0 and entry["protocol"] == "disdiff"
    assert entry["dataset"]["name"] == "mpi3d_real" and entry["dataset"]["variant"] == {"variant": "real"}
    assert entry["versions"]["numpy"] == np.__version__ and entry["seconds"] >= 0
    shared = np.array(record["information"]["result"]["mutual_information"])
    assert shared.shape == (3, 3) and (shared.argmax(axis=1) == [0, 1, 2]).all()


def test_more_metrics_lengthen_the_score_file(tmp_path, in_process):
    cases.write_latents(tmp_path)
    path = cases.score(tmp_path, 1, metrics={"spread": cases.SPREAD}).written[0]
    foreign = json.loads(path.read_text()) | {"MIG": {"discrete_mig": 0.5}}
    path.write_text(json.dumps(foreign))
    in_process.clear()
    assert cases.score(tmp_path, 1, metrics=QUICK).written == [path]
    assert {key[-1] for key in in_process} == {"prepare", "sizes/0", "sizes/1", "sizes/2"}
    content = json.loads(path.read_text())
    assert content["MIG"] == {"discrete_mig": 0.5} and set(content) == {"MIG", "Spread", "Sizes"}
    assert {"spread", "sizes/1"} <= read_record(record_file(path)).keys()


def test_another_protocol_has_its_own_place(tmp_path, in_process):
    cases.write_latents(tmp_path)
    cases.score(tmp_path, 1, metrics=QUICK, protocol="fast", seeds="0,3")
    assert (tmp_path / "dis_metrics/protocol=fast/100.json").is_file()
    assert (tmp_path / "dis_metrics/protocol=fast/seed=3/100.json").is_file()
    assert not (tmp_path / "dis_metrics/100.json").exists() and not (tmp_path / "results.json").exists()


def test_units_that_are_not_reduced(tmp_path, in_process):
    cases.write_latents(tmp_path)
    flat = Metric("Flat", cases.spread, "spread", reduce=False)
    path = cases.score(tmp_path, 1, metrics={"flat": flat, "spread": cases.SPREAD}).written[0]
    content = json.loads(path.read_text())
    assert content["Flat"]["units"] == 6 and content["Spread"]["units"] == 3


def test_a_part_that_fails_costs_only_itself(tmp_path, in_process):
    cases.write_latents(tmp_path / "run")
    broken = QUICK | {"broken": Metric("Broken", cases.raise_error, "none")}
    report = cases.score(tmp_path, 1, metrics=broken)
    assert [failure.reason for failure in report.failures] == ["broken: no such number"]
    assert set(json.loads(report.written[0].read_text())) == {"Spread", "Sizes"}
    in_process.clear()
    assert len(cases.score(tmp_path, 1, metrics=broken).failures) == 1, "tried again"
    in_process.clear()
    repaired = QUICK | {"broken": Metric("Broken", cases.spread, "spread")}
    assert len(cases.score(tmp_path, 1, metrics=repaired).written) == 1
    assert [key[-1] for key in in_process] == ["prepare", "broken"], "finished parts are not computed again"


def test_parts_that_cannot_be_joined_cost_their_metric_alone(tmp_path, in_process):
    cases.write_latents(tmp_path / "run")
    broken = Metric("Broken", cases.total_size, "none", part=cases.factor_size, join=cases.raise_error)
    report = cases.score(tmp_path, 1, metrics=QUICK | {"broken": broken})
    assert len(report.failures) == 1 and "broken: TypeError" in report.failures[0].reason
    assert set(json.loads(report.written[0].read_text())) == {"Spread", "Sizes"}


def test_numbers_that_are_not_finite_become_null(tmp_path, in_process):
    cases.write_latents(tmp_path)
    path = cases.score(tmp_path, 1, metrics={"null": Metric("Null", cases.not_finite, "value")}).written[0]
    reasons = {"value": "nan", "values": "inf"}
    assert json.loads(path.read_text()) == {"Null": {"value": None, "values": [1.0, None], "reason": reasons}}


def test_an_interrupted_command_continues(tmp_path, in_process, monkeypatch):
    cases.write_latents(tmp_path / "run")
    add = ScorePlan.add

    def interrupt_after_three(task, name, outcome):
        add(task, name, outcome)
        if len(task.missing) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(ScorePlan, "add", interrupt_after_three)
    with pytest.raises(KeyboardInterrupt):
        cases.score(tmp_path, 1, metrics=QUICK)
    monkeypatch.setattr(ScorePlan, "add", add)
    kept = {path.stem for path in (tmp_path / "run/dis_metrics/records/100").iterdir()}
    assert len(kept) == 3 and not (tmp_path / "run/dis_metrics/100.json").exists()
    in_process.clear()
    assert len(cases.score(tmp_path, 1, metrics=QUICK).written) == 1
    assert len(in_process) == 3 and not kept & {key[-1].replace("/", "-") for key in in_process}
    assert not (tmp_path / "run/dis_metrics/records/100").exists()


def test_interrupted_just_before_the_score_file(tmp_path, in_process, monkeypatch):
    cases.write_latents(tmp_path / "run")
    finish = ScorePlan.finish
    monkeypatch.setattr(ScorePlan, "finish", lambda task, failures: sys.exit("killed"))
    with pytest.raises(SystemExit):
        cases.score(tmp_path, 1, metrics=QUICK)
    monkeypatch.setattr(ScorePlan, "finish", finish)
    in_process.clear()
    assert len(cases.score(tmp_path, 1, metrics=QUICK).written) == 1
    assert in_process == []


def test_interrupted_just_after_the_score_file(tmp_path, in_process, monkeypatch):
    cases.write_latents(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr("ldm.scoring.plan.shutil.rmtree", lambda *args, **options: None)
        path = cases.score(tmp_path, 1, metrics=QUICK).written[0]
    left, record = path.parent / "records/100", path.parent / "records/100.json"
    before = record.stat().st_mtime_ns, path.stat().st_mtime_ns
    assert left.is_dir()
    in_process.clear()
    assert not cases.score(tmp_path, 1, metrics=QUICK).written and in_process == []
    assert not left.exists() and (record.stat().st_mtime_ns, path.stat().st_mtime_ns) == before


def test_kept_parts_of_another_file_are_dropped(tmp_path, in_process):
    cases.write_latents(tmp_path)
    path = cases.score(tmp_path, 1, metrics=QUICK).written[0]
    path.unlink()
    cases.write_latents(tmp_path, latents=np.random.default_rng(0).normal(size=(60, 3)))
    in_process.clear()
    cases.score(tmp_path, 1, metrics=QUICK)
    assert len(in_process) == 6


def test_what_a_report_draws_is_added_to_scores_from_elsewhere(tmp_path, in_process):
    cases.write_latents(tmp_path, epoch=1, step=50)
    cases.write_latents(tmp_path, epoch=2, step=100)
    for step in (50, 100):
        (tmp_path / "dis_metrics").mkdir(exist_ok=True)
        (tmp_path / f"dis_metrics/{step}.json").write_text('{"dci": {"disentanglement": 0.5}}')
    sizes = {"dci": Metric("dci", cases.total_size, "disentanglement", part=cases.factor_size, join=cases.total_size)}
    assert not cases.score(tmp_path, 1, metrics=sizes).written and in_process == []
    report = cases.score(tmp_path, 1, metrics=sizes, report=True)
    assert not report.written and not report.failures
    assert {key[-1] for key in in_process} == {"prepare", "information", "dci/0", "dci/1", "dci/2"}
    assert "information" in read_record(record_file(tmp_path / "dis_metrics/100.json"))
    assert not read_record(record_file(tmp_path / "dis_metrics/50.json"))


@pytest.mark.parametrize(
    "change,message",
    [
        ({"latents": np.ones((59, 3, 2))}, r"expected 60 images \(4 x 3 x 5: hue, shape, size\), got 59"),
        ({"latents": np.ones((600, 3, 2))}, "Every image occurs 10 times"),
        ({"latents": np.full((60, 3, 2), np.nan)}, "nan in unit 0, first in row 0"),
        ({"latents": np.ones((60, 3))}, "no unit varies"),
        ({"latents": None}, "expected latents and num_samples"),
        ({"num_samples": None}, "expected latents and num_samples"),
        ({"latents": np.ones(60)}, r"expected shape \(N, U, D\) or \(N, K\), .*got \(60,\)"),
        ({"latents": np.array([["a"]])}, "expected numbers"),
        ({"factor_sizes": None}, "Name the data set with -d"),
        ({"factor_sizes": np.array([4, 0, 5])}, "every size must be at least 1"),
        ({"latents": np.ones((60, 5000))}, "at most 4096 units, got 5000 for 60 images.*latents.T"),
        ({"latents": np.ones((0, 3))}, r"not empty; got \(0, 3\)"),
    ],
)
def test_files_that_cannot_be_scored_have_a_reason_and_others_are_scored(tmp_path, in_process, change, message):
    bad = cases.write_latents(tmp_path / "bad", **change)
    cases.write_latents(tmp_path / "good")
    report = cases.score(tmp_path, 1, metrics=QUICK)
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
    report = cases.score(tmp_path, 1, metrics=QUICK)
    assert len(report.written) == 1
    assert len(report.failures) == 3
    assert all("is damaged or incomplete" in failure.reason for failure in report.failures)
    assert not any(failure.is_settled for failure in report.failures)
    assert "--watch waits for it" in report.failures[0].reason
    skip = frozenset(failure.file_state for failure in report.failures)
    again = cases.score(tmp_path, 1, metrics=QUICK, skip=skip)
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
    report = cases.score(tmp_path, 1, metrics=QUICK)
    assert json.loads(report.written[0].read_text())["Sizes"] == {"total": 211}


def test_sources_that_disagree(tmp_path, in_process):
    cases.write_latents(tmp_path / "run")
    config_of(tmp_path / "run", "ldm.data.world.World3D")
    assert "the config of the run is shapes3d" in reasons(cases.score(tmp_path, 1, metrics=QUICK))
    assert "got -d mpi3d" in reasons(cases.score(tmp_path, 1, "mpi3d", metrics=QUICK))
    cases.write_latents(tmp_path / "bare")
    assert "remove -d" in reasons(cases.score(tmp_path / "bare", 1, "cars3d", metrics=QUICK))
    assert "Did you mean 'cars3d'" in reasons(cases.score(tmp_path / "bare", 1, "cars3", metrics=QUICK))


def test_a_config_that_is_not_yaml(tmp_path, in_process):
    cases.write_latents(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "x-project.yaml").write_text("a: [")
    assert "not a valid YAML file" in reasons(cases.score(tmp_path, 1, metrics=QUICK))


def test_find_runs(tmp_path):
    for folder in ("a/dis_repre", "b/c/checkpoints", "d/configs", "a/clip/checkpoints"):
        (tmp_path / folder).mkdir(parents=True)
    assert [run.relative_to(tmp_path).as_posix() for run in find_runs(tmp_path)] == ["a", "a/clip", "b/c"]
    with pytest.raises(UserError, match="no such folder"):
        find_runs(tmp_path / "none")


def test_workers_killed_in_the_middle_cost_their_metric_alone(tmp_path):
    cases.write_latents(tmp_path / "run")
    deadly = {"spread": cases.SPREAD, "deadly": Metric("Deadly", cases.kill_itself, "none"), "sizes": cases.SIZES}
    report = cases.score(tmp_path, 2, metrics=deadly)
    assert len(report.failures) == 1 and "deadly: its worker process was killed 3 times" in report.failures[0].reason
    assert sorted(read_record(record_file(tmp_path / "run/dis_metrics/100.json"))) == [
        "information",
        "sizes/0",
        "sizes/1",
        "sizes/2",
        "spread",
    ]


def test_scoring_never_imports_torch():
    code = "import ldm.scoring.command, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
