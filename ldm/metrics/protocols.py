"""Published protocols: selections of metrics and their numbers of samples.

Example:
    >>> list(select_metrics("disdiff"))
    ['beta_vae', 'dci', 'mig', 'factor_vae']
    >>> select_metrics("fast", ["mig"])["mig"].protocol["num_train"]
    2000
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ldm.metrics.registry import ALL_METRICS, DEFAULT_METRICS, METRICS, Metric, metric_from_path
from ldm.util import ConfigError, did_you_mean

ALL = "all"
DEFAULT_PROTOCOL = "disdiff"


@dataclass(frozen=True)
class Protocol:
    """A selection of metrics and their settings.

    Attributes:
        summary: origin, in one line.
        metrics: names of its metrics.
        is_fast: whether the metrics' arguments ``fast`` replace those of their ``protocol``.
    """

    summary: str
    metrics: tuple[str, ...]
    is_fast: bool = False


PROTOCOLS: dict[str, Protocol] = {
    "disdiff": Protocol("DisDiff, CLIP-DisDiff and EncDiff: evaluate.py", DEFAULT_METRICS),
    "disentanglement_lib": Protocol(
        "disentanglement_lib: unsupervised_study_v1, and IRS",
        ("beta_vae", "factor_vae", "mig", "dci", "sap", "modularity_explicitness", "irs", "unsupervised"),
    ),
    "fast": Protocol(
        "a fifth of the samples, for curves during training; not for tables", DEFAULT_METRICS, is_fast=True
    ),
    "med": Protocol("DisDiff's evaluate_med.py: MED with top-2 on latents that are not reduced", ("med",)),
}


def select_metrics(protocol: str = DEFAULT_PROTOCOL, names: Sequence[str] | str | None = None) -> dict[str, Metric]:
    """Return the metrics to run, with the settings of a protocol.

    Args:
        protocol: a key of ``PROTOCOLS``.
        names: keys of ``METRICS`` or ``EXTRA_METRICS``, their names in score files (``"beta_VAE"``) or headings, of
            which letters and digits count; dotted paths of metrics outside this package; ``"all"`` for every entry of
            ``METRICS``. None selects the metrics of the protocol.

    Returns:
        ``{name: metric}`` in the given order, each once.

    Raises:
        ConfigError: unknown protocol or metric; the message lists the known ones and the nearest.
    """
    if protocol not in PROTOCOLS:
        raise ConfigError(
            f"protocol: expected one of {', '.join(PROTOCOLS)}, got {protocol!r}.{did_you_mean(protocol, PROTOCOLS)}"
        )
    chosen = PROTOCOLS[protocol]
    asked = chosen.metrics if names is None else [names] if isinstance(names, str) else names
    if not asked:
        raise ConfigError(f"metrics: expected some of {', '.join(ALL_METRICS)}, or {ALL!r}, got none")
    found: dict[str, Metric] = {}
    for name in asked:
        for known in METRICS if name == ALL else (_known(name),):
            metric = ALL_METRICS[known]
            found[known] = replace(metric, protocol={**metric.protocol, **(metric.fast if chosen.is_fast else {})})
    return found


def _known(name: str) -> str:
    """Return the name of a metric in the registry; a dotted path is registered.

    Raises:
        ConfigError: there is no such metric.
    """
    if "." in str(name):
        return metric_from_path(name)
    spellings = {
        _letters(spelling): known
        for known, metric in ALL_METRICS.items()
        for spelling in (metric.heading, metric.key, known)
    }
    found = spellings.get(_letters(str(name)))
    if found is None:
        hint = did_you_mean(name, ALL_METRICS)
        raise ConfigError(f"metrics: expected some of {', '.join(ALL_METRICS)}, or {ALL!r}, got {name!r}.{hint}")
    return found


def _letters(name: str) -> str:
    """Return the letters and digits of a name in lower case."""
    return "".join(filter(str.isalnum, name.lower()))
