"""Published ways of scoring: which metrics, with which numbers of samples.

Example:
    >>> list(select_metrics("disdiff"))
    ['beta_vae', 'dci', 'mig', 'factor_vae']
    >>> select_metrics("fast", ["mig"])["mig"].protocol["num_train"]
    2000
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ldm.metrics.registry import DEFAULT_METRICS, EXTRA_METRICS, METRICS, Metric
from ldm.util import ConfigError, did_you_mean

ALL = "all"
DEFAULT_PROTOCOL = "disdiff"


@dataclass(frozen=True)
class Protocol:
    """A way of scoring.

    Attributes:
        summary: whose it is, in a line.
        metrics: what it runs when nothing else is asked for.
        settings: metric -> keyword arguments that differ from those in ``METRICS``.
    """

    summary: str
    metrics: tuple[str, ...]
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


PROTOCOLS: dict[str, Protocol] = {
    "disdiff": Protocol("DisDiff, CLIP-DisDiff and EncDiff: evaluate.py", DEFAULT_METRICS),
    "disentanglement_lib": Protocol(
        "disentanglement_lib: unsupervised_study_v1, and IRS",
        ("beta_vae", "factor_vae", "mig", "dci", "sap", "modularity_explicitness", "irs", "unsupervised"),
    ),
    "fast": Protocol(
        "a fifth of the samples, for curves while training; not for tables",
        DEFAULT_METRICS,
        {
            "beta_vae": {"num_train": 2000, "num_eval": 1000},
            "dci": {"num_train": 2000, "num_test": 1000},
            "mig": {"num_train": 2000},
            "factor_vae": {"num_train": 2000, "num_eval": 1000, "num_variance_estimate": 2000},
            "sap": {"num_train": 2000, "num_test": 1000},
            "modularity_explicitness": {"num_train": 2000, "num_test": 2000},
            "irs": {"num_train": 2000},
            "unsupervised": {"num_train": 2000},
            "med": {"num_train": 2000, "num_test": 1000},
            "downstream_task": {"num_train": [10, 100, 1000], "num_test": 1000},
            "reduced_downstream_task": {"num_train": [10, 100, 1000], "num_test": 1000},
            "fairness": {"num_train": 2000},
        },
    ),
    "med": Protocol("DisDiff's evaluate_med.py: MED with top-2 on latents that are not reduced", ("med",)),
}


def select_metrics(protocol: str = DEFAULT_PROTOCOL, names: Sequence[str] | str | None = None) -> dict[str, Metric]:
    """The metrics to run, with a protocol's settings.

    Args:
        protocol: a key of ``PROTOCOLS``.
        names: keys of ``METRICS`` or ``EXTRA_METRICS``, in any case, or their names in score files (``"beta_VAE"``);
            ``"all"`` stands for every entry of ``METRICS``; None means what the protocol runs.

    Returns:
        ``{name: metric}`` in the order asked for, each once.

    Raises:
        ConfigError: unknown protocol or metric; the message lists the known ones and the nearest.
    """
    if protocol not in PROTOCOLS:
        raise ConfigError(
            f"unknown protocol {protocol!r}; known: {', '.join(PROTOCOLS)}.{did_you_mean(protocol, PROTOCOLS)}"
        )
    chosen = PROTOCOLS[protocol]
    asked = chosen.metrics if names is None else [names] if isinstance(names, str) else names
    if not asked:
        raise ConfigError(f"no metric is named; known: {', '.join(_KNOWN)}, or {ALL!r}")
    found: dict[str, Metric] = {}
    for name in asked:
        for known in METRICS if name == ALL else (_known(name),):
            metric = _KNOWN[known]
            found[known] = replace(metric, protocol={**metric.protocol, **chosen.settings.get(known, {})})
    return found


_KNOWN = {**METRICS, **EXTRA_METRICS}
_SPELLINGS = {spelling.lower(): name for name, metric in _KNOWN.items() for spelling in (name, metric.key)}


def _known(name: str) -> str:
    """The registry's name of a metric.

    Raises:
        ConfigError: there is none of that name.
    """
    found = _SPELLINGS.get(str(name).lower().replace("-", "_"))
    if found is None:
        raise ConfigError(
            f"unknown metric {name!r}; known: {', '.join(_KNOWN)}, or {ALL!r}.{did_you_mean(name, _SPELLINGS)}"
        )
    return found
