# SPDX-License-Identifier: GPL-3.0-or-later
"""How fast things go, smoothed: the dirty rate, the ship rate, and what a drain would take.

Pure: times are passed in. The ship rate counts only time in which something was under way, and
only bytes that were acknowledged as durable; zero-outs are counted apart, because a gibibyte of
zeroes crosses the link in 56 bytes and would make every prediction a lie. A number that was not
measured yet is None, never a guess.
"""

from __future__ import annotations

import statistics
from collections import deque

FULL_SAMPLE_BYTES = 512 * 1024
"""A busy period must move that much before it says anything about bandwidth rather than latency."""
LATENCY_SAMPLES = 5
"""The median of so many is the latency: one batch that met a stall must not rule over an idle workload for hours."""


class Average:
    """An exponentially weighted mean whose weight depends on the time that a sample covers.

    Args:
        half_life_seconds: after that many seconds of samples an old value counts half.
    """

    def __init__(self, half_life_seconds: float) -> None:
        self.half_life = half_life_seconds
        self.value: float | None = None

    def add(self, sample: float, seconds: float) -> None:
        """Take in a sample that covers ``seconds``."""
        if seconds <= 0:
            return
        if self.value is None:
            self.value = sample
            return
        keep = 0.5 ** (seconds / self.half_life)
        self.value = self.value * keep + sample * (1.0 - keep)


class DirtyRate:
    """Bytes per second that the workload makes dirty, from breqd's running total of written bytes."""

    def __init__(self, half_life_seconds: float = 5.0) -> None:
        self._average = Average(half_life_seconds)
        self._last: tuple[float, int, str] | None = None

    def sample(self, now: float, written_bytes_total: int, identity: str) -> None:
        """Take in a total. ``identity`` changes when the total began anew (another breqd, another attachment)."""
        last, self._last = self._last, (now, written_bytes_total, identity)
        if last is None or last[2] != identity or written_bytes_total < last[1] or now <= last[0]:
            return
        self._average.add((written_bytes_total - last[1]) / (now - last[0]), now - last[0])

    @property
    def bytes_per_second(self) -> float | None:
        """The smoothed rate, or None before two samples."""
        return self._average.value


class ShipRate:
    """Bytes per second that become durable on the standby while something is under way.

    ``sent(now)`` when a claim has left; ``durable(bytes, now, idle)`` for each acknowledgement;
    ``void()`` instead when the claim was compared by checksum: its time is that of the hashing;
    ``round_trip(seconds)`` for a SYNC with nothing before it.
    """

    def __init__(self, half_life_seconds: float = 3.0) -> None:
        self._average = Average(half_life_seconds)
        self._best_small: float | None = None
        self._latencies: deque[float] = deque(maxlen=LATENCY_SAMPLES)
        self._busy_since: float | None = None
        self._bytes = 0

    def sent(self, now: float) -> None:
        """Something is under way from now on."""
        if self._busy_since is None:
            self._busy_since = now
            self._bytes = 0

    def durable(self, data_bytes: int, now: float, idle: bool) -> None:
        """``data_bytes`` (zero-outs not counted) became durable; ``idle``: nothing else is under way."""
        if self._busy_since is None:
            return
        self._bytes += data_bytes
        seconds = now - self._busy_since
        if seconds > 0 and self._bytes >= FULL_SAMPLE_BYTES:
            self._average.add(self._bytes / seconds, seconds)
            self._busy_since, self._bytes = now, 0
        elif idle and seconds > 0 and self._bytes:
            self._best_small = max(self._best_small or 0.0, self._bytes / seconds)
            self._latencies.append(seconds)
        if idle:
            self._busy_since = None

    def void(self) -> None:
        """What is under way says nothing about a drain."""
        self._busy_since = None

    def round_trip(self, seconds: float) -> None:
        """How long the standby took to answer an empty SYNC."""
        self._latencies.append(seconds)

    @property
    def latency_seconds(self) -> float | None:
        """How long a small batch takes to become durable, or None before the first one."""
        return statistics.median(self._latencies) if self._latencies else None

    @property
    def bytes_per_second(self) -> float | None:
        """The smoothed rate; while only small batches were seen, the best of those (too low, never too high)."""
        return self._average.value if self._average.value is not None else self._best_small


def predicted_drain_seconds(
    left_bytes: int, ship_rate: float | None, latency_seconds: float | None, dirty_rate: float | None = None
) -> float | None:
    """How long the last pass would take if the workload stopped now.

    Args:
        left_bytes: dirty and claimed.
        ship_rate: measured bytes per second, or None.
        latency_seconds: how long a small batch takes to become durable, or None.
        dirty_rate: bytes per second of the workload; what it writes while it is being stopped (half a
            second is assumed) is added.

    Returns: seconds, or None when bytes are left and nothing was measured yet.
    """
    left = left_bytes + 0.5 * (dirty_rate or 0.0)
    if left < 1:
        return latency_seconds or 0.0
    if not ship_rate:
        return None if left_bytes else (latency_seconds or 0.0)
    return (latency_seconds or 0.0) + left / ship_rate
