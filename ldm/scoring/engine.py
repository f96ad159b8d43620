"""Engine that runs jobs in Dask workers, and the jobs themselves: reducing latents, computing one metric.

The workers are processes of this machine (a local cluster), or those of a running Dask scheduler. Jobs receive paths
and open the arrays memory-mapped, so that all workers of a machine share them through the page cache. Only the parent
process writes results. Workers import this module, so it imports Dask only where a cluster is created, and no torch.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import logging
import os
import queue
import signal
import sys
import threading
import time
import traceback
import uuid
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ldm.data.rows import check_parts
from ldm.metrics.common import MetricError
from ldm.metrics.representation import scalar_units, scale_note, standardize
from ldm.metrics.trust import PCA, principal_components, varied
from ldm.runs.disk import full_message, is_full
from ldm.runs.records import collect_versions, plain
from ldm.scoring.arrays import array_source, incomplete_if_unreadable, new_array, open_array
from ldm.scoring.factors import Factors
from ldm.util import ConfigError, UserError

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 3  # times a job is started whose worker process is killed
CONNECT_SECONDS = 15
RESTART_SECONDS = 120  # without any worker process, until the command fails
POLL_SECONDS = 0.5  # between two checks for new or restarted workers
_PACKAGES = {name: name for name in ("numpy", "scipy", "scikit-learn", "numba", "clip-disdiff")}
_ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "VECLIB_MAXIMUM_THREADS": "1",
    "NUMBA_NUM_THREADS": "1",
}
_SETTINGS = {
    "distributed.scheduler.allowed-failures": 0,  # the engine counts attempts, so that no other job is blamed
    "distributed.scheduler.worker-ttl": None,  # a long job may block heartbeats; a dead process closes its connection
    "distributed.deploy.lost-worker-timeout": "1000 days",  # a worker that restarts slowly is not lost
    "distributed.nanny.pre-spawn-environ": _ONE_THREAD,
    "distributed.worker.profile.enabled": False,
    "distributed.admin.tick.interval": "1s",  # 20 ms by default, which takes time from the workers
    "distributed.admin.system-monitor.interval": "10s",
    "distributed.comm.timeouts.connect": f"{CONNECT_SECONDS}s",
}


class Job(NamedTuple):
    """A call to make in a worker. ``function`` and ``args`` are pickled, so the function must be importable."""

    key: Hashable
    function: Callable[..., Any]
    args: tuple


class Outcome(NamedTuple):
    """Result of a job, or an error message of one line."""

    job: Job
    result: Any = None
    error: str | None = None


class Engine:
    """Runs jobs in Dask workers; use as a context manager, which ends running jobs on exit.

    Each worker has one job at a time, the one with the highest priority. If its process is killed, the process is
    restarted and the job is started again; after ``MAX_ATTEMPTS`` starts it fails alone. A running scheduler
    has its own limit (``distributed.scheduler.allowed-failures``).

    Args:
        num_workers: processes of this machine, each with one BLAS, OpenMP and numba thread.
        folder: folder for the workers' own files.
        scheduler: address of a running Dask scheduler to use instead, for example ``tcp://node17:8786``. Its workers
            need this package and the same paths.

    Raises:
        UserError: no scheduler answers at the address.
    """

    def __init__(self, num_workers: int, folder: Path, scheduler: str | None = None) -> None:
        if num_workers < 1:
            raise ValueError(f"num_workers: expected at least 1, got {num_workers}")
        self._num_workers, self._folder, self._scheduler = num_workers, folder, scheduler
        self._session = uuid.uuid4().hex[:8]  # keys differ from those of other commands
        self._numbers = itertools.count()
        self._waiting: list[tuple[float, int, Job]] = []
        self._running: dict[str, tuple[tuple[float, int, Job], Any]] = {}
        self._kills: Counter[Hashable] = Counter()
        self._finished: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._cluster: Any = None
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Engine:
        try:
            with signals_deferred():
                self._open()
        except BaseException:
            self.__exit__()
            raise
        if not self.num_workers:
            logger.warning("%s has no workers. Start them with: dask worker %s", self._scheduler, self._scheduler)
        return self

    def _open(self) -> None:
        import dask
        import distributed

        for name in ("distributed", "distributed.client", "tornado.application", "asyncio"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        enter, at_exit = self._stack.enter_context, self._stack.callback
        enter(dask.config.set(_SETTINGS | {"temporary-directory": str(self._folder)}))
        if self._scheduler is None:
            enter(_environment(_ONE_THREAD))
            self._cluster = _local_cluster(self._num_workers)
            at_exit(self._end_cluster)
            self._client = distributed.Client(self._cluster, set_as_default=False)
        else:
            self._client = _connect(self._scheduler)
        at_exit(self._client.close, timeout=CONNECT_SECONDS)

    def __exit__(self, *error: object) -> None:
        with signals_deferred():
            self._stack.close()

    def _end_cluster(self) -> None:
        """End the worker processes at once; Dask would wait four seconds for running jobs."""
        for nanny in self._cluster.workers.values():
            nanny.close_gracefully()  # it does not restart its process
            with contextlib.suppress(ProcessLookupError, TypeError):  # TypeError: the process is just being restarted
                os.kill(nanny.pid, signal.SIGTERM if sys.platform == "win32" else signal.SIGKILL)
        with contextlib.suppress(TimeoutError):
            self._cluster.close(timeout=CONNECT_SECONDS)

    @property
    def num_workers(self) -> int:
        """Number of jobs that can run at a time now."""
        with contextlib.suppress(OSError, AttributeError):  # raised by Dask while the connection is lost
            return sum(self._client.nthreads().values()) if self._client.status == "running" else 0
        return 0

    def submit(self, job: Job, priority: float = 0.0) -> None:
        """Add a job; higher priority first, equal priorities in order. May be called while reading ``outcomes``."""
        heapq.heappush(self._waiting, (-priority, next(self._numbers), job))

    def outcomes(self) -> Iterator[Outcome]:
        """Yield the outcome of each job as it finishes, exactly once, until no job is left.

        Raises:
            UserError: the connection to the scheduler is lost, or no worker process can be restarted.
        """
        alive = time.monotonic()
        while self._waiting or self._running:
            if self._client.status == "closed":
                raise UserError(
                    f"--scheduler: the connection to {self._scheduler} is lost. Finished results are kept; start the "
                    "scheduler again and rerun the command to continue."
                )
            count = self.num_workers
            alive = time.monotonic() if count or self._scheduler else alive
            if time.monotonic() - alive > RESTART_SECONDS:
                raise UserError("no worker process can be restarted. Check memory and disk, then rerun the command.")
            self._start(count - len(self._running))
            with contextlib.suppress(queue.Empty):
                entry, future = self._running.pop(self._finished.get(timeout=POLL_SECONDS))
                outcome = self._outcome(entry[2], future)
                if outcome is None:
                    heapq.heappush(self._waiting, entry)
                else:
                    yield outcome

    def _start(self, count: int) -> None:
        """Hand the next jobs to idle workers."""
        for _ in range(min(count, len(self._waiting))):
            entry = heapq.heappop(self._waiting)
            key, job = f"score-{self._session}-{next(self._numbers)}", entry[2]
            future = self._client.submit(_answer, job.function, job.args, key=key, pure=False)
            self._running[key] = entry, future
            future.add_done_callback(lambda done: self._finished.put(done.key))

    def _outcome(self, job: Job, future: Any) -> Outcome | None:
        """Return the outcome of a finished job; None if its worker was killed and it is to be started again."""
        from distributed import KilledWorker

        try:
            return Outcome(job, *future.result())  # if a worker was killed with the result, Dask computes it again
        except KilledWorker as error:
            self._kills[job.key] += error.allowed_failures + 1
            if self._kills[job.key] < MAX_ATTEMPTS:
                return None
            reason = f"its worker process was killed {self._kills[job.key]} times. Check the memory of the machine."
        except Exception as error:
            message = " ".join(str(error).split())
            reason = f"lost ({type(error).__name__}: {message}). Check that this package is installed on the workers."
        return Outcome(job, error=reason)


def _local_cluster(num_workers: int) -> Any:
    """Start worker processes; a process that is killed while it starts costs another attempt.

    Raises:
        UserError: they cannot be started.
    """
    import distributed

    for _ in range(MAX_ATTEMPTS):
        try:
            return distributed.LocalCluster(
                n_workers=num_workers,
                threads_per_worker=1,
                host="127.0.0.1",
                scheduler_kwargs={"dashboard": False, "dashboard_address": "127.0.0.1:0"},
                memory_limit=0,  # Dask counts memory-mapped files as memory of a process, and would end it
                silence_logs=logging.CRITICAL,
            )
        except RuntimeError as error:
            failure = error
    raise UserError(f"the worker processes cannot be started ({failure.__cause__ or failure})") from failure


def _connect(address: str) -> Any:
    import distributed

    try:
        return distributed.Client(address, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError, TimeoutError) as error:
        raise UserError(
            f"--scheduler: no Dask scheduler answers at {address} ({' '.join(str(error).split())}). Start it with "
            "`dask scheduler`, and workers with `dask worker tcp://HOST:8786 --nworkers 4 --nthreads 1`."
        ) from error


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Set environment variables, which new processes inherit, and restore them afterwards."""
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def signals_deferred() -> Iterator[None]:
    """Handle signals after the block instead of in it, because an interrupted Dask cannot clean up.

    Threads and processes started in the block do not receive SIGINT, so that Ctrl-C reaches the main thread alone.
    """
    if sys.platform == "win32" or threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[int] = []
    handled = [number for number in signal.valid_signals() if callable(signal.getsignal(number))]
    handlers = {number: signal.signal(number, lambda number, frame: arrived.append(number)) for number in handled}
    resource_tracker.ensure_running()  # starting it later would unblock the signal
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if arrived:
            signal.raise_signal(arrived[0])


