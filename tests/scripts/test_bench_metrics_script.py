"""``scripts/bench_metrics.py``: every metric of the registry has its plain twin, and both give the same figures."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest

from ldm.data.factors import FactorSpace
from ldm.metrics import METRICS

SCRIPTS = Path(__file__).parents[2] / "scripts"
FEW = {"num_train": 400, "num_eval": 200, "num_test": 300, "num_variance_estimate": 300}


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("bench_metrics")


def test_every_metric_is_compared(script):
    assert set(script.PLAIN) == set(METRICS)


@pytest.mark.parametrize("name", METRICS)
def test_plain_metrics_give_the_same_figures(script, name):
    space = FactorSpace(("hue", "shape", "size"), (5, 4, 3))
    rng = np.random.default_rng(3)
    codes = space.factors_of(np.arange(60)) @ rng.normal(size=(3, 5)) + rng.normal(size=(60, 5))
    protocol = {key: FEW.get(key, value) for key, value in METRICS[name].protocol.items()}
    ours, _ = script.timed(METRICS[name].function, codes, space, protocol)
    plain, seconds = script.timed(script.PLAIN[name], codes, space, protocol)
    tolerance = {"dci": 0.02, "irs": 1e-6}.get(name, 1e-9)  # splits of DCI's small nodes tie
    assert script.largest_difference(ours, plain) <= tolerance
    assert seconds > 0


def test_the_table_and_the_file(script, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(script, "QUICK", 100)
    script.main(["--codes", "7", "--metrics", "mig", "irs", "--quick", "--json", str(tmp_path / "bench.json")])
    printed = capsys.readouterr().out
    assert "7 codes" in printed and "1/100 of the samples" in printed and "scikit-learn" in printed
    kept = json.loads((tmp_path / "bench.json").read_text())
    (result,) = kept["results"]
    assert [found["metric"] for found in result["metrics"]] == ["mig", "irs"]
    assert all(found["ratio"] > 0 and found["difference"] < 1e-6 for found in result["metrics"])
    assert result["suite"] is None  # not all of the default metrics ran


def test_the_suite_is_the_default_metrics_together(script):
    results = [
        {"metric": name, "seconds": 1.0, "plain_seconds": 10.0} for name in ("beta_vae", "dci", "mig", "factor_vae")
    ]
    assert script.suite([*results, {"metric": "sap", "seconds": 5.0, "plain_seconds": 5.0}])["ratio"] == 10.0
