# SPDX-License-Identifier: GPL-3.0-or-later
"""The receivers that may be alive: known by pid and start time, killed by pidfd, waited for by poll.

It promises that "gone" means the kernel said so: a pidfd becomes readable only when every thread
of the process has left the kernel for good, so no write of it can be on its way any more. A
receiver is on file (in /run, so for this boot) before it is granted anything, so that the next
incarnation of hold can still kill it. It must never signal a process by number.
"""

from __future__ import annotations

import logging
import os
import selectors
import signal
from collections.abc import Callable
from pathlib import Path

from bmigrate.common import atomic, paths

log = logging.getLogger("bmigrate-hold")


def start_time(pid: int) -> int:
    """Start time of a process in clock ticks since boot: tells two users of one pid apart.

    Raises:
        ProcessLookupError: no such process.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError) as error:
        raise ProcessLookupError(f"no process {pid}") from error
    return int(text.rpartition(")")[2].split()[19])


class Receiver:
    """One process that may write to the volumes of a workload.

    Attributes:
        pid, started: of the process. epoch: granted to it, 0 before. killed: SIGKILL was sent.
    """

    def __init__(self, pid: int, pidfd: int, started: int, epoch: int = 0) -> None:
        self.pid = pid
        self.pidfd = pidfd
        self.started = started
        self.epoch = epoch
        self.killed = False


def identify(pid: int) -> Receiver:
    """Get hold of a live process.

    Raises:
        ProcessLookupError: it is gone.
    """
    pidfd = os.pidfd_open(pid)
    try:
        return Receiver(pid, pidfd, start_time(pid))
    except BaseException:
        os.close(pidfd)
        raise


class Receivers:
    """All receivers of one workload.

    Args:
        workload: its name. selector: the loop's. on_gone: called after each receiver that is gone.
    """

    def __init__(self, workload: str, selector: selectors.BaseSelector, on_gone: Callable[[], None]) -> None:
        self._path = paths.run() / "hold" / f"{workload}.receivers.json"
        self._selector = selector
        self._on_gone = on_gone
        self.alive: list[Receiver] = []

    def recover(self) -> None:
        """Find and kill those that an earlier incarnation of hold had put on file."""
        for item in atomic.read_json(self._path, []):
            try:
                receiver = identify(int(item["pid"]))
            except ProcessLookupError:
                continue
            if receiver.started != item["started"]:
                os.close(receiver.pidfd)  # the pid is in use by somebody else now
                continue
            receiver.epoch = int(item["epoch"])
            self._watch(receiver)
        self.kill_all()

    def admit(self, receiver: Receiver) -> None:
        """Put a receiver on file; must come before it is granted anything. Raises: OSError."""
        self._store([*self.alive, receiver])
        self._watch(receiver)

    def kill_all(self) -> None:
        """Send SIGKILL to all; on_gone is called later, for each."""
        for receiver in self.alive:
            self.kill(receiver)

    def kill(self, receiver: Receiver) -> None:
        """Send SIGKILL to one."""
        if receiver not in self.alive or receiver.killed:
            return
        receiver.killed = True
        try:
            signal.pidfd_send_signal(receiver.pidfd, signal.SIGKILL)  # type: ignore[attr-defined,unused-ignore]
        except ProcessLookupError:
            pass  # gone already; its pidfd is readable and the loop will say so

    def forget(self) -> None:
        """Watch nobody any more; those on file can be recovered by another object."""
        for receiver in self.alive:
            self._selector.unregister(receiver.pidfd)
            os.close(receiver.pidfd)
        self.alive.clear()

    def _watch(self, receiver: Receiver) -> None:
        self.alive.append(receiver)
        self._selector.register(receiver.pidfd, selectors.EVENT_READ, lambda _mask: self._gone(receiver))

    def _gone(self, receiver: Receiver) -> None:
        self._selector.unregister(receiver.pidfd)
        os.close(receiver.pidfd)
        self.alive.remove(receiver)
        try:
            self._store(self.alive)
        except OSError as error:  # one on file that is gone is told by its start time, and does no harm
            log.error("the end of process %d cannot be put on file: %s", receiver.pid, error)
        self._on_gone()

    def _store(self, receivers: list[Receiver]) -> None:
        atomic.make_directory(self._path.parent)
        atomic.replace_json(
            self._path, [{"pid": item.pid, "started": item.started, "epoch": item.epoch} for item in receivers]
        )
