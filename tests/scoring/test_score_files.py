"""Score files of tables: content decides what is computed again, inputs are safe, figures are null or true."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import score_cases as cases
from test_scoring import EngineInProcess

from ldm.data.factors import FactorSpace
from ldm.metrics import Metric, select_metrics
from ldm.metrics.representation import standardize
from ldm.runs.records import plain, read_json, update_results, write_json
from ldm.scoring import files
from ldm.scoring import run as scoring
from ldm.scoring.factors import parse_bins
from ldm.scoring.run import Options, score_latents
from ldm.scoring.table import collect_rows, latents_row, table_content, write_csv, write_latex
from ldm.util import UserError

GRID = np.array([[a, b, c] for a in range(4) for b in range(3) for c in range(5)])
SPREAD = {"spread": cases.SPREAD}
SIZES = {"sizes": cases.SIZES}


@pytest.fixture(autouse=True)
def keys(monkeypatch):
    """Keys of the jobs that were run."""
    EngineInProcess.keys = []
    monkeypatch.setattr(scoring, "Engine", EngineInProcess)
    return EngineInProcess.keys


@pytest.fixture
def inputs(tmp_path):
    """Perfect codes and their factors."""
    np.save(tmp_path / "z.npy", GRID.astype(float))
    np.savetxt(tmp_path / "f.csv", GRID, "%d", ",", header="hue,shape,size", comments="")
    return {"latents": tmp_path / "z.npy", "factors": tmp_path / "f.csv", "out": tmp_path / "s.json"}


def score(metrics, **options) -> dict:
    """Score, and return the content of the score file."""
    options = Options(metrics=metrics, **options)
    report = score_latents(options)
    assert not report.failures
    return read_json(options.score_file)


def record(path: Path) -> dict:
    return read_json(path.with_suffix(".record.json"))["parts"]


def text_of(rows) -> str:
    return "".join(",".join(map(str, row)) + "\n" for row in rows)


@pytest.mark.parametrize("header", ["", "0,1,2\n", "a,b,c\n", ",a,b,c\n", ",0,1,2\n"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_perfect_codes_have_the_same_mig_in_every_table(tmp_path, header, delimiter):
    expected = None
    for kind in (int, float):
        for name, rows in (("z", GRID.astype(kind)), ("f", GRID)):
            rows = [[number, *row] for number, row in enumerate(rows.tolist())] if header[:1] == "," else rows.tolist()
            (tmp_path / f"{name}.csv").write_text((header + text_of(rows)).replace(",", delimiter))
        metrics = select_metrics("fast", ["mig"])
        found = score(metrics, latents=tmp_path / "z.csv", factors=tmp_path / "f.csv", out=tmp_path / "s.json")
        expected = expected or score(
            metrics, latents=save(tmp_path / "z.npy", GRID), factors=save(tmp_path / "f.npy", GRID)
        )
        assert found == expected and found["MIG"]["discrete_mig"] > 0.99


def save(path: Path, array: np.ndarray) -> Path:
    np.save(path, array)
    return path


def test_hundreds_of_binary_attributes(tmp_path):
    attributes = np.random.default_rng(0).integers(2, size=(300, 312))
    names = ",".join(f"has_{number}" for number in range(312))
    (tmp_path / "f.csv").write_text(f",{names}\n" + text_of([n, *row] for n, row in enumerate(attributes)))
    save(tmp_path / "z.npy", attributes[:, :8] + 0.1 * np.random.default_rng(1).normal(size=(300, 8)))
    metrics = select_metrics("fast", ["mig", "factor_vae"])
    found = score(metrics | SIZES, latents=tmp_path / "z.npy", factors=tmp_path / "f.csv")
    assert found["Sizes"]["total"] == 624 and found["MIG"]["discrete_mig"] > 0
    assert len(record(tmp_path / "z.scores.json")["mig"]["dataset"]["factors"]) == 312


@pytest.mark.parametrize("make", ["same", "dots", "link", "hard link", "factors"])
def test_outputs_never_overwrite_inputs(inputs, tmp_path, make, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = {"same": inputs["latents"], "dots": "./z.npy", "factors": inputs["factors"]}.get(make, tmp_path / "link")
    if make == "link":
        out.symlink_to(inputs["latents"])
    elif make == "hard link":
        os.link(inputs["latents"], out)
    for output in ("out", "csv", "latex", "markdown"):
        with pytest.raises(UserError, match="expected another output, got an input"):
            score(SPREAD, **(inputs | {output: out}))
    assert np.array_equal(np.load(inputs["latents"]), GRID)


@pytest.mark.parametrize("content", ["text", '{"name": "x"}', "[]", '{"model": {"layers": 3}}'])
def test_other_files_are_not_replaced_by_scores(inputs, content):
    inputs["out"].write_text(content)
    with pytest.raises(UserError, match="expected a score file or a new file"):
        score(SPREAD, **inputs)
    assert inputs["out"].read_text() == content


def test_every_output_has_a_file_of_its_own(inputs, tmp_path):
    for other in (inputs["out"], inputs["out"].with_suffix(".record.json"), tmp_path):
        with pytest.raises(UserError, match="expected a file of its own for each output, got"):
            score(SPREAD, **inputs, csv=other)
    with pytest.raises(UserError, match="--out: expected a file, got the folder"):
        score(SPREAD, **(inputs | {"out": tmp_path}))
    with pytest.raises(UserError, match="got that of another option"):
        score(SPREAD, **inputs, csv=tmp_path / "t", latex=tmp_path / "t")


def test_earlier_scores_of_other_metrics_are_kept(inputs, keys, caplog):
    score(SPREAD, **inputs)
    keys.clear()
    assert set(score(SIZES, **inputs)) == {"Spread", "Sizes"} and (0, 0, "spread") not in keys
    assert {"spread", "sizes/0"} <= set(record(inputs["out"])) and "replaced" not in caplog.text
    np.save(inputs["latents"], 2.0 * GRID)
    assert set(score(SIZES, **inputs)) == {"Sizes"} and caplog.text.count("settings (Sizes, Spread)") == 1
    assert "spread" not in record(inputs["out"])


def test_scores_of_one_and_of_several_seeds(inputs):
    score(SPREAD, **inputs)
    found = score(SIZES, **inputs, seeds="0-2")
    assert found["Spread"]["units"] == 3 and found["Sizes"] == {"total": 12} and set(found["seeds"]["1"]) == {"Sizes"}
    found = score(SPREAD, **inputs, seeds="0-2")
    assert set(found) == {"Spread", "Sizes", "deviation", "seeds"} and set(found["seeds"]["1"]) == {"Spread", "Sizes"}


def draw(units, space, random_state) -> dict[str, float]:
    """A figure of the seed."""
    return {"draw": float(random_state.rand())}


def test_means_over_seeds_are_not_scores_of_one_seed(inputs):
    metrics = {"draw": Metric("Draw", draw, "draw")}
    first = score(metrics, **inputs)["Draw"]
    assert score(metrics, **inputs, seeds="0-2")["Draw"] != first
    assert score(SIZES, **inputs).get("Draw", first) == first


def small_part(units, space, random_state, factor) -> dict[str, float]:
    """One factor's part, which exists for small units only."""
    if factor == 1 and units.max() > 4:
        raise ValueError("too large")
    return {"size": float(units.max())}


