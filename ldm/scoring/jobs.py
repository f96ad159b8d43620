"""What runs in a worker: reducing latents to units, one metric or one factor of it. No torch, nothing of the client."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ldm.metrics.common import (
    FactorSampler,
    MetricError,
    Representation,
    factor_codes,
    factor_entropies,
    histogram_codes,
    mutual_information,
)
from ldm.metrics.representation import scalar_units
from ldm.scoring.arrays import array_source, open_array
from ldm.scoring.factors import Factors

_PACKAGES = ("numpy", "scipy", "scikit-learn", "numba", "clip-disdiff")


@dataclass(frozen=True)
class Part:
    """A job's share of a score file: a metric, or one factor of a metric that comes in parts.

    Attributes:
        name: "mig", or "dci/3" for one factor.
        function: the metric, or its part.
        factor: number of the factor; None for a whole metric.
        arguments: keyword arguments of the protocol.
        seconds: estimated cost.
        reduce: whether vectors per unit become one number each.
    """

    name: str
    function: Callable[..., dict[str, Any]]
    factor: int | None
    arguments: dict[str, Any]
    seconds: float
    reduce: bool = True


@dataclass(frozen=True)
class Place:
    """Where the numbers of one representation file are found.

    Attributes:
        latents: the file.
        folder: scratch folder of this file, which all workers reach.
    """

    latents: Path
    folder: Path

    @property
    def units(self) -> Path:
        """The reduced latents (N, U), once ``prepare`` is done."""
        return self.folder / "units.npy"


def prepare(place: Place) -> None:
    """Reduce a file's latents to scalar units (N, U), which other jobs share through the page cache.

    Raises:
        UserError: the file is damaged.
        MetricError: a value is not finite.
    """
    units = scalar_units(open_array(array_source(place.latents), place.folder))
    place.folder.mkdir(parents=True, exist_ok=True)
    temporary = place.folder / f".units.{os.getpid()}.npy"
    try:
        np.save(temporary, units)
        os.replace(temporary, place.units)  # a worker that dies here leaves nothing half done
    finally:
        temporary.unlink(missing_ok=True)


def score_part(part: Part, place: Place, factors: Factors, seed: int) -> dict[str, Any]:
    """One metric, or one factor of it, with a random generator of its own.

    Returns:
        ``result`` (the metric's dict), ``seconds`` it took and ``versions`` it was computed with.

    Raises:
        MetricError: the representation cannot be scored by this metric.
    """
    started = time.monotonic()
    which = () if part.factor is None else (part.factor,)
    codes = np.load(place.units, mmap_mode="r") if part.reduce else _flat(place)
    result = part.function(codes, factors.sampler(), np.random.RandomState(seed), *which, **part.arguments)
    return {"result": _plain(result), "seconds": round(time.monotonic() - started, 3), "versions": versions()}


def _flat(place: Place) -> np.ndarray:
    """Latents as they are, each of their numbers a unit: (N, U * D)."""
    latents = open_array(array_source(place.latents), place.folder)
    return latents.reshape(len(latents), -1)


def _plain(value: Any) -> Any:
    """Python's own numbers and lists, ready for JSON."""
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_plain(entry) for entry in value]
    if isinstance(value, np.generic):
        return value.item()
    return value


def information(
    representation: Representation,
    sampler: FactorSampler,
    random_state: np.random.RandomState,
    *,
    num_train: int = 10000,
    num_bins: int = 20,
) -> dict[str, Any]:
    """How much each unit tells of each factor, for pictures; no score.

    Args:
        representation: (N, K) codes of the whole data set.
        sampler: the data set's factors.
        random_state: fresh generator.
        num_train: labelled codes drawn.
        num_bins: histogram bins each unit is cut into.

    Returns:
        ``mutual_information`` (K, F) and ``entropies`` (F,), both in nats, and ``deviations`` (K,) of the units.
    """
    codes, labels = factor_codes(representation, sampler, num_train, random_state)
    if not np.isfinite(codes).all():
        raise MetricError("codes must be finite")
    return {
        "mutual_information": mutual_information(histogram_codes(codes, num_bins), labels),
        "entropies": factor_entropies(labels),
        "deviations": codes.std(axis=0),
    }


@functools.lru_cache(maxsize=1)
def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a score."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
