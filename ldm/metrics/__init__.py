"""Disentanglement metrics: pure functions of a representation, a factor sampler and a random generator.

``evaluate`` scores a representation in one call; ``METRICS`` lists the metrics with the protocol of DisDiff and
CLIP-DisDiff, ``PROTOCOLS`` other published protocols. To add a metric, write its function in a file of its own and add
an entry to ``METRICS`` in ``ldm/metrics/registry.py``.

Example:
    >>> sorted(METRICS)[:5]
    ['beta_vae', 'dci', 'factor_vae', 'irs', 'med']
    >>> import numpy as np
    >>> factors = np.array([[hue, shape] for hue in range(10) for shape in range(4)])
    >>> evaluate(factors.astype(float), factors, "factor_vae", protocol="fast")["factor_VAE"]["eval_accuracy"]
    1.0
"""

from __future__ import annotations

from ldm.metrics.beta_vae import beta_vae
from ldm.metrics.common import MetricError
from ldm.metrics.dci import dci
from ldm.metrics.downstream import downstream_task, fairness, reduced_downstream_task
from ldm.metrics.evaluate import PROTOCOL_SEED, evaluate, score
from ldm.metrics.factor_vae import factor_vae
from ldm.metrics.information.gaps import dcimig, jemmig, mig_sup
from ldm.metrics.information.infomec import infomec
from ldm.metrics.irs import irs
from ldm.metrics.med import med
from ldm.metrics.mig import mig
from ldm.metrics.modularity_explicitness import modularity_explicitness
from ldm.metrics.protocols import DEFAULT_PROTOCOL, PROTOCOLS, Protocol, select_metrics
from ldm.metrics.registry import DEFAULT_METRICS, EXTRA_METRICS, METRICS, Metric
from ldm.metrics.regression.dci_es import dci_es
from ldm.metrics.regression.dci_regression import dci_regression
from ldm.metrics.regression.mcc import mcc
from ldm.metrics.regression.r2 import r2
from ldm.metrics.sampling.continuous import discretize
from ldm.metrics.sampling.table import FactorTable
from ldm.metrics.sap import sap
from ldm.metrics.tad import tad
from ldm.metrics.udr import udr
from ldm.metrics.unsupervised import unsupervised

__all__ = ["DEFAULT_METRICS", "DEFAULT_PROTOCOL", "EXTRA_METRICS", "METRICS", "PROTOCOLS", "PROTOCOL_SEED"]
__all__ += ["FactorTable", "Metric", "MetricError", "Protocol", "evaluate", "score", "select_metrics"]
__all__ += ["beta_vae", "dci", "factor_vae", "irs", "med", "mig", "modularity_explicitness", "sap", "tad", "udr"]
__all__ += ["dci_es", "dci_regression", "dcimig", "discretize", "infomec", "jemmig", "mcc", "mig_sup", "r2"]
__all__ += ["downstream_task", "fairness", "reduced_downstream_task", "unsupervised"]
