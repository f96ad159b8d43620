"""Worker processes that survive what their jobs do to them.

Each process gets one job at a time over a pipe of its own. A job that raises costs that job; a job whose process
is killed (by the system for want of memory, by hand) is known exactly, so it is retried once in a fresh process
and then reported, while all others go on undisturbed.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import logging
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any, Protocol

from ldm.util import ConfigError, UserError

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 2  # a killed job is tried once more
THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMBA_NUM_THREADS",
)


@dataclass(frozen=True)
class Job:
    """A call to make in a worker. ``function`` and ``args`` are pickled, so the function must be importable."""

    key: Hashable
    function: Callable[..., Any]
    args: tuple


@dataclass(frozen=True)
class Outcome:
    """What became of a job: its result, or one line saying what went wrong."""

    job: Job
    result: Any = None
    error: str | None = None


class Pool(Protocol):
    """What does jobs: processes of this machine, or a cluster."""

    @property
    def num_workers(self) -> int:
        """Jobs it can do at a time, now."""

    def submit(self, job: Job, priority: float = 0.0) -> None:
        """Queue a job; higher priority first."""

    def outcomes(self) -> Iterator[Outcome]:
        """Yield each job's outcome as it finishes, exactly once, until nothing is queued or running."""


class WorkerPool:
    """A fixed number of processes; use as a context manager, which ends them all at once on leaving.

    Args:
        num_workers: processes, each limited to one BLAS/OpenMP thread; started when first needed.

    Example:
        >>> with WorkerPool(2) as pool:  # doctest: +SKIP
        ...     pool.submit(Job("a", math.factorial, (5,)))
        ...     [outcome.result for outcome in pool.outcomes()]
        [120]
    """

    def __init__(self, num_workers: int) -> None:
        if num_workers < 1:
            raise ValueError(f"at least one worker process is needed, got {num_workers}")
        self._num_workers = num_workers
        self._idle: list[_Worker] = []
        self._busy: list[_Worker] = []
        self._waiting: list[tuple[float, int, Job]] = []
        self._order = itertools.count()
        self._attempts: dict[Hashable, int] = {}

    @property
    def num_workers(self) -> int:
        """Jobs it can do at a time."""
        return self._num_workers

    def submit(self, job: Job, priority: float = 0.0) -> None:
        """Queue a job; higher priority first, equal ones in order. May be called while reading ``outcomes``."""
        heapq.heappush(self._waiting, (-priority, next(self._order), job))

    def outcomes(self) -> Iterator[Outcome]:
        """Yield each job's outcome as it finishes, until nothing is queued or running."""
        while self._waiting or self._busy:
            self._hand_out()
            ready = wait([worker.connection for worker in self._busy])
            for worker in [worker for worker in self._busy if worker.connection in ready]:
                self._busy.remove(worker)
                outcome = self._receive(worker)
                if outcome is not None:
                    yield outcome

    def _hand_out(self) -> None:
        """Give every free process a job."""
        while self._waiting and len(self._busy) < self._num_workers:
            worker = self._idle.pop() if self._idle else _Worker()
            worker.job = heapq.heappop(self._waiting)[2]
            self._busy.append(worker)
            worker.send()

    def _receive(self, worker: _Worker) -> Outcome | None:
        """The outcome a worker has ready; None if it was killed and its job is queued again."""
        job = worker.job
        try:
            result, error = worker.connection.recv()
        except (EOFError, OSError):  # the pipe closed: the process is gone
            attempts = self._attempts[job.key] = self._attempts.get(job.key, 0) + 1
            how = worker.lost()
            if attempts < MAX_ATTEMPTS:
                self.submit(job)
                return None
            return Outcome(job, error=f"its process was killed {attempts} times ({how}); is memory short?")
        self._idle.append(worker)
        return Outcome(job, result, error)

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        for worker in self._idle + self._busy:
            worker.end()
        self._idle, self._busy, self._waiting = [], [], []


class _Worker:
    """One process and the pipe to it."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")  # nothing of the parent's threads or locks is inherited
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self.job: Job | None = None
        with _interrupts_held_back():
            self.process.start()
        theirs.close()  # the worker now holds the only other end, so its death is seen as end of file

    def send(self) -> None:
        """Start the job; that a dead process cannot take it shows when its answer is read."""
        try:
            self.connection.send((self.job.function, self.job.args))
        except BrokenPipeError:
            logger.debug("worker %s ended while it was idle", self.process.pid)

    def lost(self) -> str:
        """Clear away a process whose pipe has closed; returns how it ended, e.g. "signal SIGKILL"."""
        self.process.join(timeout=5)
        code = self.process.exitcode
        self.end()
        if code is None:
            return "it closed its pipe"
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"

    def end(self) -> None:
        """Stop the process at once."""
        self.process.kill()
        self.process.join()
        self.connection.close()


@contextlib.contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Start processes with SIGINT blocked, so that Ctrl-C reaches the parent alone."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # starting it later, with the first process, would lift the block
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(connection: Connection) -> None:
    """Life of a worker: take jobs until the parent goes away."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    for name in THREAD_VARIABLES:  # before NumPy is imported, which happens with the first job
        os.environ[name] = "1"
    while True:
        try:
            function, args = connection.recv()
        except EOFError:
            return
        connection.send(answer(function, args))


def _end_with_parent() -> None:
    """Leave at once when the parent is gone, even killed: nobody waits for the job at hand any more."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def answer(function: Callable[..., Any], args: tuple) -> tuple[Any, str | None]:
    """Do a job here: its result and None, or None and one line saying what went wrong."""
    try:
        return function(*args), None
    except Exception as err:
        return None, one_line(err)


def one_line(error: Exception) -> str:
    """The message of an error; of one that nobody foresaw also its kind and place."""
    from ldm.metrics.common import MetricError

    if isinstance(error, (MetricError, UserError, ConfigError)):
        return str(error)
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {' '.join(str(error).split())} ({os.path.basename(place.filename)}:{place.lineno})"
