# SPDX-License-Identifier: GPL-3.0-or-later
"""The daemon's one loop: the channel of records, the socket, signals, the watchdog. One thread.

Promises the order that loses nothing: a batch is read, put into the maps (and so into the mapped
files), and only then consumed; killed at any instruction in between, the kernel hands it out
again. It must never detach on its own when it stops, never write a clean flag unasked, and never
wait for the network. Without the kernel module it stays up, refuses to track, and says so.
"""

from __future__ import annotations

import logging
import os
import selectors
import signal
import socket
import time
from collections.abc import Callable
from typing import Any

from bmigrate.breqd import settle
from bmigrate.breqd.attach import Attacher
from bmigrate.breqd.leases import Leases
from bmigrate.breqd.requests import Requests
from bmigrate.breqd.tracker import Tracker, as_refusal
from bmigrate.common import config, faults, log, paths, rpc, state, sysd
from bmigrate.common.config import Config
from bmigrate.common.errors import BmigrateError
from bmigrate.kernel.channel import Channel
from bmigrate.kernel.control import Control

LOG = logging.getLogger("breqd")

TICK_SECONDS = 1.0
RETRY_SECONDS = 3.0
_BATCHES_PER_TURN = 32
#: After the log was emptied it is left alone that long, so that a busy host's records come in large batches, which cost
#: a fraction of small ones. Nothing waits for it but the log: a barrier ends it.
PAUSE_SECONDS = 0.05
#: The pause is shorter where, at the rate just seen, more of a ring than this would fill in it: a full ring widens.
_RING_SHARE = 0.25
#: A target that is being promoted attaches by itself, at the one right moment.
_NOT_BY_US = ("prepared", "promoting")

Key = tuple[str, str]