def _answer(function: Callable[..., Any], args: tuple) -> tuple[Any, str | None]:
    """Run a job in a worker: return (result, None), or (None, message)."""
    try:
        return function(*args), None
    except (MetricError, UserError, ConfigError) as error:
        return None, str(error)
    except (Exception, SystemExit) as error:
        if is_full(error):
            return None, full_message(error, [value.folder for value in args if isinstance(value, Workspace)])
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{os.path.basename(frame.filename)}:{frame.lineno}"
        return None, f"{type(error).__name__}: {' '.join(str(error).split())} ({where})"


@dataclass(frozen=True)
class Task:
    """A share of a score file: a metric ("mig"), or one factor of a metric ("dci/3")."""

    name: str
    function: Callable[..., dict[str, Any]]  # the metric, or its ``part``
    factor: int | None
    arguments: dict[str, Any]
    seconds: float  # estimated cost
    reduce: bool = True  # whether vectors per unit are reduced to one number each


@dataclass(frozen=True)
class Workspace:
    """A representation file, and a scratch folder that all workers can read."""

    latents: Path
    folder: Path
    standardized: bool = False  # whether each unit is divided by its standard deviation

    @property
    def units(self) -> Path:
        """The reduced latents (N, U), written by ``prepare``."""
        return self.folder / "units.npy"


