# SPDX-License-Identifier: GPL-3.0-or-later
"""The state of one workload under its lock, and the right to break that lock.

It promises that what a step reads is durable before the step acts on it: a process that was killed
between its rename and its fsync leaves a state that is visible but not yet safe, and whoever
answers from it ("already committed") would promise what a power cut can take back. It must never
let two steps of one workload run at once, and never leave a stuck step in the way of a resume.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from bmigrate.common import atomic, paths
from bmigrate.common import state as states
from bmigrate.common.errors import RefusedError
from bmigrate.common.state import WorkloadState

#: Steps that a resume may end: they hold the lock while they wait for daemons, and are repeatable.
PREEMPTABLE = ("converge", "quiesce", "drain", "begin")
#: The commit is one fsync; it gets this long before a resume ends it too (it is then done or not done).
COMMIT_GRACE_SECONDS = 10.0


class Store:
    """The locked state: ``state`` is current, ``save`` makes the next one durable."""

    def __init__(self, item: WorkloadState) -> None:
        self.state = item

    def save(self, after: WorkloadState) -> None:
        """Replace state.json durably; only then is ``state`` the new one.

        Raises:
            OSError: not saved; the old state is still in force and nothing may be done on the new one.
        """
        states.save(after)
        self.state = after


def make_durable(path: Path) -> None:
    """Fsync a file and its directory, so that what was read from it cannot be lost any more."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
    atomic.fsync_directory(path.parent)


@contextlib.contextmanager
def opened(workload: str, *, wait_seconds: float = 30.0, preempt_for: str | None = None) -> Iterator[Store]:
    """Lock the workload, load its state, make sure that it is durable.

    Args:
        workload: its name.
        wait_seconds: how long to wait for another step.
        preempt_for: the run id of a resume: a converge, quiesce or drain that holds the lock is killed.

    Raises:
        RefusedError: reason ``busy`` or ``not_initialised``.
    """
    file = states.state_file(workload)
    if not file.exists():
        raise not_initialised(workload)
    lock = file.parent / "lock"
    if preempt_for is not None:
        _preempt(lock, workload)
    with atomic.Lock(lock, wait_seconds):
        make_durable(file)
        item = states.load(workload)
        if item is None:
            raise not_initialised(workload)
        yield Store(item)


def not_initialised(workload: str) -> RefusedError:
    """The error for a workload that has no role on this host."""
    return RefusedError(
        f"workload {workload} has no role on this host yet",
        hint="run sync.yml (first time with -e bmigrate_initial_primary=HOST)",
        reason="not_initialised",
    )


def _step_of(pid: int, workload: str) -> str | None:
    """Which handover step of this workload a process is, from its arguments."""
    try:
        words: list[str] = Path(f"/proc/{pid}/cmdline").read_bytes().decode("utf-8", "replace").split("\0")
    except OSError:
        return None
    if "handover" not in words or not any(word in (workload, f"--workload={workload}") for word in words):
        return None
    index = words.index("handover")
    return words[index + 1] if index + 1 < len(words) else None


def _preempt(lock: Path, workload: str) -> None:
    """End the step that holds the lock, if it is one that may be ended; wait for nothing else.

    SIGKILL is safe: each step saves before it acts, so what is on disk says what may be true, and
    the resume that follows puts everything back whatever the step had reached.
    """
    began = time.monotonic()
    while True:
        try:
            with atomic.Lock(lock, 0):
                return
        except RefusedError:
            pass
        try:
            pid = int(lock.read_text().strip() or "0")
        except (OSError, ValueError):
            pid = 0
        waited = time.monotonic() - began
        step = _step_of(pid, workload) if pid else None
        if step in PREEMPTABLE or (step == "commit" and waited > COMMIT_GRACE_SECONDS):
            _kill(pid, workload, str(step))
        elif step not in (None, "commit") or waited > COMMIT_GRACE_SECONDS:
            return  # a resume, boot or promote: to be waited for, in turn, by the lock itself
        time.sleep(0.02)


def _kill(pid: int, workload: str, step: str) -> None:
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        # The pidfd is bound now: were the number used again before, the arguments tell.
        if _step_of(pid, workload) == step:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    finally:
        os.close(pidfd)


def lock_free(workload: str) -> bool:
    """Whether no command works on the workload right now; looks only, and leaves the lock file as it is."""
    try:
        fd = os.open(paths.state_dir(workload) / "lock", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
