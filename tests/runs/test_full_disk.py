"""Full disks, folders without permissions, and temporary files of processes that were killed."""

from __future__ import annotations

import errno
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

from ldm.runs import disk
from ldm.runs.checkpoint_io import AtomicCheckpointIO, read_checkpoint
from ldm.runs.disk import full_message, is_full, refused_message, remove_leftovers, require_writable
from ldm.runs.records import update_run
from ldm.training.cli import run_command
from ldm.training.loggers import MetricsCSVLogger
from ldm.util import UserError, atomic_write, owner_mark


@pytest.fixture
def small(tmp_path: Path):
    """A disk of 2 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    if os.name == "nt" or shutil.which("mount") is None or os.geteuid() != 0:
        pytest.skip("mounting requires root")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("mounting is not permitted")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path, spare: int = 0) -> None:
    with open(folder / "filler", "wb", buffering=0) as stream:
        stream.write(bytes(disk.free_bytes(folder) - spare))


def test_a_checkpoint_on_a_full_disk(small: Path) -> None:
    last = small / "run" / "checkpoints" / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"state_dict": {"w": torch.arange(9)}}, last)
    with pytest.raises(UserError) as caught:
        AtomicCheckpointIO().save_checkpoint({"state_dict": {"w": torch.zeros(10**6)}}, last)
    text = str(caught.value)
    assert f"no space left on the disk of {last.parent} (" in text and "MB free)" in text
    assert (
        "last.ckpt was not saved" in text
        and f"then continue with: python main.py -r {small / 'run'} -t (or with a copy" in text
    )
    assert torch.equal(read_checkpoint(last)["state_dict"]["w"], torch.arange(9))
    assert [path.name for path in last.parent.iterdir()] == ["last.ckpt"]


def test_a_record_on_a_full_disk(small: Path, capsys) -> None:
    update_run(small, status="running")
    fill(small)
    assert run_command(lambda: update_run(small, text="x" * 10**5) and None) == 1
    assert f"no space left on the disk of {small} (0.0 MB free)" in capsys.readouterr().err
    assert sorted(path.name for path in small.iterdir()) == ["filler", "run.json"]


def test_rows_of_a_full_disk_are_whole_and_written_later(small: Path) -> None:
    log = MetricsCSVLogger(str(small), flush_logs_every_n_steps=300)
    log.log_metrics({"loss": 1.0}, 0)
    log.save()
    before = log.path.read_bytes()
    fill(small)
    for step in range(1, 1000):
        log._rows.append({"loss": float(step), "step": step})
    with pytest.raises(OSError, match="No space left"):
        log.save()
    assert log.path.read_bytes() == before
    (small / "filler").unlink()
    log.save()
    assert log.path.read_text().count("\n") == 1001


def test_the_temporary_folder_is_named(small: Path, monkeypatch, capsys) -> None:
    fill(small)
    monkeypatch.setenv("TMPDIR", str(small))

    def write() -> None:
        with open(small / "x", "wb") as stream:
            stream.write(bytes(10**6))

    assert run_command(write) == 1
    text = capsys.readouterr().err
    assert f"disk of {small} (0.0 MB free)" in text and "set the environment variable TMPDIR" in text
    assert "main.py" not in text


def test_full_disks_are_recognized() -> None:
    assert is_full(OSError(errno.ENOSPC, "No space left on device"))
    assert is_full(OSError(errno.EDQUOT, "Disk quota exceeded"))
    assert is_full(RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 64 vs 0"))
    assert not is_full(OSError(errno.EACCES, "No space left of course")) and not is_full(ValueError("No space left"))


def test_the_file_of_the_error_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError) as caught, atomic_write(tmp_path / "sub" / "a.json"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert f"disk of {tmp_path / 'sub'} (" in full_message(caught.value)
    assert not list((tmp_path / "sub").iterdir())


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EPERM])
def test_missing_permissions_are_one_line(number: int, capsys) -> None:
    def fail() -> None:
        raise OSError(number, os.strerror(number), "/some/file")

    assert run_command(fail) == 1
    assert capsys.readouterr().err.startswith(f"error: /some/file: cannot be opened or written ({os.strerror(number)})")
    assert refused_message(OSError(errno.EIO, "broken", "x")) is None


def test_a_folder_that_cannot_be_written_is_found_early(tmp_path: Path, monkeypatch) -> None:
    require_writable(tmp_path / "a" / "b", "")
    assert not list(tmp_path.iterdir())

    def refuse(**_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(UserError, match=r"cannot be written \(Read-only file system\). Choose -l"):
        require_writable(tmp_path, "Choose -l")


def ended_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_temporary_files_of_ended_processes_are_removed(tmp_path: Path) -> None:
    here, dead, old = platform.node(), ended_pid(), time.time() - 25 * 3600
    alive = owner_mark()
    names = {
        f".last.ckpt.{alive}.tmp": True,
        f".last.ckpt.{dead}@{here}@0123abcd.tmp": False,
        f".last.ckpt.{dead}@elsewhere@0123abcd.tmp": True,
        ".last.ckpt.0123456789abcdef0123456789abcdef.tmp": True,
        f".old.{dead}@elsewhere@0123abcd.tmp": False,
        ".old.0123456789abcdef0123456789abcdef.tmp": False,
        f".old.{alive}.tmp": False,  # of a process that has the same number now
        ".old.tmp": True,
        "old.tmp": True,
    }
    (tmp_path / "checkpoints").mkdir()
    for name in names:
        path = tmp_path / "checkpoints" / name
        path.write_bytes(b"")
        if "old" in name:
            os.utime(path, (old, old))
    remove_leftovers(tmp_path)
    left = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert left == {name for name, stays in names.items() if stays}


def test_scratch_folders_of_ended_processes_are_removed(tmp_path: Path) -> None:
    here, dead = platform.node(), ended_pid()
    for owner in (f"{dead}@{here}@0123abcd", owner_mark()):
        (tmp_path / f".scores-{owner}" / "0").mkdir(parents=True)
    remove_leftovers(tmp_path, ".scores-*")
    (left,) = tmp_path.iterdir()
    assert f"-{os.getpid()}@" in left.name