def prepare(workspace: Workspace) -> str | None:
    """Reduce the latents of a file to scalar units (N, U) and store them for the other jobs.

    Returns:
        A warning about the scale of the units, or None.

    Raises:
        UserError: the file is damaged.
        MetricError: a value is not finite.
    """
    if workspace.latents.suffix.lower() == ".npz":
        with incomplete_if_unreadable(workspace.latents):
            check_parts(workspace.latents)
    units = scalar_units(open_array(array_source(workspace.latents), workspace.folder))
    note = None if workspace.standardized else scale_note(units)
    _store(workspace.units, units, workspace.standardized)
    return note


def _store(path: Path, codes: np.ndarray, standardized: bool) -> np.ndarray:
    """Write an array (N, K) in a scratch folder, complete at any time, and return it memory-mapped."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.npy")
    if standardized:
        standardize(codes, new_array(temporary, np.float64, codes.shape))
    else:
        np.save(temporary, codes)
    os.replace(temporary, path)
    return np.load(path, mmap_mode="r")


def compute(task: Task, workspace: Workspace, factors: Factors, seed: int, variant: str = "") -> dict[str, Any]:
    """Compute a task with a random generator of its own; for a ``variant``, see ``ldm.metrics.trust``.

    Returns:
        ``result`` (the metric's dict), ``seconds`` it took, ``versions`` of the packages, and whether the rows are a
        bootstrap sample, ``is_resampled``.

    Raises:
        MetricError: the representation cannot be scored by this metric.
    """
    started = time.monotonic()
    if variant == PCA:
        codes = _components(workspace)
    elif task.reduce:
        codes = np.load(workspace.units, mmap_mode="r")
    else:
        latents = open_array(array_source(workspace.latents), workspace.folder)
        codes = latents.reshape(len(latents), -1)
        if workspace.standardized:
            path = workspace.folder / "whole.npy"
            codes = np.load(path, mmap_mode="r") if path.is_file() else _store(path, codes, True)
    own, factor = factors.sampler(), () if task.factor is None else (task.factor,)
    codes, sampler = varied(variant, codes, own, seed)
    result = task.function(codes, sampler, np.random.RandomState(seed), *factor, **task.arguments)
    about = {"seconds": round(time.monotonic() - started, 3), "versions": collect_versions(_PACKAGES)}
    return {"result": plain(result), **about, "is_resampled": sampler is not own}


def _components(workspace: Workspace) -> np.ndarray:
    """Return as many principal components of the latents as units; the first job that needs them stores them."""
    path = workspace.folder / f"{PCA}.npy"
    if not path.is_file():
        latents = open_array(array_source(workspace.latents), workspace.folder)
        return _store(path, principal_components(latents, latents.shape[1]), workspace.standardized)
    return np.load(path, mmap_mode="r")
