"""Latents in files of all supported formats, with a data set or a table of factors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import score_cases as cases
from test_scoring import EngineInProcess

from ldm.data.factors import FactorSpace
from ldm.metrics import Metric, select_metrics
from ldm.scoring import arrays as score_arrays
from ldm.scoring import run as scoring
from ldm.scoring.arrays import array_source, open_array
from ldm.scoring.files import parse_seeds
from ldm.scoring.run import Options, Report, score_latents
from ldm.util import ConfigError, UserError

SPACE = FactorSpace(("hue", "shape", "size"), (4, 3, 5))
FACTORS = SPACE.factors_of(np.arange(SPACE.size))
CODES = FACTORS + np.random.default_rng(0).normal(scale=0.01, size=FACTORS.shape)
QUICK = {"spread": cases.SPREAD, "flat": Metric("Flat", cases.spread, "spread", reduce=False)}
ROOT = Path(__file__).parents[2]


def score(latents: Path, dataset: str | None = None, **options) -> Report:
    return score_latents(Options(latents=latents, dataset=dataset, **options))


@pytest.fixture(autouse=True)
def in_process(monkeypatch):
    EngineInProcess.keys = []
    monkeypatch.setattr(scoring, "Engine", EngineInProcess)
    return EngineInProcess.keys


def write(path: Path, array: np.ndarray) -> Path:
    """Store an array in the format of the file extension."""
    kind = path.suffix
    if kind == ".npy":
        np.save(path, array)
    elif kind == ".npz":
        np.savez_compressed(path, codes=array, other=np.zeros(3))
    elif kind == ".h5":
        with h5py.File(path, "w") as file:
            file.create_dataset("deep/latents", data=array, chunks=True)
    elif kind == ".csv":
        np.savetxt(path, array, delimiter=",", header="a,b,c", comments="")
    else:
        arrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        columns = array.swapaxes(0, 1)
        columns = [arrow.array(list(column)) for column in columns] if array.ndim == 3 else list(columns)
        parquet.write_table(arrow.table({f"unit {k}": column for k, column in enumerate(columns)}), path)
    return path


@pytest.mark.parametrize("kind", [".npy", ".npz", ".h5", ".csv", ".parquet"])
def test_codes_are_used_as_they_are_in_every_kind_of_file(tmp_path, kind):
    latents = write(tmp_path / f"z{kind}", CODES)
    table = write(tmp_path / "f.npy", FACTORS)
    report = score(latents, factors=table, out=tmp_path / "scores.json", metrics=QUICK)
    assert not report.failures and report.written == [tmp_path / "scores.json"]
    content = json.loads((tmp_path / "scores.json").read_text())
    assert content["Spread"] == content["Flat"]
    assert content["Spread"]["spread"] == pytest.approx(np.std(CODES), rel=1e-9)
    record = json.loads((tmp_path / "scores.record.json").read_text())["parts"]["spread"]
    assert record["dataset"]["factors"] == {"factor 0": 4, "factor 1": 3, "factor 2": 5}
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["f.npy", "scores.json", "scores.record.json", latents.name]
    )


@pytest.mark.parametrize("kind", [".npy", ".npz", ".h5", ".parquet"])
def test_vectors_are_reduced_unless_the_metric_takes_them_whole(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(score_arrays, "BLOCK_BYTES", 100)  # many blocks
    vectors = np.stack([CODES, -2 * CODES], axis=2).astype(np.float32)
    latents = write(tmp_path / f"z{kind}", vectors)
    assert np.array_equal(open_array(array_source(latents), tmp_path / "scratch"), vectors)
    score(latents, factors=write(tmp_path / "f.npy", FACTORS), out=tmp_path / "s.json", metrics=QUICK)
    content = json.loads((tmp_path / "s.json").read_text())
    assert (content["Spread"]["units"], content["Flat"]["units"]) == (3, 6)


def test_a_table_with_words_equals_the_factor_space(tmp_path):
    words = ["red", "tall", "zebra", "zoo"]
    lines = ["hue,shape,size", *(f"{words[hue]},{shape},{size * 0.5}" for hue, shape, size in FACTORS)]
    (tmp_path / "f.csv").write_text("\n".join(lines) + "\n")
    latents = write(tmp_path / "z.npy", CODES)
    metrics = select_metrics("fast", ["mig", "sap"])
    score(latents, factors=tmp_path / "f.csv", out=tmp_path / "table.json", metrics=metrics)
    run_file = tmp_path / "z.npz"
    np.savez(
        run_file,
        latents=CODES,
        num_samples=5,
        factor_names=SPACE.all_names,
        factor_sizes=SPACE.all_sizes,
        factor_space=json.dumps(SPACE.to_dict()),
    )
    score(run_file, out=tmp_path / "space.json", metrics=metrics)
    found, expected = (json.loads((tmp_path / name).read_text()) for name in ("table.json", "space.json"))
    assert found.keys() == {"MIG", "SAP"}
    assert found["MIG"]["discrete_mig"] == pytest.approx(expected["MIG"]["discrete_mig"], abs=1e-12)
    assert found["SAP"]["SAP_score"] == pytest.approx(expected["SAP"]["SAP_score"], abs=1e-12)


def test_all_metrics_have_the_protocols_keys(tmp_path):
    latents = write(tmp_path / "z.npy", CODES)
    report = score(
        latents,
        factors=write(tmp_path / "f.npy", FACTORS),
        out=tmp_path / "s.json",
        metrics=select_metrics("fast", ["all"]),
    )
    assert not report.failures
    assert list(json.loads((tmp_path / "s.json").read_text())) == [
        "beta_VAE",
        "dci",
        "MIG",
        "factor_VAE",
        "SAP",
        "modularity_explicitness",
        "IRS",
        "unsupervised",
        "MED",
    ]


def test_a_single_unit_costs_the_metrics_that_compare_units_alone(tmp_path):
    latents = write(tmp_path / "z.npy", CODES[:, :1])
    report = score(
        latents,
        factors=write(tmp_path / "f.npy", FACTORS),
        out=tmp_path / "s.json",
        metrics=select_metrics("fast", ["mig", "factor_vae"]),
    )
    assert ["mig: " in failure.reason and "at least 2" in failure.reason for failure in report.failures] == [True]
    assert list(json.loads((tmp_path / "s.json").read_text())) == ["factor_VAE"]


def test_results_are_kept_for_the_same_file_and_factors_only(tmp_path, in_process):
    latents, table = write(tmp_path / "z.npy", CODES), write(tmp_path / "f.npy", FACTORS)
    score(latents, factors=table, out=tmp_path / "s.json", metrics=QUICK)
    in_process.clear()
    score(latents, factors=table, out=tmp_path / "s.json", metrics=QUICK)
    assert in_process == []
    write(tmp_path / "f.npy", FACTORS[::-1])
    score(latents, factors=table, out=tmp_path / "s.json", metrics=QUICK)
    assert len(in_process) == 4
    in_process.clear()
    write(latents, 2 * CODES)
    score(latents, factors=table, out=tmp_path / "s.json", metrics=QUICK)
    assert len(in_process) == 4


def test_several_seeds_give_mean_and_deviation(tmp_path):
    latents, table = write(tmp_path / "z.npy", CODES), write(tmp_path / "f.npy", FACTORS)
    report = score(latents, factors=table, out=tmp_path / "s.json", metrics=QUICK, seeds="0-2")
    assert report.written == [tmp_path / "s.json"]
    content = json.loads((tmp_path / "s.json").read_text())
    draws = [np.random.RandomState(seed).randint(1000) for seed in (0, 1, 2)]
    assert content["Spread"]["draw"] == pytest.approx(np.mean(draws))
    assert content["deviation"]["Spread"]["draw"] == pytest.approx(np.std(draws, ddof=1))
    assert content["seeds"]["2"]["Spread"]["draw"] == draws[2]


@pytest.mark.parametrize(
    "name,array,options,message",
    [
        ("z.npy", CODES, {}, "factors of its rows are not stored"),
        ("z.npy", CODES, {"dataset": "cars3d"}, "60 rows, but the factors 17568"),
        ("z.npy", CODES.T, {"dataset": "cars3d"}, "3 rows"),
        ("z.npy", np.zeros((60, 5000), np.int8), {"dataset": "cars3d"}, "got 5000 for 60 images.*latents.T"),
        ("z.npy", CODES[:59], {"factors": FACTORS}, "expected 59 rows, .* got 60"),
        ("z.npy", CODES, {"factors": FACTORS[:, 0]}, "shape \\(images, factors\\)"),
        ("z.npy", CODES, {"factors": FACTORS + CODES}, "looks continuous"),
        ("z.npy", CODES, {"factors": FACTORS, "dataset": "cars3d"}, "not both"),
        ("z.npy", np.array(["a", "b"]), {"dataset": "cars3d"}, "expected numbers"),
        ("z.npy", np.ones(60), {"dataset": "cars3d"}, r"expected shape \(N, U, D\) or \(N, K\), .*got \(60,\)"),
        ("z.txt", None, {"dataset": "cars3d"}, "expected .npz, .*got .txt"),
        ("no.npy", None, {"dataset": "cars3d"}, "no such file"),
    ],
)
def test_mistakes(tmp_path, name, array, options, message):
    if array is not None:
        write(tmp_path / name, array)
    elif name == "z.txt":
        (tmp_path / name).write_text("1 2 3")
    if "factors" in options:
        options = options | {"factors": write(tmp_path / "f.npy", options["factors"])}
    with pytest.raises(UserError, match=message):
        score(tmp_path / name, out=tmp_path / "s.json", metrics=QUICK, **options)
    assert not (tmp_path / "s.json").exists()


def test_an_unknown_data_set(tmp_path):
    with pytest.raises(ConfigError, match="Did you mean 'cars3d'"):
        score(write(tmp_path / "z.npy", CODES), "cars3", out=tmp_path / "s.json", metrics=QUICK)


def test_values_that_are_not_finite(tmp_path):
    broken = CODES.copy()
    broken[7, 1] = np.nan
    latents, table = write(tmp_path / "z.npy", broken), write(tmp_path / "f.npy", FACTORS)
    report = score(latents, factors=table, out=tmp_path / "s.json", metrics=QUICK)
    assert not report.written and "nan in unit 1, first in row 7" in report.failures[0].reason


def test_half_a_file(tmp_path):
    latents, table = write(tmp_path / "z.npy", CODES), write(tmp_path / "f.npy", FACTORS)
    latents.write_bytes(latents.read_bytes()[:700])
    report = score(latents, factors=table, out=tmp_path / "s.json", metrics=QUICK)
    assert "is damaged or incomplete" in report.failures[0].reason


@pytest.mark.parametrize("text,seeds", [("0", (0,)), ("0-3", (0, 1, 2, 3)), ("5,0-1", (5, 0, 1)), ("1,1-2", (1, 2))])
def test_seeds(text, seeds):
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize("text", ["", "a", "3-1", "0-", "-1", "0-100000"])
def test_seeds_that_are_none(text):
    with pytest.raises(UserError, match="--seeds"):
        parse_seeds(text)


def test_the_command(tmp_path):
    write(tmp_path / "z.npy", CODES)
    write(tmp_path / "f.npy", FACTORS)
    words = ["--latents", "z.npy", "--factors", "f.npy", "--metrics", "MIG", "--protocol", "fast", "-p", "1"]
    found = subprocess.run(
        [sys.executable, str(ROOT / "run_para_metrics.py"), *words, "--out", "scores.json", "--csv", "all.csv"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr
    assert "scores: scores.json" in found.stderr and "MIG" in found.stdout
    assert json.loads((tmp_path / "scores.json").read_text())["MIG"]["discrete_mig"] > 0.9
    assert (tmp_path / "all.csv").is_file()
