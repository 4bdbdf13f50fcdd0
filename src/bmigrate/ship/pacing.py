# SPDX-License-Identifier: GPL-3.0-or-later
"""How fast the shipper may go: pure arithmetic on times and bytes, without a clock of its own.

Promises: over any interval of t seconds a bucket lets at most burst + rate * t bytes pass; a
limit never stops shipping for good. Nothing here may sleep or read a clock.
"""

from __future__ import annotations


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


def backoff(attempt: int, shortest: float = 0.5, longest: float = 15.0) -> float:
    """Seconds to wait before connection attempt ``attempt`` (1 is the first repetition): doubling, bounded."""
    return float(min(longest, shortest * 2 ** min(max(attempt - 1, 0), 16)))
