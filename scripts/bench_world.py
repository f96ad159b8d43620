"""Measure how fast the embedded world renders images on one core: ``python scripts/bench_world.py``."""

from __future__ import annotations

import argparse
import time

import numpy as np
from torch import set_num_threads

from ldm.data.world import World3D


def images_per_second(dataset: World3D, batch_size: int, seconds: float) -> float:
    """Return images per second of processor time, in random batches of ``batch_size``."""
    rng = np.random.default_rng(0)
    dataset.__getitems__(rng.integers(len(dataset), size=batch_size))
    count, start = 0, time.process_time()
    while time.process_time() - start < seconds:
        dataset.__getitems__(rng.integers(len(dataset), size=batch_size))
        count += batch_size
    return count / (time.process_time() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=2.0, help="processor time per measurement")
    arguments = parser.parse_args()
    set_num_threads(1)
    for size in (32, 64):
        for text in (None, "attributes", "caption"):
            rate = images_per_second(World3D(size, text=text), arguments.batch_size, arguments.seconds)
            print(f"{size} px, text {text or 'none':10s}: {rate:10,.0f} images/s")


if __name__ == "__main__":
    main()
