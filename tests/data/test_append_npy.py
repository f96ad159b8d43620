"""Arrays that are written block by block: builds that continue, and disks that are full."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ldm.data.rows import append_npy, map_npy
from ldm.util import UserError


def _rows(values: np.ndarray, block: int, killed_at: int | None = None):
    def blocks(done: int) -> Iterator[np.ndarray]:
        for start in range(done, len(values), block):
            if start == killed_at:
                os.kill(os.getpid(), signal.SIGKILL)
            yield values[start : start + block]

    return blocks


def test_a_killed_build_continues(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(23, 3, 2)).astype(np.float32)
    path = tmp_path / "x.npy"
    context = multiprocessing.get_context("fork")
    child = context.Process(target=append_npy, args=(path, values.shape, 4, _rows(values, 4, killed_at=12)))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL and not path.exists()
    with open(tmp_path / ".x.npy.part", "ab") as stream:
        stream.write(b"an incomplete block")
    starts = []

    def rest(done: int) -> Iterator[np.ndarray]:
        starts.append(done)
        return _rows(values, 4)(done)

    append_npy(path, values.shape, 4, rest)
    assert starts == [12]
    np.testing.assert_array_equal(map_npy(path), values)
    assert [each.name for each in tmp_path.iterdir()] == ["x.npy"]


def test_a_part_of_another_shape_is_begun_again(tmp_path: Path) -> None:
    values = np.arange(12, dtype=np.float32).reshape(6, 2)
    (tmp_path / ".x.npy.part").write_bytes(b"something else" * 20)
    append_npy(tmp_path / "x.npy", values.shape, 4, _rows(values, 4))
    np.testing.assert_array_equal(map_npy(tmp_path / "x.npy"), values)


def test_a_full_disk_while_writing_leaves_nothing(tmp_path: Path) -> None:
    def blocks(done: int) -> Iterator[np.ndarray]:
        yield np.zeros((4, 2), np.float32)
        resource.setrlimit(resource.RLIMIT_FSIZE, (170, hard))
        yield np.zeros((4, 2), np.float32)

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.raises(UserError, match="could not be written"):
            append_npy(tmp_path / "x.npy", (100, 2), 4, blocks)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert not list(tmp_path.iterdir())