def test_parts_of_new_content_do_not_confirm_earlier_scores(inputs):
    parts = {"parts": Metric("Parts", small_part, "total", part=small_part, join=cases.total_size)}
    assert set(score(parts, **inputs)) == {"Parts"}
    np.save(inputs["latents"], 2.0 * GRID)
    assert score_latents(Options(metrics=parts, **inputs)).failures
    assert set(score(SPREAD, **inputs)) == {"Spread"}


def test_reasons_of_other_metrics_are_kept(inputs):
    none = {"none": Metric("None", no_figures, "value")}
    score(none, **inputs)
    assert score(SPREAD, **inputs)["reason"] == {"None": "the metric has no value"}


def test_a_file_that_changes_while_it_is_scored(inputs, keys):
    def rewrite(units, space, random_state) -> dict[str, float]:
        np.save(inputs["latents"], 2.0 * GRID)
        return {"largest": float(units.max())}

    metrics = {"rewrite": Metric("Rewrite", rewrite, "largest")}
    assert score(metrics, **inputs)["Rewrite"] == {"largest": 4.0}
    assert score(metrics, **inputs)["Rewrite"] == {"largest": 8.0}
    assert keys.count((0, 0, "rewrite")) == 2


def test_content_decides_what_is_computed_again(inputs, keys):
    score(SPREAD, **inputs)
    for path in (inputs["latents"], inputs["factors"]):
        os.utime(path, (1, 1))
    keys.clear()
    score(SPREAD, **inputs)
    assert keys == []
    status = inputs["latents"].stat()
    np.save(inputs["latents"], GRID[::-1].astype(float))
    os.utime(inputs["latents"], ns=(status.st_atime_ns, status.st_mtime_ns))
    assert inputs["latents"].stat().st_size == status.st_size
    score(SPREAD, **inputs)
    assert (0, 0, "spread") in keys


