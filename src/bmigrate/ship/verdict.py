# SPDX-License-Identifier: GPL-3.0-or-later
"""The state that the shipper shows, derived from facts: pure, so that each rule can be tested.

Promises: a workload is never called in step while a volume is suspect, seeding, or not connected.
Losing ground needs two passes in a row that did not help, and carries a reason with numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

STATES = (
    "seeding",
    "catching_up",
    "in_step",
    "losing_ground",
    "suspect",
    "resyncing",
    "paused",
    "disconnected",
    "idle",
    "draining",
    "sealed",
)
TROUBLE = ("losing_ground", "suspect", "disconnected")
HELPED = 0.9
"""A pass helped when it left less than this share of what was there before it."""


def human_bytes(count: float) -> str:
    """12.3 MiB and the like."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


@dataclass(frozen=True)
class Facts:
    """What the state is derived from. Bytes and seconds.

    Attributes:
        wanted: "ship", "idle" or "paused": what role and operator want.
        wanted_reason: why, when it is not "ship".
        connected: a session is open. problem: the last error when it is not.
        activity: None, "resyncing" or "draining". sealed: a drain ended well.
        suspect: reason of the first suspect volume, or None. seeding: a volume was not shipped once yet.
        left_bytes: dirty and claimed. predicted_seconds: of a drain now. limit_seconds: allowed for it.
    """

    wanted: str = "ship"
    wanted_reason: str | None = None
    connected: bool = False
    problem: str | None = None
    activity: str | None = None
    sealed: bool = False
    suspect: str | None = None
    seeding: bool = False
    left_bytes: int = 0
    predicted_seconds: float | None = None
    limit_seconds: float = 2.0
    dirty_rate: float | None = None
    ship_rate: float | None = None
    limiter: str | None = None


@dataclass
class Trend:
    """Whether passes help: remembers how many in a row did not, and what a trim explains."""

    unhelpful: int = 0
    passes: int = 0
    caught_up: bool = False
    trimmed_bytes: int = 0

    def finished(
        self,
        left_before: int,
        left_after: int,
        predicted: float | None,
        limit_seconds: float,
        discarded_bytes: int = 0,
    ) -> bool:
        """Take in one complete pass; returns whether a trim was first seen in it.

        Args:
            discarded_bytes: that the workload discarded meanwhile. When they are most of what is left, the pass says
                nothing about who is faster: a trim of the file system comes once, and its zeroes ship at once. What is
                discarded from then on until everything is shipped belongs to the same trim.
        """
        self.passes += 1
        self.caught_up = left_after == 0 or (predicted is not None and predicted <= limit_seconds)
        if self._is_trim(discarded_bytes, left_after) and not self.caught_up:
            return self._trimmed(discarded_bytes)
        if self.caught_up:
            self.trimmed_bytes = 0
        if self.caught_up or left_after < left_before * HELPED:
            self.unhelpful = 0
        else:
            self.unhelpful += 1
        return False

    def between(self, discarded_bytes: int, left_bytes: int, predicted: float | None, limit_seconds: float) -> bool:
        """Take in what was discarded since the last pass, before the next one; returns whether a trim was first seen.

        Args:
            left_bytes, predicted: of the pass that is to come: when it would take longer than a drain may, what is left
                is not what it was when the last pass was complete.
        """
        long = predicted is not None and predicted > limit_seconds
        if not (long and self._is_trim(discarded_bytes, left_bytes)):
            return False
        self.caught_up = False
        return self._trimmed(discarded_bytes)

    @staticmethod
    def _is_trim(discarded_bytes: int, left_bytes: int) -> bool:
        return discarded_bytes > 0 and 2 * discarded_bytes >= left_bytes

    def _trimmed(self, discarded_bytes: int) -> bool:
        first = not self.trimmed_bytes
        self.trimmed_bytes += discarded_bytes
        return first

    @property
    def slipping(self) -> bool:
        """The last pass did not help, and one more such pass is losing ground: no time for resting.

        One pass earlier than the state, so that what is shown as losing ground is the workload's doing and not ours.
        """
        return self.unhelpful >= 1

    def disconnected(self) -> None:
        """A new session begins: nothing is known until a pass is complete."""
        self.unhelpful = 0
        self.caught_up = False
        self.trimmed_bytes = 0


def judge(facts: Facts, trend: Trend) -> tuple[str, str | None]:
    """The state and its reason."""
    if facts.sealed:
        return "sealed", "drained for a handover; nothing is shipped until it is finished or given up"
    if facts.wanted != "ship":
        return facts.wanted, facts.wanted_reason
    if not facts.connected:
        reason = facts.problem or "connecting"
        return "disconnected", f"{reason}; suspect: {facts.suspect}" if facts.suspect else reason
    if facts.activity is not None:
        return facts.activity, facts.suspect if facts.activity == "resyncing" else None
    if facts.suspect:
        return "suspect", facts.suspect
    if facts.seeding:
        return "seeding", None
    if trend.unhelpful >= 2:
        return "losing_ground", _losing(facts)
    if trend.caught_up:
        if facts.ship_rate and facts.left_bytes > facts.limit_seconds * facts.ship_rate:
            # A burst of writes, and the next pass may take long. Not the prediction, of which the answers of a slow
            # link may be the most: every single write would end what is in step.
            return "catching_up", f"{human_bytes(facts.left_bytes)} were written since the last pass"
        return "in_step", None
    return "catching_up", trimmed(trend.trimmed_bytes) if trend.trimmed_bytes else None


def trimmed(count: int) -> str:
    """What the workload's discarding of so many bytes is called."""
    return f"the workload discarded {human_bytes(count)} (fstrim, or files removed): they are looked at once"


def _losing(facts: Facts) -> str:
    writes = f"{human_bytes(facts.dirty_rate or 0)}/s"
    ships = f"{human_bytes(facts.ship_rate or 0)}/s"
    by = {
        "bandwidth_limit": "the configured bandwidth limit",
        "io_latency": "back-off for the foreground's writes",
        "io_pressure": "back-off for the foreground's I/O",
        "link": "the link or the standby's disk",
        "standby": "the standby's disk",
        "source_read": "reading the source device",
    }.get(facts.limiter or "", "")
    return (
        f"two passes did not help: the workload writes {writes}, {ships} become durable on the standby, "
        f"{human_bytes(facts.left_bytes)} are left" + (f"; limited by {by}" if by else "")
    )
