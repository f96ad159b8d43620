"""Checkpoint files: whole or absent, read as data."""

from __future__ import annotations

import errno
import os
import pickle
from pathlib import Path

import pytest
import torch

from ldm.runs.checkpoint_io import AtomicCheckpointIO, _explain_write_error, read_checkpoint
from ldm.util import UserError

io = AtomicCheckpointIO()
CONTENT = {"state_dict": {"w": torch.arange(5.0)}, "run": {"name": "x", "seed": 1}}


@pytest.fixture
def last(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoints" / "last.ckpt"
    io.save_checkpoint(CONTENT, path)
    return path


def test_round_trip(last: Path) -> None:
    loaded = io.load_checkpoint(last, weights_only=False)
    assert loaded["run"] == CONTENT["run"]
    assert torch.equal(loaded["state_dict"]["w"], CONTENT["state_dict"]["w"])
    assert [path.name for path in last.parent.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("[enforce fail] PytorchStreamWriter failed writing file data/0: No space left on device"),
    ],
)
@pytest.mark.parametrize("name", ["last.ckpt", "epoch=000001.ckpt"])
def test_a_full_disk(last: Path, error: Exception, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = last.read_bytes()

    def write_half(content: object, stream: object) -> None:
        stream.write(b"half")
        raise error

    monkeypatch.setattr(torch, "save", write_half)
    with pytest.raises(UserError, match=r"no space left on the disk.*last.ckpt.*intact.*main.py -r"):
        io.save_checkpoint(CONTENT, last.with_name(name))
    assert last.read_bytes() == before
    assert [path.name for path in last.parent.iterdir()] == ["last.ckpt"]


def test_a_full_disk_when_syncing(last: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError, match="no space left"):
        io.save_checkpoint(CONTENT, last)
    assert read_checkpoint(last)["run"]["seed"] == 1


def test_other_errors_pass(last: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(content: object, stream: object) -> None:
        raise RuntimeError("something else")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(RuntimeError, match="something else"):
        io.save_checkpoint(CONTENT, last)


@pytest.mark.parametrize("length", [0, 10, 400])
def test_a_cut_file(last: Path, length: int) -> None:
    io.save_checkpoint(CONTENT, last.with_name("epoch=000003.ckpt"))
    last.write_bytes(last.read_bytes()[:length])
    with pytest.raises(UserError, match=r"last.ckpt.*damaged.*main.py -r .*epoch=000003.ckpt -t"):
        io.load_checkpoint(last)


def test_an_absent_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        io.load_checkpoint(tmp_path / "no.ckpt")


class Payload:
    """Something a checkpoint must not bring along."""


def test_code_is_not_run(tmp_path: Path) -> None:
    torch.save({"payload": Payload()}, tmp_path / "bad.ckpt")
    with pytest.raises(UserError, match="more than tensors"):
        read_checkpoint(tmp_path / "bad.ckpt")
    (tmp_path / "worse.ckpt").write_bytes(pickle.dumps({"payload": Payload()}))
    with pytest.raises(UserError, match="more than tensors"):
        read_checkpoint(tmp_path / "worse.ckpt")


def test_a_full_disk_as_torch_reports_it_is_explained(tmp_path):
    (tmp_path / "last.ckpt").write_bytes(b"old")
    error = RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 5019648 vs 5019540")
    told = _explain_write_error(error, tmp_path / "last.ckpt")
    assert isinstance(told, UserError)
    assert "no space left" in str(told) and "intact" in str(told)
