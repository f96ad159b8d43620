"""The registry of metrics and the published protocols."""

from __future__ import annotations

import inspect

import pytest

from ldm.metrics import DEFAULT_METRICS, EXTRA_METRICS, METRICS, PROTOCOLS, select_metrics
from ldm.metrics.registry import ALL_METRICS
from ldm.util import ConfigError


def test_names_in_score_files():
    assert {name: metric.key for name, metric in METRICS.items()} == {
        "beta_vae": "beta_VAE",
        "dci": "dci",
        "mig": "MIG",
        "factor_vae": "factor_VAE",
        "sap": "SAP",
        "modularity_explicitness": "modularity_explicitness",
        "irs": "IRS",
        "unsupervised": "unsupervised",
        "med": "MED",
    }


def test_default_protocol_is_the_published_one():
    chosen = select_metrics()
    assert tuple(chosen) == DEFAULT_METRICS == ("beta_vae", "dci", "mig", "factor_vae")
    assert chosen["beta_vae"].protocol == {"num_train": 10000, "num_eval": 5000, "batch_size": 64}
    assert chosen["dci"].protocol == {"num_train": 10000, "num_test": 5000}
    assert chosen["mig"].protocol == {"num_train": 10000, "num_bins": 20}
    assert chosen["factor_vae"].protocol == {
        "num_train": 10000,
        "num_eval": 5000,
        "num_variance_estimate": 10000,
        "batch_size": 64,
        "prune_threshold": 0.05,
    }


def test_only_med_takes_latents_as_they_are():
    assert [name for name, metric in METRICS.items() if not metric.reduce] == ["med"]
    assert select_metrics("med")["med"].protocol == {"num_train": 10000, "num_test": 10000, "topk": 2, "num_bins": 20}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_settings_are_arguments_of_the_metrics(protocol):
    for metric in select_metrics(protocol, ["all", *EXTRA_METRICS]).values():
        accepted = inspect.signature(metric.function).parameters
        assert set(metric.protocol) <= set(accepted)


def test_settings_agree_with_the_functions_defaults():
    for metric in (METRICS | EXTRA_METRICS).values():
        defaults = inspect.signature(metric.function).parameters
        for name, value in metric.protocol.items():
            assert defaults[name].default == (tuple(value) if isinstance(value, list) else value)


def test_metrics_by_name():
    assert list(select_metrics("disdiff", ["all"])) == list(METRICS)
    assert list(select_metrics("disdiff", ["SAP", "factor-vae", "sap"])) == ["sap", "factor_vae"]
    assert list(select_metrics("disdiff", "beta_VAE")) == ["beta_vae"]
    assert "sap" in select_metrics("disentanglement_lib") and "med" not in select_metrics("disentanglement_lib")


def test_a_protocol_changes_its_own_settings_alone():
    fast = select_metrics("fast", ["all"])
    assert fast["factor_vae"].protocol["num_train"] < 10000
    assert fast["factor_vae"].protocol["prune_threshold"] == 0.05
    assert METRICS["factor_vae"].protocol["num_train"] == 10000


@pytest.mark.parametrize(
    "protocol,names,message",
    [
        ("disdif", None, "Did you mean 'disdiff'"),
        ("disdiff", ["factor_vea"], "Did you mean 'factor_vae'"),
        ("disdiff", [], "got none"),
    ],
)
def test_unknown_names(protocol, names, message):
    with pytest.raises(ConfigError, match=message):
        select_metrics(protocol, names)


@pytest.fixture
def own_metrics(tmp_path, monkeypatch):
    """A module of a user's own with two metrics; the registry is restored afterwards."""
    lines = [
        "from ldm.metrics import Metric",
        "OWN = Metric('own', len, 'score', {'num_train': 9}, fast={'num_train': 3})",
    ]
    (tmp_path / "own_metrics.py").write_text("\n".join([*lines, "TAKEN = Metric('MIG', len, 'score')"]))
    monkeypatch.syspath_prepend(tmp_path)
    yield "own_metrics"
    ALL_METRICS.pop("own", None)


def test_metrics_outside_the_package_by_dotted_path(own_metrics):
    chosen = select_metrics("disdiff", ["mig", f"{own_metrics}.OWN"])
    assert list(chosen) == ["mig", "own"] and chosen["own"].protocol == {"num_train": 9}
    assert select_metrics("fast", f"{own_metrics}.OWN")["own"].protocol == {"num_train": 3}
    assert select_metrics("disdiff", "OWN")["own"].key == "own"  # registered


@pytest.mark.parametrize(
    "name,message",
    [("TAKEN", "another metric has the key 'MIG'"), ("Metric", "got type"), ("X", "module 'own_metrics' has no 'X'")],
)
def test_paths_that_are_not_metrics(own_metrics, name, message):
    with pytest.raises(ConfigError, match=message):
        select_metrics("disdiff", f"{own_metrics}.{name}")
