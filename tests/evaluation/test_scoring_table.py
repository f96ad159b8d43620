"""The table over runs and seeds, its CSV, and what scoring leaves in results.json."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
import score_cases as cases
from rich.console import Console

from ldm.evaluation.score_table import collect_rows, score_table, write_csv
from ldm.evaluation.scoring import publish_latest


def write_score(run: Path, step: int, factor_vae: float) -> None:
    folder = run / "dis_metrics"
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "beta_VAE": {"eval_accuracy": 1.0},
        "dci": {"disentanglement": 0.5},
        "MIG": {"discrete_mig": 0.25},
        "factor_VAE": {"eval_accuracy": factor_vae},
    }
    (folder / f"{step}.json").write_text(json.dumps(content))


def text_of(rows) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(score_table(rows))
    return console.file.getvalue()


@pytest.fixture
def logdir(tmp_path) -> Path:
    for seed, score in ((0, 0.8), (1, 0.9)):
        run = tmp_path / f"2026-01-0{seed + 1}T00-00-00_dis_s{seed}"
        write_score(run, 100, 0.1)
        write_score(run, 2000, score)
    write_score(tmp_path / "other", 5, 0.7)
    return tmp_path


def test_seeds_of_one_experiment_are_averaged(logdir):
    text = text_of(collect_rows(logdir))
    assert "mean ± std of 2 runs" in text and "0.850 ± 0.071" in text
    assert "0.100" not in text, "only the latest checkpoint is shown"
    assert text.count("2000") == 2 and "PSNR" not in text


def test_rows_know_experiment_seed_step_and_epoch(logdir):
    run = logdir / "2026-01-01T00-00-00_dis_s0"
    cases.write_latents(run, epoch=7, step=2000)
    rows = [row for row in collect_rows(logdir) if row.run == run.name]
    assert [(row.experiment, row.seed, row.step, row.epoch, row.latest) for row in rows] == [
        ("dis", 0, 100, None, False),
        ("dis", 0, 2000, 7, True),
    ]


@pytest.mark.parametrize(
    "folder,record,expected",
    [
        ("2026-01-01T00-00-00_world-s3", None, ("world", 3)),
        ("2026-01-01T00-00-00_units8", None, ("units8", None)),
        ("sweep/s2", None, ("sweep", 2)),
        ("sweep/2026-01-01T00-00-00_b", {"name": "world_s4", "seed": 4}, ("sweep/world", 4)),
        ("x", {"name": "plain", "seed": 23}, ("plain", 23)),
    ],
)
def test_experiment_names(tmp_path, folder, record, expected):
    write_score(tmp_path / folder, 1, 0.5)
    if record:
        (tmp_path / folder / "run.json").write_text(json.dumps(record))
    row = collect_rows(tmp_path)[0]
    assert (row.experiment, row.seed) == expected


def test_figures_of_other_evaluations_stand_beside(logdir):
    (logdir / "other" / "results.json").write_text('{"psnr": 31.5, "edit_accuracy": 0.75, "clip_accuracy": null}')
    text = text_of(collect_rows(logdir))
    assert "31.500" in text and "edit acc." in text and "CLIP acc." not in text


def test_csv_has_every_checkpoint(logdir, tmp_path):
    write_csv(tmp_path / "all.csv", collect_rows(logdir))
    with (tmp_path / "all.csv").open() as stream:
        lines = list(csv.DictReader(stream))
    assert [(line["step"], line["latest"]) for line in lines[:2]] == [("100", "0"), ("2000", "1")]
    assert len(lines) == 5 and float(lines[1]["factor_vae"]) == 0.8 and lines[0]["psnr"] == ""


def test_damaged_files_cost_their_row(logdir, caplog):
    (logdir / "other" / "dis_metrics" / "5.json").write_text("{")
    (logdir / "2026-01-01T00-00-00_dis_s0" / "run.json").write_text("[]")
    rows = collect_rows(logdir)
    assert {row.run for row in rows} == {"2026-01-02T00-00-00_dis_s1"}
    assert "delete it to score that checkpoint again" in caplog.text and "left out of the table" in caplog.text


def test_latest_scores_reach_results(logdir):
    run = logdir / "2026-01-01T00-00-00_dis_s0"
    (run / "results.json").write_text('{"psnr": 30.0}')
    publish_latest(run)
    assert json.loads((run / "results.json").read_text()) == {
        "psnr": 30.0, "factor_vae": 0.8, "dci": 0.5, "mig": 0.25, "beta_vae": 1.0,
    }
