"""Tiny runs, and metrics that workers can import."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np
import psutil

from ldm.data.factors import FactorSpace
from ldm.metrics import Metric
from ldm.scoring.run import Options, score_folder

SPACE = FactorSpace(("hue", "shape", "size"), (4, 3, 5))


def write_latents(run: Path, epoch: int = 0, step: int = 100, space: FactorSpace | None = SPACE, **change) -> Path:
    """Store a representation (N, 3, 2) that shows each factor in one unit; ``change`` replaces or (None) drops keys."""
    factors = SPACE.factors_of(np.arange(SPACE.size)).astype(np.float32)
    content = {"latents": np.stack([factors, -0.5 * factors], axis=2), "num_samples": step}
    if space is not None:
        content |= {"factor_names": np.array(space.all_names), "factor_sizes": np.array(space.all_sizes)}
    content = {key: value for key, value in (content | change).items() if value is not None}
    path = run / "dis_repre" / f"epoch={epoch:06d}.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **content)
    return path


def score(
    logdir: Path, processes: int = 1, dataset: str | None = None, *, on_progress=None, skip=frozenset(), **options
):
    """Score a folder; ``options`` are those of ``Options``."""
    listener = on_progress or (lambda done, total: None)
    return score_folder(Options(logdir, processes, dataset, **options), listener, skip)


def spread(units, space, random_state) -> dict[str, float]:
    """A metric that shows what it was given."""
    return {"spread": float(np.std(units)), "draw": int(random_state.randint(1000)), "units": units.shape[1]}


def factor_size(units, space, random_state, factor) -> dict[str, float]:
    """One factor's part."""
    return {"size": space.factors_num_values[factor]}


def total_size(parts) -> dict[str, float]:
    """All factors' parts together."""
    return {"total": sum(part["size"] for part in parts)}


def slow_size(units, space, random_state, factor, log) -> dict[str, float]:
    """One factor's part that takes its time, and notes that it was begun."""
    with open(log, "a") as stream:
        stream.write(f"{units.shape}/{units.filename}/{factor}".replace(" ", "") + "\n")
    time.sleep(0.2)
    return {"size": space.factors_num_values[factor]}


def raise_error(units, space, random_state) -> dict[str, float]:
    """A metric with a defect."""
    raise ZeroDivisionError("no such number")


def not_finite(units, space, random_state) -> dict[str, object]:
    """A metric without a value."""
    return {"value": float("nan"), "values": np.array([1.0, np.inf])}


def kill_itself(units, space, random_state) -> dict[str, float]:
    """What the system does to a process for want of memory."""
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def square(number: int) -> int:
    """A quick job."""
    return number * number


def fail(message: str) -> None:
    """A job that raises."""
    raise ValueError(message)


def die_once(mark: Path) -> str:
    """A job killed on its first attempt only."""
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return "second attempt"


def leave() -> None:
    """A job that ends its process."""
    os._exit(3)


def sleep_long() -> None:
    """A job that does not end by itself."""
    time.sleep(600)


def environment() -> list[str | None]:
    """Return how many threads the worker's libraries may use, as their environment was when NumPy was loaded."""
    variables = psutil.Process().environ()  # those that the process was started with
    return [
        variables.get(f"{name}_THREADS")
        for name in ("OMP_NUM", "OPENBLAS_NUM", "MKL_NUM", "VECLIB_MAXIMUM", "NUMBA_NUM")
    ]


SPREAD = Metric("Spread", spread, "spread")
SIZES = Metric("Sizes", total_size, "total", part=factor_size, join=total_size)