class Daemon:
    """breqd. ``run`` returns when a signal asks for it.

    Args:
        open_control, open_channel: open /dev/reqlog and /dev/bufflink/reqlog; tests give others.
    """

    def __init__(
        self, open_control: Callable[[], Control] = Control, open_channel: Callable[[], Channel] = Channel
    ) -> None:
        self._open_control, self._open_channel = open_control, open_channel
        self.selector = selectors.DefaultSelector()
        self.tracker = Tracker()
        self.attacher = Attacher(self.tracker)
        self.leases = Leases(self.tracker)
        self.channel: Channel | None = None
        self.configs: dict[str, Config] = {}
        self.problems: dict[Key, BmigrateError] = {}
        #: Detached on request: not attached again unless asked to.
        self.released: set[Key] = set()
        self._barriers: list[tuple[Any, Callable[[], None]]] = []
        self._stop = self._reload = False
        self._next_retry = 0.0
        self._read_at = 0.0
        self._resume_at: float | None = None
        self.requests = Requests(self)

    # --- life ------------------------------------------------------------------------------------

    def run(self) -> int:
        """Serve until SIGTERM or SIGINT; returns the exit code."""
        wake = self._catch_signals()
        # Whatever is wrong with the kernel's side: a service must not hang because a daemon died.
        settle.thaw_leftovers()
        self.open_kernel()
        self.reload()
        server = rpc.Server(paths.breqd_socket(), self.requests.handle, self.selector)
        sysd.notify("READY=1\nSTATUS=" + self.summary())
        LOG.info("ready: %s", self.summary())
        interval = min(TICK_SECONDS, sysd.watchdog_interval() or TICK_SECONDS)
        next_tick = 0.0
        try:
            while not self._stop:
                now = time.monotonic()
                if now >= next_tick:
                    self.tick(now)
                    next_tick = now + interval
                until = next_tick if self._resume_at is None else min(next_tick, self._resume_at)
                for key, mask in self.selector.select(max(0.0, until - time.monotonic())):
                    key.data(mask)
                if self._resume_at is not None and time.monotonic() >= self._resume_at:
                    self._resume()
                if self._reload:
                    self._reload = False
                    self.reload()
        finally:
            # Nothing is detached and nothing flushed: the kernel keeps recording, the mapped files
            # keep what was stored, and the next daemon goes on from there.
            sysd.notify("STOPPING=1")
            server.close()
            for end in wake:
                end.close()
            if self.channel is not None:
                self.channel.close()
        return 0

    def _catch_signals(self) -> tuple[socket.socket, socket.socket]:
        """Signals set flags only; a socket pair wakes the loop."""
        reading, writing = socket.socketpair()
        reading.setblocking(False)
        writing.setblocking(False)
        signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)

        def stop(_number: int, _frame: object) -> None:
            self._stop = True

        def reread(_number: int, _frame: object) -> None:
            self._reload = True

        signal.signal(signal.SIGTERM, stop)
        signal.signal(signal.SIGINT, stop)
        signal.signal(signal.SIGHUP, reread)
        self.selector.register(reading, selectors.EVENT_READ, lambda _mask: reading.recv(4096))
        return reading, writing

    def tick(self, now: float) -> None:
        """Once a second: watchdog, what became of attachments, what could not be attached before."""
        sysd.notify("WATCHDOG=1\nSTATUS=" + self.summary())
        self.tracker.poll()
        self._pass_barriers()
        if now >= self._next_retry:
            self._next_retry = now + RETRY_SECONDS
            if self.channel is None:
                self.open_kernel()
            self.attach_missing()

    def summary(self) -> str:
        """One line for the service manager and the log."""
        if self.channel is None:
            problem = self.tracker.kernel_problem
            return f"NOT TRACKING: {problem.message if problem else 'no kernel module'}"
        suspects = sum(1 for item in self.tracker.volumes.values() if item.suspect)
        return f"tracking {len(self.tracker.volumes)} volumes, {suspects} suspect, {len(self.problems)} not attached"

    # --- the kernel ------------------------------------------------------------------------------

    def open_kernel(self) -> None:
        """Open control and channel, and take over what is attached; without the module, remember why not."""
        control: Control | None = None
        try:
            control = self._open_control()
            channel = self._open_channel()
        except OSError as exc:
            if control is not None:
                control.close()
            problem = as_refusal(exc, "")
            problem.volume = None
            if self.tracker.kernel_problem is None or self.tracker.kernel_problem.message != problem.message:
                LOG.error("no write is tracked: %s", problem.message)
            self.tracker.kernel_problem = problem
            return
        self.tracker.control, self.tracker.kernel_problem, self.channel = control, None, channel
        # Before the first batch is read: records of a volume that is not known here would be lost.
        for error in self.attacher.adopt_all():
            LOG.error("%s", error)
        self.selector.register(channel, selectors.EVENT_READ, self._on_channel)

    def _on_channel(self, _mask: int) -> None:
        channel = self.channel
        if channel is None:
            return
        records = 0
        for _ in range(_BATCHES_PER_TURN):
            batch = channel.read_batch()
            if batch is None:
                break
            records += len(batch.records)
            faults.point("breqd.batch")
            self.tracker.apply(batch.records)
            faults.point("breqd.marked")
            # Not one statement earlier: what is consumed and not in the map is a lost write.
            channel.consumed(batch.seq)
            faults.point("breqd.consumed")
        else:
            records = 0  # there is more: no pause
        self._pass_barriers()
        self._pause(channel, records)

    def _pause(self, channel: Channel, records: int) -> None:
        """Look away from the log for a moment, unless somebody waits for it or a ring could fill meanwhile."""
        now = time.monotonic()
        seconds = PAUSE_SECONDS
        if records:
            rate = records / max(now - self._read_at, 1e-6)
            seconds = min(seconds, _RING_SHARE * channel.info.ring_limit / rate)
        self._read_at = now
        if self._barriers or not records or self._resume_at is not None:
            return
        self.selector.unregister(channel)
        self._resume_at = now + seconds

    def _resume(self) -> None:
        """Look at the log again."""
        self._resume_at = None
        if self.channel is not None:
            self.selector.register(self.channel, selectors.EVENT_READ, self._on_channel)

    def after_barrier(self, then: Callable[[], None]) -> None:
        """Call ``then`` when every write that has completed by now is in the maps.

        Raises:
            BmigrateError: there is no kernel module.
        """
        channel = self.channel
        if channel is None:
            raise self.tracker.no_kernel()
        self._barriers.append((channel.barrier(), then))
        if self._resume_at is not None:
            self._resume()
        self._pass_barriers()

    def _pass_barriers(self) -> None:
        channel = self.channel
        if channel is None:
            return
        ready = [item for item in self._barriers if channel.passed(item[0])]
        for item in ready:
            self._barriers.remove(item)
        for _, then in ready:
            then()

    # --- configuration ---------------------------------------------------------------------------

    def reload(self) -> None:
        """Read all configurations again and attach what is primary and not attached yet."""
        self.configs = {}
        for path in sorted(paths.etc().glob("*.yml")):
            try:
                loaded = config.load(path.stem, validated=False)
                for volume in loaded.volumes:
                    loaded.device(volume.name)  # one without a device on this host is no configuration for it
                self.configs[path.stem] = loaded
            except (BmigrateError, KeyError, TypeError, ValueError) as exc:
                LOG.error("configuration %s cannot be used: %s", path, exc)
        self.problems = {key: error for key, error in self.problems.items() if key[0] in self.configs}
        self.released.clear()
        self.attach_missing()

    def attach_missing(self) -> None:
        """Attach every volume of a primary that is not tracked, or no longer; failures are kept for status."""
        for name, settings in self.configs.items():
            if not self._is_ours(name):
                for volume in settings.volumes:
                    self.problems.pop((name, volume.name), None)
                continue
            for volume in settings.volumes:
                key = (name, volume.name)
                current = self.tracker.volumes.get(key)
                same = current is not None and current.device == settings.device(volume.name)
                if key in self.released or (current is not None and same and not current.lost):
                    continue
                self.attach(settings, volume.name, "resume")

    def _is_ours(self, workload: str) -> bool:
        """Whether this host runs the workload, and its handover does not attach by itself."""
        try:
            item = state.load(workload)
        except BmigrateError as error:
            LOG.error("%s", error)
            return False
        if item is None or item.role != "primary":
            return False
        handover = item.handover or {}
        return not (handover.get("side") == "target" and handover.get("phase") in _NOT_BY_US)

    def attach(self, settings: Config, volume: str, mode: str) -> BmigrateError | None:
        """Attach one volume; an error is logged when it is new, kept, and returned."""
        key = (settings.workload, volume)
        current = self.tracker.volumes.get(key)
        try:
            item = self.attacher.attach(settings, volume, mode)
            if current is not None and item.attachment_id != current.attachment_id:
                # The session knows the old one: its size, and where it leads.
                self.leases.forget(settings.workload)
        except (BmigrateError, OSError) as exc:
            error = as_refusal(exc, volume)
            before = self.problems.get(key)
            if before is None or before.message != error.message:
                text = f"volume {key[0]}/{key[1]} is not tracked: {error}"
                log.event(LOG, logging.ERROR, "untracked", text, key[0], volume=key[1])
            self.problems[key] = error
            return error
        self.problems.pop(key, None)
        self.released.discard(key)
        return None


def only_one(run_directory: str | os.PathLike[str]) -> Any:
    """The lock that keeps a second daemon out, as a context manager."""
    from bmigrate.common import atomic

    os.makedirs(run_directory, mode=0o755, exist_ok=True)
    return atomic.Lock(os.path.join(run_directory, "breqd.lock"), wait_seconds=10.0)
