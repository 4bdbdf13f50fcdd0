# SPDX-License-Identifier: GPL-3.0-or-later
"""The checker: what the client was promised against what the database holds. Pure, but for reading the log.

A commit is lost when the server acknowledged it and the row is not there. A row whose commit was
never acknowledged may be there or not: the client was told nothing.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Outage:
    """One interruption as the client saw it; times in seconds of the client's clock.

    Attributes:
        last_ack: last acknowledgement before it.
        first_refusal: first error.
        next_ack: first acknowledgement after it, or None when there was none.
    """

    last_ack: float
    first_refusal: float
    next_ack: float | None

    @property
    def to_refusal_seconds(self) -> float:
        """How long the client waited without an answer before it was refused."""
        return self.first_refusal - self.last_ack

    @property
    def downtime_seconds(self) -> float | None:
        """From the last acknowledgement to the next one."""
        return None if self.next_ack is None else self.next_ack - self.last_ack


def read_events(path: Path) -> list[dict[str, Any]]:
    """The client's log; an unfinished last line (the client was killed) is left out."""
    events = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            events.append(json.loads(line))
    return events


def acknowledged(events: Iterable[dict[str, Any]]) -> list[int]:
    """Numbers of the commits that the server acknowledged, in order."""
    return [event["id"] for event in events if "acked" in event]


def acknowledged_between(events: Iterable[dict[str, Any]], begin: float, end: float) -> int:
    """How many commits were acknowledged in a span of the client's clock (seconds)."""
    return sum(begin <= event["acked"] < end for event in events if "acked" in event)


def missing(events: Iterable[dict[str, Any]], present: Collection[int]) -> list[int]:
    """Acknowledged commits that the database does not hold: the lost ones."""
    held = set(present)
    return [number for number in acknowledged(events) if number not in held]


def outages(events: Iterable[dict[str, Any]]) -> list[Outage]:
    """Each interruption between two acknowledgements, oldest first."""
    found: list[Outage] = []
    last_ack: float | None = None
    first_refusal: float | None = None
    for event in events:
        if "refused" in event:
            if first_refusal is None:
                first_refusal = event["at"]
            continue
        if first_refusal is not None and last_ack is not None:
            found.append(Outage(last_ack, first_refusal, event["acked"]))
        first_refusal, last_ack = None, event["acked"]
    if first_refusal is not None and last_ack is not None:
        found.append(Outage(last_ack, first_refusal, None))
    return found