def test_finished_runs_are_not_read(tmp_path, monkeypatch):
    for epoch in range(3):
        cases.write_latents(tmp_path / "run", epoch, 100 * epoch)
    assert len(cases.score(tmp_path, metrics=SPREAD).written) == 3
    monkeypatch.setattr(files, "checksum", lambda path: pytest.fail("a checksum is computed"))
    assert not cases.score(tmp_path, metrics=SPREAD).written


def test_records_of_earlier_versions_stay_beside_their_scores(tmp_path):
    cases.write_latents(tmp_path / "run", 0, 100)
    cases.score(tmp_path, metrics=SPREAD)
    path = tmp_path / "run/dis_metrics/records/100.json"
    parts = read_json(path)["parts"]
    parts["spread"]["latents"] = ["epoch=000000.npz", 1, 2]
    write_json(path, {"parts": parts})
    cases.score(tmp_path, metrics=SPREAD | SIZES)
    assert {"spread", "sizes/0", "sizes/1", "sizes/2"} <= set(read_json(path)["parts"])


def no_figures(units, space, random_state) -> None:
    """A metric that has no value at all."""
    return None


def partly(units, space, random_state) -> dict[str, float]:
    """A figure that exists for some seeds."""
    return {"value": float("nan") if random_state.randint(1000) == 684 else 0.5, "never": float("inf")}


NULLS = {"null": Metric("Null", cases.not_finite, "value"), "none": Metric("None", no_figures, "value")}
NULLS |= {"partly": Metric("Partly", partly, "value")}


def strict(text: str) -> dict:
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in a JSON file"))


def test_figures_that_are_null(inputs, tmp_path):
    found = strict(json.dumps(score(NULLS, **inputs)))
    assert found["Null"] == {"value": None, "values": [1.0, None], "reason": {"value": "nan", "values": "inf"}}
    assert found["None"] is None and found["reason"] == {"None": "the metric has no value"}
    found = score(NULLS, **(inputs | {"out": tmp_path / "seeds.json"}), seeds="0-2")
    for path in tmp_path.rglob("*.json"):
        strict(path.read_text())
    assert np.random.RandomState(0).randint(1000) == 684
    assert found["Partly"] == {
        "value": 0.5,
        "never": None,
        "reason": {"value": "null for 1 of 3 seeds", "never": "null for 3 of 3 seeds"},
    }
    assert found["None"] is None and found["reason"] == {"None": "null for 3 seeds"} and found["Null"]["value"] is None
    for name in ("s.json", "seeds.json"):
        rows = latents_row(inputs["latents"], tmp_path / name, (0, 1, 2), None)
        write_csv(tmp_path / "t.csv", rows)
        write_latex(tmp_path / "t.tex", rows)


def test_arrays_without_axes_are_numbers():
    found = plain({"a": np.array(0.5), "b": np.array(np.nan), "c": np.array([[1.0, np.inf]]), "d": np.bool_(True)})
    assert found == {"a": 0.5, "b": None, "c": [[1.0, None]], "d": True, "reason": {"b": "nan", "c": "inf"}}


def test_reasons_in_results_end_with_the_null(tmp_path):
    update_results(tmp_path, mig=float("nan"), sap=np.float32("inf"), seconds=[1.0, float("nan")])
    assert strict((tmp_path / "results.json").read_text()) == {
        "mig": None,
        "sap": None,
        "seconds": [1.0, None],
        "reason": {"mig": "nan", "sap": "inf", "seconds": "nan"},
    }
    assert update_results(tmp_path, mig=0.5, seconds=1)["reason"] == {"sap": "inf"}
    assert "reason" not in update_results(tmp_path, sap=np.float64(0.25))


