"""Cells of CSV files that a spreadsheet would run, score files with texts for numbers, and codes of absurd scale."""

import csv
import json
import logging
from pathlib import Path

import numpy as np
import pytest

from ldm.data.formats.clip_embeddings import EmbeddingTable, read_table, write_table
from ldm.metrics import MetricError
from ldm.metrics.evaluate import evaluate
from ldm.metrics.registry import METRICS
from ldm.metrics.representation import scalar_units
from ldm.scoring.files import over_seeds, read_score_file, read_scores
from ldm.scoring.table import collect_rows, write_csv
from ldm.util import csv_cell, csv_text

FORMULAS = [
    "=1+1",
    "+cmd|' /C calc'!A0",
    "-2+3",
    "@SUM(A1)",
    "\t=1",
    "\r=1",
    "=HYPERLINK(1)",
    "-",
    "--name",
    "'=1",
    "''@x",
]
PLAIN = ["", "a", "a=b", "red", "1", "-1", "+1e-3", "-0.5", "-inf", "nan", "'quoted'", "é", " =1"]


@pytest.mark.parametrize("text", [*FORMULAS, *PLAIN])
def test_cells(text: str) -> None:
    """A formula gets an apostrophe, and is read back; numbers and other texts stay as they are."""
    assert csv_cell(text) == (f"'{text}" if text in FORMULAS else text)
    assert csv_text(csv_cell(text)) == text


@pytest.mark.parametrize("value", [1, -1, -0.5, None, True])
def test_numbers_are_not_texts(value: object) -> None:
    assert csv_cell(value) is value


def run_with_scores(folder: Path, scores: dict, name: str = "=cmd()") -> Path:
    run = folder / name
    (run / "dis_metrics").mkdir(parents=True)
    (run / "run.json").write_text(json.dumps({"name": name, "seed": 0}))
    (run / "dis_metrics" / "10.json").write_text(json.dumps(scores))
    return run


SCORES = {METRICS[name].key: {METRICS[name].figure: 0.5} for name in ("mig", "sap")}


def test_the_table_of_scores_is_neutralised(tmp_path: Path) -> None:
    run_with_scores(tmp_path, SCORES)
    write_csv(tmp_path / "table.csv", collect_rows(tmp_path))
    with (tmp_path / "table.csv").open(newline="") as stream:
        row = next(csv.DictReader(stream))
    assert (row["run"], row["experiment"], float(row["mig"])) == ("'=cmd()", "'=cmd()", 0.5)


def test_embeddings_of_odd_names_are_read_back(tmp_path: Path) -> None:
    names = ["=a.png", "'=a.png", "-b.png", "c.png", "@d.png"]
    values = np.arange(10, dtype=np.float32).reshape(5, 2) - 5
    table = EmbeddingTable(tmp_path / "table.csv", names, values, {})
    write_table(table)
    cells = [line.split(",")[0] for line in table.path.read_text().splitlines()]
    assert cells == ["'=a.png", "''=a.png", "'-b.png", "c.png", "'@d.png"]
    found = read_table(table.path)
    assert found.names == names and np.array_equal(found.values, values)


@pytest.mark.parametrize("value", ["0.5x", "", "high", True, [0.5], {}])
def test_a_text_in_place_of_a_score(tmp_path: Path, value: object, caplog: pytest.LogCaptureFixture) -> None:
    """One line with file and key; the other scores of the file are kept."""
    wrong = METRICS["mig"]
    run = run_with_scores(tmp_path, {**SCORES, wrong.key: {wrong.figure: value}}, "run")
    with caplog.at_level(logging.WARNING):
        rows = collect_rows(tmp_path)
    assert rows[0].figures == {"sap": 0.5}
    advice = "Delete the file and score that checkpoint again"
    expected = f"10.json: {wrong.key}.{wrong.figure}: expected a number, got {value!r}. {advice}"
    assert [record.getMessage().endswith(expected) for record in caplog.records] == [True]
    assert (
        list(read_scores(run, 0)[10]) == list(read_score_file(run / "dis_metrics" / "10.json")) == [METRICS["sap"].key]
    )
    assert over_seeds([rows[0].figures, None])[0] == {"sap": 0.5}


@pytest.mark.parametrize(
    ("scale", "units"), [(1e300, [1]), (1e16, [1]), (1e-30, [0, 1, 2]), (1e-16, [0, 1, 2]), (1e154, [0, 2])]
)
@pytest.mark.parametrize("axes", [2, 3])
def test_codes_of_absurd_scale_are_refused_for_all_metrics(scale: float, units: list[int], axes: int) -> None:
    codes = np.random.default_rng(0).uniform(1, 2, (64, 3))
    codes[:, units] *= scale
    codes = codes[:, :, None] * np.ones(2) if axes == 3 else codes
    with pytest.raises(MetricError, match=f"magnitudes from 1e-15 to 1e[+]15, got .* in unit {units[0]}"):
        scalar_units(codes)
    factors = np.arange(64)[:, None] // np.array([32, 1]) % 2
    with pytest.raises(MetricError, match="Divide the codes by a constant"):
        evaluate(codes, factors, metrics=["mig"])


@pytest.mark.parametrize("scale", [1e-9, 1e9])
def test_codes_of_other_scales_are_scored(scale: float) -> None:
    codes = np.random.default_rng(0).uniform(1, 2, (64, 3))
    assert np.array_equal(scalar_units(codes * scale), codes * scale)
    codes[:, 0] *= 1e-30  # a collapsed unit beside others
    assert scalar_units(codes).shape == (64, 3)
