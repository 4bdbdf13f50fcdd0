# SPDX-License-Identifier: GPL-3.0-or-later
"""Keeps the shipper polite, and knows where its time goes. One per workload, used by its reading and sending threads.

While the foreground comes first, the readers of several streams take turns (``turn``): what is measured is how the
device does with and without one read of ours, and a rest is a rest of all of them.

Promises: while ``urgent`` is set (a handover converges or drains) nothing here waits; a wait ends
as soon as it is set. What it measures is only ever shown as the limiter, never decided on.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Callable

from bmigrate.ship import gentle
from bmigrate.ship.governor import Governor, Sample
from bmigrate.ship.pacing import TokenBucket

BURST_SECONDS = 0.5
MIN_BURST_BYTES = 64 * 1024
LIMITERS = ("source_read", "link", "standby", "bandwidth_limit", "io_latency", "io_pressure")
LARGEST_READ_BYTES = 1 << 20
_FILES_SECONDS = 10.0


class Pacer:
    """Bandwidth limit, I/O class and back-off of one workload.

    Args:
        bandwidth_bytes_per_second: 0 means no limit.
        services: of the workload, as systemd names them: whose waiting for I/O counts.

    Attributes:
        urgent: a handover converges or drains. losing: passes do not help; to rest, or to stand back for everybody
            else (the idle class), would only make it worse.
        foreground_writes: the workload writes.
    """

    def __init__(self, bandwidth_bytes_per_second: int, services: tuple[str, ...] = ()) -> None:
        self.set_bandwidth(bandwidth_bytes_per_second)
        self.urgent = threading.Event()
        self.foreground_writes = False
        self.spent: dict[str, float] = dict.fromkeys(LIMITERS, 0.0)
        self._thread = threading.local()
        self._lock = threading.Lock()
        self._turn = threading.Lock()
        self.losing = False
        self.began: float | None = None
        self._services = services
        self._governors: dict[int, Governor] = {}
        self._files: list[Path] = []
        self._files_at: float | None = None

    def set_bandwidth(self, bandwidth_bytes_per_second: int) -> None:
        """Another limit, 0 for none; from any thread. Who waits under the old one asks again within a second."""
        burst = max(MIN_BURST_BYTES, int(bandwidth_bytes_per_second * BURST_SECONDS))
        self._bucket = TokenBucket(bandwidth_bytes_per_second, burst, time.monotonic())

    def begin(self) -> None:
        """A walk begins: start measuring, and ``enter``."""
        self.spent = dict.fromkeys(LIMITERS, 0.0)
        self.began = time.monotonic()
        self.enter()

    def end(self) -> None:
        """The walk is over, however it ended."""
        self.began = None

    def enter(self) -> None:
        """Set the I/O class of the calling thread as it must be now; to be called by who reads, before each claim."""
        hurried = self.urgent.is_set() or self.losing
        wanted = gentle.CLASS_NONE if hurried else gentle.CLASS_IDLE
        if wanted != getattr(self._thread, "io_class", None):
            gentle.set_io_class(wanted)
            self._thread.io_class = wanted

    def charge(self, cause: str, seconds: float) -> None:
        """``seconds`` were spent on a cause of LIMITERS, by any thread."""
        with self._lock:
            self.spent[cause] += seconds

    def before_send(self, count: int, check: Callable[[], None]) -> None:
        """Wait until ``count`` bytes may go out under the bandwidth limit.

        Args:
            check: called about once a second meanwhile; what it raises ends the wait.
        """
        began = time.monotonic()
        now = began
        while not self.urgent.is_set():
            with self._lock:
                wait = self._bucket.take(count, now)
            if not wait:
                break
            self.urgent.wait(min(wait, 1.0))
            check()
            now = time.monotonic()
        self.charge("bandwidth_limit", now - began)

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Around a read and the rest that follows: one reader at a time while the foreground comes first."""
        if not self.polite:
            yield
            return
        with self._turn:
            yield

    @property
    def polite(self) -> bool:
        """Whether the foreground comes first right now."""
        return self.foreground_writes and not self.losing and not self.urgent.is_set()

    def read_bytes(self, number: int) -> int:
        """How much to read at once from a device of that number; the largest read when nobody would wait for it."""
        governor = self._governors.get(number)
        return governor.read_bytes if governor is not None and self.polite else LARGEST_READ_BYTES

    def rest(self, number: int, count: int, busy_seconds: float) -> None:
        """After a read of ``count`` bytes of a device in ``busy_seconds``: rest if the foreground writes and suffers.

        Args:
            number: of the device, 0 when it is none.
        """
        if not number:
            return
        governor = self._governors.get(number)
        if not self.polite:
            if governor is not None:
                governor.idle()
            return
        if governor is None:
            governor = self._governors[number] = Governor(LARGEST_READ_BYTES)
        began = now = time.monotonic()
        governor.read(count, busy_seconds)
        seconds = governor.factor * busy_seconds
        if governor.wants_sample(now):
            sample = self._sample(number, now)
            probe = governor.take(sample) if sample is not None else 0.0
            if probe and not self.urgent.wait(probe):
                # At once: the next read must not be in the window that shows how things are without it.
                sample = self._sample(number, time.monotonic())
                if sample is not None:
                    governor.take(sample)
        if seconds > 0:
            self.urgent.wait(min(seconds, 2.0))
        self.charge(governor.reason or "source_read", time.monotonic() - began)

    def _sample(self, number: int, now: float) -> Sample | None:
        times = gentle.write_times(number)
        if times is None:
            return None
        if self._files_at is None or now - self._files_at >= _FILES_SECONDS:
            self._files, self._files_at = gentle.pressure_files(self._services), now
        return Sample(now, *times, gentle.stalled_seconds(self._files))

    def limiter(self, total_seconds: float) -> str | None:
        """What took most of a pass of ``total_seconds``, if it was a fifth of it at least."""
        cause = max(self.spent, key=lambda name: self.spent[name])
        return cause if total_seconds > 0 and self.spent[cause] >= 0.2 * total_seconds else None
