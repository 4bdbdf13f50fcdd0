# SPDX-License-Identifier: GPL-3.0-or-later
"""Backs off when the foreground is served worse while the shipper reads than while it rests. Pure: no clock, no I/O.

Signals are compared with themselves: now and then the shipper rests for a whole window, and what is measured then is
the baseline. So a database that waits for its disk all day is no reason to rest; that it waits *longer* while the
shipper reads is. Two signals: the time that a write of the device takes (its own counters), and the share of time in
which the workload's services wait for I/O (pressure stall information of their control groups). The pressure of the
whole host is not used: the shipper's own reads are in it.

Promises: the shipper rests at most MAX_FACTOR times as long as it reads, so it is slowed down and never stopped;
without a signal it does not rest. How much to read at once follows from the same measurements: a long read on a slow
device makes everything behind it wait.
"""

from __future__ import annotations

from dataclasses import dataclass

WINDOW_SECONDS = 0.25
LONGEST_WINDOW_SECONDS = 2.0
"""A window goes on for so long when few writes come."""
PROBE_SECONDS = 5.0
"""A window of rest is due after so many seconds without one: a twentieth of the time, and only under writes."""
MAX_FACTOR = 4.0
MIN_WRITES = 4
"""A window with fewer writes of the foreground says nothing of how long one takes."""
LATENCY_RATIO = 2.0
LATENCY_SLACK_SECONDS = 0.004
PRESSURE_SLACK = 0.15
READ_SECONDS = 0.015
"""How long one read of the shipper may keep the device under writes."""
MIN_READ_BYTES = 64 * 1024
EASE = 0.02
"""By how much the factor falls in a window in which nobody suffered."""
_MEMORY = 0.5


@dataclass(frozen=True)
class Sample:
    """Running totals of a device and of the workload's services.

    Attributes:
        now: seconds of a monotonic clock. writes: completed. write_seconds: that they took in all.
        stalled_seconds: in which some task of the services waited for I/O; None when that is not known.
    """

    now: float
    writes: int
    write_seconds: float
    stalled_seconds: float | None = None


class Governor:
    """How long to rest after a read, and how much to read at once, for one device.

    Attributes:
        factor: seconds of rest for each second of reading.
        reason: "io_latency" or "io_pressure" when the factor is above 0, else None.
    """

    def __init__(self, largest_read_bytes: int) -> None:
        self.factor = 0.0
        self.reason: str | None = None
        self._largest = largest_read_bytes
        self._read_bytes = float(largest_read_bytes)
        self._start: Sample | None = None
        self._resting = False
        self._probed_at: float | None = None
        self._latency: float | None = None
        self._pressure: float | None = None

    @property
    def read_bytes(self) -> int:
        """How much to read at once."""
        return max(MIN_READ_BYTES, int(self._read_bytes) // 4096 * 4096)

    def idle(self) -> None:
        """There is no foreground to care for: no rest, large reads, and what was measured of it is old."""
        self.factor, self.reason = 0.0, None
        self._read_bytes = float(self._largest)
        self._start = self._latency = self._pressure = self._probed_at = None
        self._resting = False

    def wants_sample(self, now: float) -> bool:
        """Whether a window is over, or none is open."""
        return self._start is None or now - self._start.now >= WINDOW_SECONDS

    def read(self, count: int, seconds: float) -> None:
        """A read of ``count`` bytes took so long, while the foreground writes."""
        if seconds > 0 and count >= MIN_READ_BYTES:
            wanted = count / seconds * READ_SECONDS
            self._read_bytes = min(float(self._largest), self._read_bytes + (wanted - self._read_bytes) * 0.25)

    def take(self, sample: Sample) -> float:
        """Close a window and open the next.

        Returns: seconds to rest at once and then to take another sample, before reading again: 0, or a whole window to
            find the baseline in.
        """
        start, resting = self._start, self._resting
        if start is not None and not resting and sample.writes - start.writes < MIN_WRITES:
            if sample.now - start.now < LONGEST_WINDOW_SECONDS:
                return 0.0
        self._start = sample
        if start is not None:
            self._judge(start, sample, resting)
        if resting or self._probed_at is None:
            self._probed_at = sample.now if resting else (self._probed_at or sample.now - PROBE_SECONDS)
        self._resting = not resting and sample.now - self._probed_at >= PROBE_SECONDS
        return WINDOW_SECONDS if self._resting else 0.0

    def _judge(self, start: Sample, end: Sample, resting: bool) -> None:
        seconds = end.now - start.now
        writes = end.writes - start.writes
        latency = (end.write_seconds - start.write_seconds) / writes if writes >= MIN_WRITES else None
        if latency is not None and latency < 0:
            latency = None
        pressure = None
        if seconds > 0 and start.stalled_seconds is not None and end.stalled_seconds is not None:
            pressure = (end.stalled_seconds - start.stalled_seconds) / seconds
            # Totals that fall are those of a service that was started anew: this window says nothing.
            pressure = min(1.0, pressure) if pressure >= 0 else None
        if resting:
            self._latency = _smoothed(self._latency, latency)
            self._pressure = _smoothed(self._pressure, pressure)
            return
        worse = None
        if pressure is not None and self._pressure is not None and pressure > self._pressure + PRESSURE_SLACK:
            worse = "io_pressure"
        if latency is not None and self._latency is not None:
            if latency > max(LATENCY_RATIO * self._latency, self._latency + LATENCY_SLACK_SECONDS):
                worse = "io_latency"
        if worse:
            self.reason = worse
            self.factor = min(MAX_FACTOR, max(0.5, self.factor * 2))
        else:
            # Slowly: where it was too much a moment ago, it will be again.
            self.factor = max(0.0, self.factor - EASE)
            if not self.factor:
                self.reason = None


def _smoothed(old: float | None, new: float | None) -> float | None:
    if new is None or old is None:
        return old if new is None else new
    return old + (new - old) * _MEMORY
