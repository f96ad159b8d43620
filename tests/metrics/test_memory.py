"""Latents of a whole large data set are scored from disk."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from ldm.data.factors import factor_space
from ldm.metrics import evaluate

GIB = 2**30


@pytest.mark.slow
def test_a_million_images_of_640_numbers_stay_on_disk(tmp_path):
    """MPI3D's 1,036,800 images with 20 units of 32 numbers: 2.5 GiB in the file, far less in memory."""
    space = factor_space("mpi3d")
    path = tmp_path / "latents.npy"
    shape = (space.size, 20, 32)
    latents = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)  # a file of holes
    few = np.arange(0, space.size, 997)
    latents[few] = np.random.default_rng(0).normal(size=(len(few), 20, 32))
    latents.flush()
    del latents
    tracemalloc.start()
    try:
        scores = evaluate(np.load(path, mmap_mode="r"), space, ["factor_vae", "mig", "med"], protocol="fast")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert path.stat().st_size > 2.4 * GIB
    assert peak < 1 * GIB
    assert scores["factor_VAE"]["num_active_dims"] == 20
