"""The table over runs and seeds, its files, the published figures, and the figures in results.json."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
import score_cases as cases
from rich.console import Console

from ldm.data.factors import FactorSpace, factor_space
from ldm.metrics.registry import ALL_METRICS
from ldm.scoring.factors import describe_dataset
from ldm.scoring.files import publish_latest
from ldm.scoring.published import FILE, published_beside, published_rows, published_sources
from ldm.scoring.table import collect_rows, columns, score_tables, write_csv, write_latex, write_markdown


def write_score(run: Path, step: int, factor_vae: float, place: str = "dis_metrics") -> None:
    folder = run / place
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "beta_VAE": {"eval_accuracy": 1.0},
        "dci": {"disentanglement": 0.5},
        "MIG": {"discrete_mig": 0.25},
        "factor_VAE": {"eval_accuracy": factor_vae},
    }
    (folder / f"{step}.json").write_text(json.dumps(content))


def text_of(rows) -> str:
    console = Console(file=io.StringIO(), width=400)
    console.print(score_tables(rows, 10_000)[0])
    return console.file.getvalue()


@pytest.fixture
def logdir(tmp_path) -> Path:
    for seed, score in ((0, 0.8), (1, 0.9)):
        run = tmp_path / f"2026-01-0{seed + 1}T00-00-00_dis_s{seed}"
        write_score(run, 100, 0.1)
        write_score(run, 2000, score)
    write_score(tmp_path / "other", 5, 0.7)
    return tmp_path


def test_runs_of_one_experiment_are_averaged_last_and_best(logdir):
    write_score(logdir / "2026-01-01T00-00-00_dis_s0", 1500, 0.95)
    text = text_of(collect_rows(logdir))
    assert text.count("mean ± std of 2 runs") == 2 and "0.850 ± 0.071" in text, "last"
    assert "0.950 @ 1500" in text and "0.900 @ 2000" in text and "0.925 ± 0.035" in text, "best"
    assert "0.100" not in text, "an early checkpoint that is neither"
    assert "PSNR" not in text


def test_the_spread_over_the_metrics_seeds(logdir):
    run = logdir / "2026-01-01T00-00-00_dis_s0"
    write_score(run, 2000, 0.6, "dis_metrics/seed=1")
    row = next(row for row in collect_rows(logdir, (0, 1)) if row.run == run.name and row.latest)
    assert row.figures["factor_vae"] == pytest.approx(0.7)
    assert row.deviations["factor_vae"] == pytest.approx(0.1414, 1e-3)
    assert row.by_seed[1]["factor_vae"] == 0.6
    assert "0.700 ± 0.141" in text_of([row])


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


def test_figures_of_other_evaluations_are_shown(logdir):
    (logdir / "other" / "results.json").write_text('{"psnr": 31.5, "edit_accuracy": 0.75, "clip_accuracy": null}')
    text = text_of(collect_rows(logdir))
    assert "31.500" in text and "edit acc." in text and "CLIP acc." not in text


def test_a_narrow_terminal_gets_several_tables(logdir):
    rows = collect_rows(logdir)
    one, many = score_tables(rows, 400), score_tables(rows, 90)
    assert len(one) == 1 and len(many) > 1
    headings = [column.header for table in many for column in table.columns[6:]]
    assert headings == ["FactorVAE", "DCI", "MIG", "beta-VAE"]
    console = Console(file=io.StringIO(), width=90)
    for table in many:
        console.print(table)
    assert "2026-01-01T00-00-00_dis_s0" in console.file.getvalue()


def test_runs_of_different_data_sets_are_not_averaged(tmp_path):
    for seed, dataset in ((0, "faces"), (1, "faces"), (2, "houses")):
        run = tmp_path / f"2026-01-01T00-00-00_dis_s{seed}"
        write_score(run, 5, 0.1 * seed)
        record = run / "dis_metrics/records/5.json"
        record.parent.mkdir()
        record.write_text(json.dumps({"parts": {"mig": {"dataset": {"name": dataset}}}}))
    rows = collect_rows(tmp_path)
    assert [row.dataset for row in rows] == ["faces", "faces", "houses"]
    text = text_of(rows)
    assert "dis (faces)" in text and "dis (houses)" in text and text.count("mean ± std of 2 runs") == 1


def test_the_name_of_a_users_factor_space_names_the_data_set(tmp_path):
    assert describe_dataset(tmp_path, FactorSpace(("hue",), (2,), name="faces"))["name"] == "faces"
    assert describe_dataset(tmp_path, FactorSpace(("hue",), (2,)))["name"] is None


def test_every_computed_metric_is_shown(tmp_path):
    content = {metric.key: {metric.figure: 0.125} for metric in ALL_METRICS.values()}
    (tmp_path / "run/dis_metrics").mkdir(parents=True)
    (tmp_path / "run/dis_metrics/5.json").write_text(json.dumps(content))
    text = text_of(collect_rows(tmp_path))
    assert all(metric.heading in text for metric in ALL_METRICS.values()) and text.count("0.125") == len(ALL_METRICS)


def test_figures_that_are_null_are_left_out(tmp_path):
    (tmp_path / "run/dis_metrics").mkdir(parents=True)
    (tmp_path / "run/dis_metrics/5.json").write_text('{"MIG": {"discrete_mig": null}, "SAP": {"SAP_score": 0.5}}')
    assert collect_rows(tmp_path)[0].figures == {"sap": 0.5}


def test_csv_has_every_checkpoint(logdir, tmp_path):
    write_csv(tmp_path / "all.csv", collect_rows(logdir))
    with (tmp_path / "all.csv").open() as stream:
        lines = list(csv.DictReader(stream))
    assert [(line["step"], line["latest"]) for line in lines[:2]] == [("100", "0"), ("2000", "1")]
    assert len(lines) == 5 and float(lines[1]["factor_vae"]) == 0.8 and lines[0]["psnr"] == ""
    assert lines[1]["best"] == "factor_vae" and lines[0]["best"] == "beta_vae dci mig", "the earliest of equals"


def on_shapes3d(run: Path) -> None:
    """Write a config with Shapes3D to a run."""
    (run / "configs").mkdir(parents=True)
    text = "data: {params: {test: {target: ldm.data.factors.shapes3d.Shapes3D}}}"
    (run / "configs" / "2026-01-01T00-00-00-project.yaml").write_text(text)
    size = factor_space("shapes3d").size
    cases.write_latents(run, step=5, space=None, latents=np.zeros((size, 1), np.int8))


def test_published_figures_of_the_same_data_set_are_shown(logdir, tmp_path):
    on_shapes3d(logdir / "other")
    rows = collect_rows(logdir)
    assert {row.dataset for row in rows} == {None, "shapes3d"}
    text = text_of(rows)
    assert "DisDiff [encdiff]" in text and "0.902 ± 0.043" in text and "NeurIPS 2024, Table 1" in text
    assert "cars3d" not in text
    write_csv(tmp_path / "all.csv", rows)
    with (tmp_path / "all.csv").open() as stream:
        lines = [line for line in csv.DictReader(stream) if line["kind"] == "published"]
    found = next(line for line in lines if line["experiment"] == "EncDiff")
    assert (found["dataset"], found["factor_vae"], found["factor_vae_std"]) == ("shapes3d", "0.999", "0.0")


def test_markdown_and_latex(logdir, tmp_path):
    on_shapes3d(logdir / "other")
    rows = collect_rows(logdir)
    write_markdown(tmp_path / "table.md", rows)
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert lines[0].startswith("| experiment | run | checkpoint | FactorVAE | DCI |")
    assert lines[1].count("|") == lines[0].count("|") and len({line.count("|") for line in lines if "|" in line}) == 1
    assert "| dis | mean ± std of 2 runs | last | 0.850 ± 0.071 |" in "\n".join(lines)
    assert any(line.startswith("[fdae] Wu, Zheng") for line in lines)
    write_latex(tmp_path / "table.tex", rows)
    text = (tmp_path / "table.tex").read_text()
    assert r"dis & mean $\pm$ std of 2 runs & last & 0.850 $\pm$ 0.071" in text
    assert r"2026-01-01T00-00-00\_dis\_s0" in text and text.count(r"\begin{tabular}{lllrrrr}") == 1
    assert all(line.startswith("%") for line in text.splitlines() if "NeurIPS" in line)


def test_every_published_row_has_a_source_and_known_figures():
    assert json.loads(FILE.read_text())["rows"] and len(published_rows()) > 20
    for row in published_rows():
        assert row.source in published_sources() and row.figures
        assert row.figures.keys() <= columns().keys() | {"tad", "fid"}
        assert all(mean >= 0 and deviation >= 0 for mean, deviation in row.figures.values())
        assert all(mean <= 1 for name, (mean, _) in row.figures.items() if name != "fid")
    by_place = [(row.method, row.dataset, row.source) for row in published_rows()]
    assert len(set(by_place)) == len(by_place)


def test_which_published_rows_are_shown():
    shown = published_beside(["world3d", "mpi3d_toy", None], ["factor_vae"])
    assert {row.dataset for row in shown} == {"shapes3d", "mpi3d"}
    assert published_beside(["celeba"], ["factor_vae"]) == []
    assert {row.method for row in published_beside(["mpi3d_complex"], ["mig"])} == {"VCT", "FDAE"}


def test_damaged_files_cost_their_row(logdir, caplog):
    (logdir / "other" / "dis_metrics" / "5.json").write_text("{")
    (logdir / "2026-01-01T00-00-00_dis_s0" / "run.json").write_text("[]")
    rows = collect_rows(logdir)
    assert {row.run for row in rows} == {"2026-01-02T00-00-00_dis_s1"}
    assert "Score that checkpoint again" in caplog.text and "left out of the table" in caplog.text


def test_latest_scores_reach_results(logdir):
    run = logdir / "2026-01-01T00-00-00_dis_s0"
    (run / "results.json").write_text('{"psnr": 30.0}')
    publish_latest(run)
    assert json.loads((run / "results.json").read_text()) == {
        "psnr": 30.0,
        "factor_vae": 0.8,
        "dci": 0.5,
        "mig": 0.25,
        "beta_vae": 1.0,
        "best_scores": {
            "beta_vae": {"score": 1.0, "step": 100},
            "dci": {"score": 0.5, "step": 100},
            "mig": {"score": 0.25, "step": 100},
            "factor_vae": {"score": 0.8, "step": 2000},
        },
    }