def test_standardized_scores_of_runs_have_a_place_of_their_own(tmp_path, caplog):
    space = FactorSpace(("hue", "shape", "size"), (4, 3, 5))
    codes = 0.03 * GRID
    cases.write_latents(tmp_path / "run", 0, 100, space, latents=codes)
    metrics = select_metrics("fast", ["factor_vae"])
    cases.score(tmp_path, metrics=metrics)
    assert caplog.text.count("0 of 3 units are active") == 1
    cases.score(tmp_path, metrics=metrics, standardize=True)
    assert caplog.text.count("units are active") == 1
    plain, found = (collect_rows(tmp_path, standardized=kind)[0] for kind in (False, True))
    notes = [" ".join(table_content([row]).notes) for row in (plain, found)]
    assert ["--standardize" in text for text in notes] == [False, True]
    assert found.figures["factor_vae"] == 1.0 > plain.figures["factor_vae"]
    assert read_json(tmp_path / "run/results.json")["factor_vae"] == plain.figures["factor_vae"]
    assert found.record == tmp_path / "run/dis_metrics/standardized/records/100.json"
    assert files.read_record(found.record)["factor_vae"]["standardized"] is True
    assert files.read_record(plain.record)["factor_vae"]["standardized"] is False


def test_standardized_scores_of_a_file(inputs, tmp_path, caplog):
    whole = {"whole": Metric("Whole", cases.spread, "spread", reduce=False)}
    del inputs["out"]
    np.save(inputs["latents"], 0.001 * GRID)
    for kind, codes in ((False, 0.001 * GRID), (True, standardize(0.001 * GRID))):
        found = score(SPREAD | whole, **inputs, standardize=kind)
        assert found["Spread"]["spread"] == pytest.approx(np.std(codes)) == found["Whole"]["spread"]
    assert (tmp_path / "z.scores.json").is_file() and (tmp_path / "z.standardized.scores.json").is_file()
    out = {"out": tmp_path / "z.scores.json"}
    assert set(score(SIZES, **inputs, **out, standardize=True)) == {"Sizes"}
    assert "settings (Spread, Whole)" in caplog.text, "figures of both kinds never share a file"


def test_the_record_has_everything_that_was_decided(inputs, caplog):
    caplog.set_level("INFO")
    score(SPREAD, **inputs)
    assert record(inputs["out"])["spread"]["dataset"] == {
        "name": None,
        "variant": {"table": "f.csv"},
        "factors": {"hue": 4, "shape": 3, "size": 5},
        "training_and_test_codes": "the same images (published protocol)",
    }
    assert caplog.text.count("the same images (published protocol)") == 1
    sizes = np.random.default_rng(0).random(60)
    rows = [[shape, 7, size] for shape, size in zip(GRID[:, 1], sizes)]
    rows[5][0] = ""
    inputs["factors"].write_text("shape,floor,size\n" + text_of(rows))
    with pytest.raises(UserError, match="got none for shape in row 5"):
        score(SPREAD, **inputs, bins=["size=4"])
    found = score(SPREAD | SIZES, **inputs, bins=["size=4"], missing="drop")
    assert found["Sizes"]["total"] == 7 and set(record(inputs["out"])) >= {"sizes/0", "sizes/1"}
    assert record(inputs["out"])["sizes/1"]["dataset"] == {
        "name": None,
        "variant": {"table": "f.csv"},
        "factors": {"shape": 3, "size": 4},
        "bins": {"size": "4 bins of equal width"},
        "rows_left_out": 1,
        "training_and_test_codes": "disjoint halves of the rows",
    }
    assert "floor left out" in caplog.text and "1 of 60 rows left out" in caplog.text


def test_other_bins_are_other_scores(inputs, keys):
    for bins in (["size=3"], ["size=2"], ["size=2"]):
        keys.clear()
        score(SPREAD, **inputs, bins=bins)
    assert keys == []


def test_choices_of_bins():
    assert parse_bins(["size=10", "a=b=equal_frequency:5", "x=0,0.5", "y=edges:3"]) == {
        "size": ("equal_width", 10),
        "a=b": ("equal_frequency", 5),
        "x": ("edges", [0.0, 0.5]),
        "y": ("edges", [3.0]),
    }
    for wrong in ("size", "size=", "=3", "size=ten", "size=0.5", "size=a,b", "x=3"):
        with pytest.raises(UserError, match=r"--bins: expected NAME=10, .*got"):
            parse_bins(["x=2", wrong])


@pytest.mark.parametrize("bins", ["size=1", "size=equal:4", "size=2,1"])
def test_bins_that_do_not_exist(inputs, bins):
    with pytest.raises(UserError, match="f.csv: .*(2 to 1000|equal_width|ascending)"):
        score(SPREAD, **inputs, bins=[bins])
