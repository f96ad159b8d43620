"""``--trust``: one engine, results of its own that are kept, a table, a figure, and sentences about the noise."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import score_cases as cases
from rich.console import Console
from test_report import Page, assert_self_contained
from test_scoring import EngineInProcess

from ldm.metrics import select_metrics
from ldm.metrics.trust import RANDOM, VARIANTS
from ldm.scoring import command
from ldm.scoring import run as scoring
from ldm.scoring.command import run_scoring
from ldm.scoring.plan import plan_run
from ldm.scoring.report.svg import intervals
from ldm.scoring.run import Options, Report, score_folder
from ldm.scoring.table import Row
from ldm.scoring.text_table import text_tables
from ldm.scoring.trust import Trust, trust_table
from ldm.util import UserError

ROOT = Path(__file__).parents[2]
METRICS = select_metrics("fast", ["mig", "factor_vae"])
DCI = select_metrics("fast", ["dci"])


@pytest.fixture(autouse=True)
def in_process(monkeypatch):
    EngineInProcess.keys = []
    monkeypatch.setattr(scoring, "Engine", EngineInProcess)
    return EngineInProcess.keys


def write_run(run: Path, noise: float = 0.3, seed: int = 0, **change) -> None:
    factors = cases.SPACE.factors_of(np.arange(60))
    codes = factors + np.random.default_rng(seed).normal(scale=noise, size=factors.shape)
    cases.write_latents(run, epoch=1, step=100, latents=codes[:, :, None].astype(np.float32))
    cases.write_latents(run, epoch=2, step=200, **({"latents": codes.astype(np.float32)} | change))


def options(logdir: Path, **change) -> Options:
    return Options(**({"logdir": logdir, "metrics": METRICS, "protocol": "fast", "trust": 3} | change))


def trust_files(run: Path) -> dict[str, object]:
    folder = run / "dis_metrics/protocol=fast/trust"
    return {path.relative_to(folder).as_posix(): json.loads(path.read_text()) for path in folder.rglob("*.json")}


def without_times(content):
    if isinstance(content, dict):
        return {key: without_times(value) for key, value in content.items() if key != "seconds"}
    return content


def test_the_latest_checkpoint_of_every_run(tmp_path, capsys):
    for name in ("a_s0", "b_s0"):
        write_run(tmp_path / name)
    assert run_scoring(options(tmp_path)) == 0
    text = capsys.readouterr().out
    assert "How far the scores can be trusted" in text and "random codes" in text
    assert not (tmp_path / "a_s0/dis_metrics/protocol=fast/trust/100").exists()
    found = trust_files(tmp_path / "a_s0")
    expected = {f"200/{name}.json" for name in (*VARIANTS, "replicate-1", "replicate-2", "replicate-3")}
    assert {name for name in found if "records" not in name} == {"200.json"} | expected
    mig = found["200.json"]["MIG"]
    low, high = mig["interval"]
    score = json.loads((tmp_path / "a_s0/dis_metrics/protocol=fast/200.json").read_text())["MIG"]["discrete_mig"]
    assert low <= mig["figure"] == score <= high and len(set(mig["replicates"])) == 3 and mig["rows"] == "all"
    assert mig["order"] == pytest.approx(score) and mig["doubled"] < 0.01 and mig["random"] < 0.2
    assert sorted(path.name for path in (tmp_path / "a_s0/dis_metrics").iterdir()) == ["protocol=fast"]


def test_scores_are_the_same_with_and_without(tmp_path):
    for name in ("with", "without"):
        write_run(tmp_path / name / "run")
        score_folder(options(tmp_path / name, trust=3 if name == "with" else None))
    files = [tmp_path / name / "run/dis_metrics/protocol=fast/200.json" for name in ("with", "without")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert not (files[1].parent / "trust").exists()


def test_an_interrupted_command_continues(tmp_path, in_process, monkeypatch):
    """Killed after each job: every job is computed once, and the results are those of an uninterrupted command."""
    write_run(tmp_path / "whole/run")
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")  # with the times of the files
    run_scoring(options(tmp_path / "whole", metrics=METRICS | DCI))
    computed = [key for key in in_process if key[2] != "prepare"]
    in_process.clear()
    take, count = scoring._Scoring._take, 0

    def take_some(self, outcome):
        nonlocal count
        take(self, outcome)
        count += 1
        if count % 7 == 0:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(scoring._Scoring, "_take", take_some)
        for _ in range(100):
            try:
                run_scoring(options(tmp_path / "parts", metrics=METRICS | DCI))
                break
            except KeyboardInterrupt:
                continue
    assert len([key for key in in_process if key[2] != "prepare"]) == len(computed)
    assert without_times(trust_files(tmp_path / "parts/run")) == without_times(trust_files(tmp_path / "whole/run"))
    in_process.clear()
    run_scoring(options(tmp_path / "parts", metrics=METRICS | DCI))
    assert not in_process, "nothing is computed again"
    run_scoring(options(tmp_path / "parts", metrics=METRICS | DCI, trust=4))
    assert {key[2] for key in in_process} == {"prepare", "mig", "factor_vae", "dci/0", "dci/1", "dci/2"}
    assert len(in_process) == 6, "one more replicate"


def test_perfect_and_small_codes(tmp_path):
    """The interval of perfect codes contains 1; FactorVAE of codes x 0.1 shows that it depends on the scale."""
    factors = cases.SPACE.factors_of(np.arange(60))
    write_run(tmp_path / "run", latents=(0.1 * factors).astype(np.float32))
    run_scoring(options(tmp_path))
    found = trust_files(tmp_path / "run")["200.json"]["factor_VAE"]
    assert found["interval"][0] <= 1 <= found["interval"][1] <= 1
    assert found["scale=0.1"] == 0 and found["scale=10"] == found["standardized"] == 1


def test_rows_of_a_table_are_resampled(tmp_path, capsys):
    rng = np.random.default_rng(0)
    labels = rng.integers(3, size=(200, 2))
    np.save(tmp_path / "z.npy", labels + rng.normal(scale=0.4, size=labels.shape))
    np.savetxt(tmp_path / "t.csv", labels, delimiter=",", header="hue,shape", comments="", fmt="%d")
    names = {"latents": tmp_path / "z.npy", "factors": tmp_path / "t.csv", "out": tmp_path / "s.json", "report": True}
    assert run_scoring(options(tmp_path, **names)) == 0
    mig = json.loads((tmp_path / "trust/s.json").read_text())["MIG"]
    assert mig["rows"] == "bootstrap" and mig["interval"][1] - mig["interval"][0] > 0.02
    assert "bootstrap samples of the rows" in " ".join(capsys.readouterr().out.split())
    page = Page(tmp_path / "s.html")
    assert "How far the scores can be trusted" in page.text and page.tags.count("svg") >= 1


def test_report_and_files_have_table_and_figure(tmp_path, capsys):
    for seed in (0, 1):
        write_run(tmp_path / f"good_s{seed}", 0.1, seed)
        write_run(tmp_path / f"bad_s{seed}", 0.9, seed)
    files = {kind: str(tmp_path / f"table.{kind}") for kind in ("csv", "latex", "markdown")}
    assert run_scoring(options(tmp_path, report=True, **files)) == 0
    for path in (tmp_path / "report.html", tmp_path / "bad_s0/report.html"):
        page = Page(path)
        assert_self_contained(page, path)
        for text in ("How far the scores can be trusted", "95% interval", "PCA of the latents", "number of units"):
            assert text in page.text
    markdown, latex = Path(files["markdown"]).read_text(), Path(files["latex"]).read_text()
    assert markdown.count("| --- |") >= 2 and "| good_s0 @ 200 | MIG |" in markdown
    assert latex.count(r"\begin{tabular}") == latex.count(r"\end{tabular}") == 2 and "95\\% interval" in latex
    assert "differ by less than the noise" in " ".join(capsys.readouterr().out.split())


def row(run: str, experiment: str = "e", dataset: str | None = "shapes3d") -> Row:
    return Row(experiment, run, Path(run), 0, 100, 1, True, {}, {}, {}, dataset)


def trust_of(figure: float, replicates: list[float], run: str, **about) -> Trust:
    return Trust(row(run, **about), run, "mig", figure, dict(enumerate(replicates, start=1)), {}, False)


def notes(*trusts: Trust) -> str:
    return "\n".join(trust_table(trusts, "disdiff").notes)


def test_pairs_are_compared_by_replicates_of_equal_seeds():
    shared = np.random.default_rng(0).normal(scale=0.05, size=10)
    first, second = trust_of(0.61, list(0.61 + shared), "A"), trust_of(0.58, list(0.58 + shared), "B")
    assert first.interval[0] < second.figure < first.interval[1]
    assert "All pairs of runs differ by more than the noise." in notes(first, second), "the noise is the same"
    third = trust_of(0.58, list(0.58 - shared), "C")
    text = notes(first, third)
    assert "MIG: A (0.610) and C (0.580) differ by less than the noise (95% interval of the difference: -" in text
    assert "less than the noise" not in notes(first, trust_of(0.58, list(0.58 - shared), "C", dataset="cars3d"))


def test_runs_without_a_difference_share_a_note():
    text = notes(*(trust_of(1.0, [1.0, 1.0], name) for name in "ABCD"))
    assert text.count("less than the noise") == 1 and "MIG: all 4 runs of shapes3d differ" in text


def test_experiments_are_compared_over_their_runs():
    values = {"x": (0.5, 0.6, 0.7), "y": (0.55, 0.66, 0.72), "z": (0.1, 0.11, 0.12)}
    trusts = [
        trust_of(value, [value, value], f"{name}{seed}", experiment=name)
        for name, group in values.items()
        for seed, value in enumerate(group)
    ]
    text = notes(*trusts)
    assert "mean of 3 runs of x (0.600) and mean of 3 runs of y (0.643) differ by less" in text
    assert "runs of z" not in text


def test_many_pairs_are_counted():
    rng = np.random.default_rng(0)
    trusts = [trust_of(0.5, list(rng.normal(0.5, 0.01, size=5)), f"r{number}") for number in range(8)]
    trusts.append(trust_of(0.9, list(rng.normal(0.9, 0.01, size=5)), "best"))
    text = notes(*trusts)
    assert text.count("less than the noise (") == 20 and "8 more pairs differ by less than the noise" in text


def test_one_unit_and_failing_metrics_cost_themselves_alone(tmp_path):
    codes = cases.SPACE.factors_of(np.arange(60))[:, :1].astype(np.float32)
    write_run(tmp_path / "run", latents=codes)
    metrics = METRICS | DCI | {"broken": cases.Metric("broken", cases.raise_error, "value")}
    report = score_folder(options(tmp_path, metrics=metrics))
    reasons = [failure.reason for failure in report.failures if failure.path.stem == "epoch=000002"]
    assert sorted({reason.split(":")[0] for reason in reasons}) == ["broken", "dci", "mig"]
    assert len(reasons) == 3, "a variant that fails as the score does is not repeated"
    found = trust_files(tmp_path / "run")
    assert "200/removed.json" not in found and "factor_VAE" in found["200/replicate-1.json"]


def test_the_failure_of_a_score_replaces_those_of_its_variants(tmp_path):
    write_run(tmp_path / "run")
    [plan] = [
        plan
        for plan in plan_run(tmp_path / "run", None, options(tmp_path).settings(), False, frozenset(), [], 2)
        if len(plan.scores) > 1
    ]
    report = Report()
    each = scoring._Scoring([plan], tmp_path, None, report, lambda done, total: None)
    score, replicate, random = plan.scores[0], plan.scores[1], plan.scores[3]
    for found in (replicate, random, replicate, score, score, random):
        each._fail(found, "mig: no value")
    each._fail(random, "dci: no value")
    assert [failure.reason for failure in report.failures] == ["mig: no value", "random codes: dci: no value"]


def test_too_few_replicates_are_refused(tmp_path):
    write_run(tmp_path / "run")
    with pytest.raises(UserError, match="--trust: expected at least 2 replicates, got 1"):
        run_scoring(options(tmp_path, trust=1))


def test_without_a_score_there_is_no_table(tmp_path, capsys):
    (tmp_path / "run/dis_repre").mkdir(parents=True)
    assert run_scoring(options(tmp_path)) == 0
    assert "trusted" not in capsys.readouterr().out


def test_tables_fit_the_terminal():
    trusts = [replace(trust_of(0.868, [0.85, 0.88], "2026-01-01_run"), variants=dict.fromkeys(VARIANTS, 0.123))]
    for width, least in ((240, 1), (80, 2)):
        tables = text_tables(trust_table(trusts, "disdiff"), width)
        assert len(tables) >= least and (least > 1 or len(tables) == 1)
        stream = io.StringIO()
        for table in tables:
            Console(file=stream, width=width).print(table)
        text = stream.getvalue()
        assert text.count("0.123") == len(VARIANTS) and "0.868" in text and max(map(len, text.splitlines())) <= width
        assert text.count("interval:") == 1


def test_chart_of_intervals():
    chart = intervals([("MIG", 0.4, (0.3, 0.5), [("random codes", 0.1, 1)]), ("DCI", 0.6, None, [])], "scores")
    assert chart.count("<circle") == 3 and chart.count('<line class="c0"') == 3
    assert "MIG: 0.4000 (0.3000 to 0.5000)" in chart and "MIG, random codes: 0.1000" in chart


def test_command_line():
    text = subprocess.run(
        [sys.executable, ROOT / "run_para_metrics.py", "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert "run_para_metrics.py -l logs --trust --report" in text and "--trust [N]" in text
    assert command.Options.trust is None


@pytest.mark.parametrize(("chance", "is_named"), [(0.5, True), (0.1, False), (None, False)])
def test_scores_at_chance_are_named(chance, is_named):
    about = trust_of(0.45, [0.4, 0.5, 0.45], "a")
    trust = replace(about, variants={} if chance is None else {RANDOM: chance})
    notes = " ".join(trust_table([trust], "disdiff").notes)
    assert ("MIG of a (0.450) is not better than that of random codes" in notes) == is_named == trust.is_chance
