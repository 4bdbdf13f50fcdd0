# SPDX-License-Identifier: GPL-3.0-or-later
"""How fast the shipper may go: pure arithmetic on times and bytes, without a clock of its own.

Promises: over any interval of t seconds a bucket lets at most burst + rate * t bytes pass; a
limit never stops shipping for good, and neither does pressure. Nothing here may sleep or read a clock.
"""

from __future__ import annotations

PRESSURE_THRESHOLD_PERCENT = 40.0
"""``some avg10`` of /proc/pressure/io above which the foreground is taken to suffer."""
MAX_PRESSURE_FACTOR = 3.0
"""Under the worst pressure the shipper rests three times as long as it works, never longer."""


class TokenBucket:
    """A bandwidth limit.

    Args:
        rate_bytes_per_second: 0 means no limit.
        burst_bytes: what may pass at once after a rest.
        now: seconds of a monotonic clock.

    A request larger than the burst passes once the bucket is full, and leaves a debt that is waited
    for before anything else may pass; so one long frame cannot be starved and cannot cheat.
    """

    def __init__(self, rate_bytes_per_second: int, burst_bytes: int, now: float) -> None:
        if rate_bytes_per_second < 0 or burst_bytes <= 0:
            raise ValueError("the rate must not be negative and the burst must be above 0")
        self.rate = rate_bytes_per_second
        self.burst = burst_bytes
        self._level = float(burst_bytes)
        self._at = now

    def _refill(self, now: float) -> None:
        if now > self._at:
            self._level = min(float(self.burst), self._level + (now - self._at) * self.rate)
            self._at = now

    def take(self, count: int, now: float) -> float:
        """Take ``count`` bytes if they may pass now.

        Returns: 0.0 when they were taken; otherwise the seconds to wait before asking again
            (nothing was taken).
        """
        if not self.rate:
            return 0.0
        self._refill(now)
        wanted = min(count, self.burst)
        if self._level >= wanted - 1e-6:
            self._level -= count
            return 0.0
        return max((wanted - self._level) / self.rate, 1e-4)


def pressure_rest(avg10_percent: float, busy_seconds: float, threshold: float = PRESSURE_THRESHOLD_PERCENT) -> float:
    """Seconds to rest after ``busy_seconds`` of work while the foreground waits for I/O.

    Args:
        avg10_percent: share of the last ten seconds in which some task waited for I/O, 0 to 100.
        busy_seconds: how long the shipper just worked without a rest.
        threshold: percent up to which there is no rest at all.

    Returns: 0 up to the threshold, then growing with the excess, at most MAX_PRESSURE_FACTOR times
        the work: back-off slows the shipper down, it can never stop it.
    """
    if avg10_percent <= threshold or busy_seconds <= 0:
        return 0.0
    return busy_seconds * min(MAX_PRESSURE_FACTOR, (avg10_percent - threshold) / threshold * 2.0)


def backoff(attempt: int, shortest: float = 0.5, longest: float = 15.0) -> float:
    """Seconds to wait before connection attempt ``attempt`` (1 is the first repetition): doubling, bounded."""
    return float(min(longest, shortest * 2 ** min(max(attempt - 1, 0), 16)))
