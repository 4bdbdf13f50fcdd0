# SPDX-License-Identifier: GPL-3.0-or-later
"""The jobs of one workload that wait: for a session, for their turn, or for the workload to converge.

Promises: every job that goes in is answered; while a drain or a convergence waits, pacing is off.
Callable from any thread.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from bmigrate.common.errors import BmigrateError, RefusedError
from bmigrate.ship.jobs import Job

PATIENCE_SECONDS = {"drain": 15.0, "verify": 15.0, "converge": 60.0}
"""How long a job waits for a session that is not there."""


class Waiting:
    """Args: urgent: set while a handover waits; the pacer's."""

    def __init__(self, urgent: threading.Event) -> None:
        self._urgent = urgent
        self._lock = threading.Lock()
        self._jobs: list[Job] = []
        self._running: Job | None = None
        self._closed = False

    def add(self, job: Job) -> None:
        """Take in a job."""
        with self._lock:
            self._jobs.append(job)
        self._calm()

    def next(self) -> Job | None:
        """The job to run now, drains first; call ``finished`` after it. Converge jobs are never run, only judged."""
        with self._lock:
            ready = [job for job in self._jobs if job.kind != "converge" and not job.over]
            ready.sort(key=lambda job: job.kind != "drain")
            self._running = ready[0] if ready else None
            self._jobs = [job for job in self._jobs if not job.over and job is not self._running]
        self._calm()
        return self._running

    def finished(self) -> None:
        """The job that ``next`` gave is over."""
        with self._lock:
            self._running = None
        self._calm()

    def drain_waits(self) -> bool:
        """Whether a drain waits for its turn: walks end early for it."""
        with self._lock:
            return any(job.kind == "drain" and not job.over for job in self._jobs)

    def cancel_drains(self) -> bool:
        """Give up the drains that run or wait; returns whether there were any."""
        with self._lock:
            drains = [job for job in [*self._jobs, self._running] if job is not None and job.kind == "drain"]
            running = self._running
        for job in drains:
            job.cancelled = True
            if job is not running:
                job.failed(RefusedError("the drain was given up", hint="begin a new handover", reason="cancelled"))
        self.judged()
        return bool(drains)

    def converging(self) -> list[Job]:
        """The converge jobs that are not answered yet."""
        with self._lock:
            return [job for job in self._jobs if job.kind == "converge" and not job.over]

    def judged(self) -> None:
        """Some converge jobs may have been answered."""
        with self._lock:
            self._jobs = [job for job in self._jobs if not job.over]
        self._calm()

    def expire(self, error_of: Callable[[Job], BmigrateError]) -> None:
        """Answer those whose time is up."""
        self._fail(lambda job: time.monotonic() > job.deadline, error_of)

    def no_session(self, error: BmigrateError, final: bool, lost_seconds: float) -> None:
        """There is no session: answer those who cannot wait for the next one.

        Args:
            final: trying again will not help. lost_seconds: since when there is none.
        """
        self._fail(lambda job: final or lost_seconds > PATIENCE_SECONDS[job.kind], lambda _: error)

    def refuse(self, error: BmigrateError) -> None:
        """Answer all."""
        self._fail(lambda _: True, lambda _: error)

    def close(self, error: BmigrateError) -> None:
        """Answer all; pacing stays off, so that nothing delays the end."""
        self.refuse(error)
        self._closed = True
        self._urgent.set()

    def _fail(self, which: Callable[[Job], bool], error_of: Callable[[Job], BmigrateError]) -> None:
        with self._lock:
            chosen = [job for job in self._jobs if not job.over and which(job)]
        for job in chosen:
            job.failed(error_of(job))
        self.judged()

    def _calm(self) -> None:
        with self._lock:
            waits = any(job.kind in ("converge", "drain") and not job.over for job in self._jobs)
            runs = self._running is not None and self._running.kind == "drain"
        if waits or runs or self._closed:
            self._urgent.set()
        else:
            self._urgent.clear()
