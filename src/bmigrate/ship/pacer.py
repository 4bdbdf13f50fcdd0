# SPDX-License-Identifier: GPL-3.0-or-later
"""Keeps the shipper polite, and knows where its time goes. One per workload, used by its reading and sending threads.

Promises: while ``urgent`` is set (a handover converges or drains) nothing here waits; a wait ends
as soon as it is set. What it measures is only ever shown as the limiter, never decided on.
"""

from __future__ import annotations

import threading
import time

from bmigrate.ship import gentle
from bmigrate.ship.pacing import PRESSURE_THRESHOLD_PERCENT, TokenBucket, pressure_rest

BURST_SECONDS = 0.5
MIN_BURST_BYTES = 64 * 1024
LIMITERS = ("source_read", "link", "standby", "bandwidth_limit", "io_pressure")


class Pacer:
    """Bandwidth limit, I/O class and back-off of one workload.

    Args:
        bandwidth_bytes_per_second: 0 means no limit.
    """

    def __init__(self, bandwidth_bytes_per_second: int) -> None:
        self.set_bandwidth(bandwidth_bytes_per_second)
        self.urgent = threading.Event()
        self.foreground_writes = False
        self.spent: dict[str, float] = dict.fromkeys(LIMITERS, 0.0)
        self._thread = threading.local()
        self._pressure_at = 0.0
        self._pressure: float | None = None

    def set_bandwidth(self, bandwidth_bytes_per_second: int) -> None:
        """Another limit, 0 for none; from any thread. Who waits under the old one asks again within a second."""
        burst = max(MIN_BURST_BYTES, int(bandwidth_bytes_per_second * BURST_SECONDS))
        self._bucket = TokenBucket(bandwidth_bytes_per_second, burst, time.monotonic())

    def begin(self) -> None:
        """A walk begins: start measuring, and ``enter``."""
        self.spent = dict.fromkeys(LIMITERS, 0.0)
        self.enter()

    def enter(self) -> None:
        """Set the I/O class of the calling thread as it must be now; to be called by who reads, before each claim."""
        wanted = gentle.CLASS_NONE if self.urgent.is_set() else gentle.CLASS_IDLE
        if wanted != getattr(self._thread, "io_class", None):
            gentle.set_io_class(wanted)
            self._thread.io_class = wanted

    def charge(self, cause: str, seconds: float) -> None:
        """``seconds`` were spent on a cause of LIMITERS; each cause belongs to one thread."""
        self.spent[cause] += seconds

    def before_send(self, count: int) -> None:
        """Wait until ``count`` bytes may go out under the bandwidth limit."""
        began = time.monotonic()
        now = began
        while not self.urgent.is_set():
            wait = self._bucket.take(count, now)
            if not wait:
                break
            self.urgent.wait(min(wait, 1.0))
            now = time.monotonic()
        self.charge("bandwidth_limit", now - began)

    def rest(self, busy_seconds: float) -> None:
        """After ``busy_seconds`` of reading from the device: rest if the foreground writes and suffers."""
        if self.urgent.is_set() or not self.foreground_writes:
            return
        now = time.monotonic()
        if now - self._pressure_at >= 1.0:
            self._pressure, self._pressure_at = gentle.io_pressure(), now
        if self._pressure is None or self._pressure <= PRESSURE_THRESHOLD_PERCENT:
            return
        seconds = pressure_rest(self._pressure, busy_seconds)
        self.urgent.wait(min(seconds, 1.0))
        self.charge("io_pressure", time.monotonic() - now)

    def limiter(self, total_seconds: float) -> str | None:
        """What took most of a pass of ``total_seconds``, if it was a fifth of it at least."""
        cause = max(self.spent, key=lambda name: self.spent[name])
        return cause if total_seconds > 0 and self.spent[cause] >= 0.2 * total_seconds else None
