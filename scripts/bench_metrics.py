"""Compare ``ldm.metrics`` with direct implementations on scikit-learn, on one core:

    python scripts/bench_metrics.py                        # full protocol at 6 and 20 codes: 15 minutes
    python scripts/bench_metrics.py --codes 20 --metrics dci
    python scripts/bench_metrics.py --space mpi3d cars3d --codes 20 --metrics dci      # many classes: 20 minutes
    python scripts/bench_metrics.py --quick                # a twentieth of the samples: a minute

Both versions run in turn in this process on the same codes of the factor space (Shapes3D), with one thread. Times are
processor times of the whole metric, including the draws; imports, compilation and a first run on few samples are
excluded. ``--seeds`` also reports the difference between two seeds of scikit-learn's DCI, which break ties between
splits differently.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from plain_metrics import PLAIN, Scores
from rich.console import Console
from rich.table import Table
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import threadpool_limits

from ldm.data.factors import FactorSpace, factor_space
from ldm.metrics import DEFAULT_METRICS, METRICS, PROTOCOL_SEED

WIDTH = 120  # of the tables, at least
QUICK = 20  # --quick divides the numbers of samples by this
WARM_UP = {"num_train": 500, "num_eval": 500, "num_test": 500, "num_variance_estimate": 500}


def make_codes(space: FactorSpace, num_units: int, seed: int = 0) -> np.ndarray:
    """Return codes (N, K) float32: one unit per factor, then mixtures of two or three factors, with Gaussian noise."""
    rng = np.random.default_rng(seed)
    weights = np.zeros((space.num_factors, num_units))
    for unit in range(num_units):
        if unit < space.num_factors:
            weights[unit, unit] = 1.0
        else:
            mixed = rng.choice(space.num_factors, size=rng.integers(2, 4), replace=False)
            weights[mixed, unit] = rng.normal(size=len(mixed))
    factors = space.factors_of(np.arange(space.size)) / np.array(space.factors_num_values)
    return (factors @ weights + rng.normal(scale=0.05, size=(space.size, num_units))).astype(np.float32)


def timed(metric: Callable[..., Scores], codes: np.ndarray, space: FactorSpace, protocol: Mapping[str, Any]) -> tuple:
    """Return the scores and the processor time in seconds."""
    with warnings.catch_warnings(), threadpool_limits(1):
        warnings.simplefilter("ignore", ConvergenceWarning)  # the protocols stop after 100 iterations
        start = time.process_time()
        scores = metric(codes, space, np.random.RandomState(PROTOCOL_SEED), **protocol)
        return {key: float(value) for key, value in scores.items()}, time.process_time() - start


def largest_difference(ours: Mapping[str, float], theirs: Mapping[str, float]) -> float:
    """Return the largest difference over the figures that both report."""
    return max(abs(ours[key] - theirs[key]) for key in theirs)


def fewer(protocol: Mapping[str, Any], divisor: int) -> dict[str, Any]:
    """Return the protocol with divided numbers of samples."""
    return {key: value // divisor if key in WARM_UP else value for key, value in protocol.items()}


def compare(name: str, codes: np.ndarray, space: FactorSpace, divisor: int, with_seeds: bool) -> dict[str, Any]:
    """Measure both implementations of a metric."""
    metric, protocol = METRICS[name], fewer(METRICS[name].protocol, divisor)
    few = {key: min(value, WARM_UP.get(key, value)) for key, value in protocol.items()}
    for implementation in (metric.function, PLAIN[name]):
        timed(implementation, codes, space, few)
    ours, our_seconds = timed(metric.function, codes, space, protocol)
    theirs, their_seconds = timed(PLAIN[name], codes, space, protocol)
    found = {
        "metric": name,
        "codes": codes.shape[1],
        "figure": metric.figure,
        "ours": ours,
        "plain": theirs,
        "seconds": our_seconds,
        "plain_seconds": their_seconds,
        "ratio": their_seconds / our_seconds,
        "difference": largest_difference(ours, theirs),
    }
    if with_seeds and name == "dci":
        other = timed(partial(PLAIN[name], seed=1), codes, space, protocol)[0]
        found["difference_of_seeds"] = largest_difference(other, theirs)
    return found


def suite(results: Sequence[Mapping[str, Any]]) -> dict[str, float] | None:
    """Return seconds and ratio of all default metrics together; None if some did not run."""
    chosen = [found for found in results if found["metric"] in DEFAULT_METRICS]
    if len(chosen) < len(DEFAULT_METRICS):
        return None
    seconds, plain_seconds = (sum(found[key] for found in chosen) for key in ("seconds", "plain_seconds"))
    return {"seconds": seconds, "plain_seconds": plain_seconds, "ratio": plain_seconds / seconds}


def show(results: Sequence[Mapping[str, Any]], title: str, console: Console) -> None:
    """Print the table of one space and number of codes."""
    table = Table(title=title)
    for heading in ("metric", "s", "plain s", "ratio", "figure", "ours", "plain", "largest difference"):
        table.add_column(heading, justify="left" if heading in ("metric", "figure") else "right")
    for found in results:
        figure = found["figure"]
        difference = f"{found['difference']:.1e}"
        if "difference_of_seeds" in found:
            difference += f" (seeds: {found['difference_of_seeds']:.1e})"
        table.add_row(
            found["metric"],
            f"{found['seconds']:.2f}",
            f"{found['plain_seconds']:.2f}",
            f"{found['ratio']:.1f}x",
            figure,
            f"{found['ours'][figure]:.4f}",
            f"{found['plain'][figure]:.4f}",
            difference,
        )
    total = suite(results)
    if total is not None:
        table.add_section()
        cells = (f"{total['seconds']:.2f}", f"{total['plain_seconds']:.2f}", f"{total['ratio']:.1f}x")
        table.add_row("default suite", *cells, "", "", "", "")
    console.print(table)


def machine() -> dict[str, str]:
    """Return processor and versions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    packages = {name: version(name) for name in ("numpy", "numba", "scikit-learn", "scipy")}
    return {"processor": names[0] if names else platform.processor(), "python": platform.python_version(), **packages}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codes", type=int, nargs="+", default=[6, 20], help="numbers of codes (at least 2)")
    parser.add_argument("--space", nargs="+", default=["shapes3d"], metavar="NAME", help="data sets (shapes3d)")
    parser.add_argument("--metrics", nargs="+", default=list(METRICS), choices=list(METRICS), metavar="NAME")
    parser.add_argument("--quick", action="store_true", help=f"1/{QUICK} of the samples")
    parser.add_argument("--seeds", action="store_true", help="also run DCI of scikit-learn with another seed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE")
    options = parser.parse_args(arguments)
    console = Console()
    console.width = max(console.width, WIDTH)
    about = machine()
    console.print(", ".join(f"{key} {value}" for key, value in about.items()), highlight=False)
    console.print("one thread, processor time, warmed up" + (f", 1/{QUICK} of the samples" if options.quick else ""))
    every = []
    for name, num_units in itertools.product(options.space, options.codes):
        space, title, results = factor_space(name), f"{name}, {num_units} codes", []
        codes = make_codes(space, num_units)
        for metric in options.metrics:
            with console.status(f"{metric}, {title}"):
                results.append(compare(metric, codes, space, QUICK if options.quick else 1, options.seeds))
        show(results, title, console)
        every.append({"space": name, "codes": num_units, "suite": suite(results), "metrics": results})
    if options.json:
        options.json.write_text(json.dumps({"machine": about, "quick": options.quick, "results": every}, indent=1))


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"  # read by the boosted trees
    main()
