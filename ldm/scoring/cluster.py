"""Jobs on a Dask cluster, in the place of processes of this machine.

The scheduler hands jobs to workers and starts those of a lost worker again elsewhere; results come back to this
process, which alone writes them down, each under its own key. Workers need this package and the same paths (a shared
folder).
"""

from __future__ import annotations

import itertools
import logging
import uuid
from collections.abc import Iterator
from types import TracebackType
from typing import Any

from ldm.scoring.workers import Job, Outcome, answer
from ldm.util import UserError

logger = logging.getLogger(__name__)

CONNECT_SECONDS = 15  # Dask's own 30 is how long it looks for a dead worker before a lost result is made again


class ClusterPool:
    """Does jobs on the workers of a Dask scheduler; use as a context manager, which takes back what is not done.

    Args:
        address: of the scheduler, e.g. ``tcp://node17:8786``.

    Raises:
        UserError: Dask is not installed, or no scheduler answers.
    """

    def __init__(self, address: str) -> None:
        try:
            import dask
            import distributed
        except ModuleNotFoundError as err:
            raise UserError("--scheduler needs Dask: pip install -e .[cluster]") from err
        self._distributed = distributed
        self._settings = dask.config.set({"distributed.comm.timeouts.connect": f"{CONNECT_SECONDS}s"})
        try:
            self._client = distributed.Client(address, timeout=CONNECT_SECONDS, set_as_default=False)
        except (OSError, ValueError, TimeoutError) as err:
            raise UserError(
                f"no Dask scheduler answers at {address} ({' '.join(str(err).split())}); start one with `dask "
                "scheduler` and workers with `dask worker tcp://HOST:8786 --nworkers 4 --nthreads 1`"
            ) from err
        self._session = uuid.uuid4().hex[:8]  # keys of other commands on the same scheduler are other jobs
        self._numbers = itertools.count()
        self._jobs: dict[str, Job] = {}
        self._finished = distributed.as_completed([], loop=self._client.loop)
        if not self.num_workers:
            logger.warning(
                "%s has no workers yet: jobs wait for `dask worker %s --nworkers 4 --nthreads 1`", address, address
            )

    @property
    def num_workers(self) -> int:
        """Threads that can take a job now."""
        return sum(self._client.nthreads().values())

    def submit(self, job: Job, priority: float = 0.0) -> None:
        """Queue a job; higher priority first. May be called while reading ``outcomes``."""
        key = f"score-{self._session}-{next(self._numbers)}"
        self._jobs[key] = job
        # pure=False: never taken for another call; a worker that dies costs a retry, which the scheduler counts itself
        future = self._client.submit(answer, job.function, job.args, key=key, priority=priority, pure=False)
        self._finished.add(future)

    def outcomes(self) -> Iterator[Outcome]:
        """Yield each job's outcome as it finishes, exactly once, until nothing is queued or running."""
        for future in self._finished:
            job = self._jobs.pop(future.key, None)
            if job is not None:
                yield self._outcome(job, future)

    def _outcome(self, job: Job, future: Any) -> Outcome:
        """A job's result; a job that took its workers down with it, or was lost with the scheduler, has an error."""
        try:
            return Outcome(job, *future.result())  # waits if a worker died with the result, which is then made again
        except self._distributed.scheduler.KilledWorker as err:
            last = err.last_worker.address
            return Outcome(job, error=f"the workers that took it died (the last: {last}); is memory short?")
        except Exception as err:
            return Outcome(
                job,
                error=f"the cluster lost it ({type(err).__name__}: {' '.join(str(err).split())}); is "
                "the scheduler still running, and is this package installed on its workers?",
            )

    def __enter__(self) -> ClusterPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._finished.clear()
        self._client.close(timeout=CONNECT_SECONDS)  # its unfinished jobs are forgotten by the scheduler
        self._settings.__exit__(None, None, None)
