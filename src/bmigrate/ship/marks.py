# SPDX-License-Identifier: GPL-3.0-or-later
"""Which SYNC may leave now, in a session of several streams: pure bookkeeping, no I/O, no locks.

Only the first stream's receiver flushes and acknowledges, so that one flush that fails is the end of all: were each
stream flushed by its own receiver, the kernel would report a lost write to one of them, and the next flush
of another would succeed and acknowledge data that is gone. What travelled on the other streams must be written when the
SYNC comes, therefore a MARK follows it there, and the SYNC leaves when every receiver has answered MARKED.

Promises: a SYNC comes out of ``ready`` only after each stream that carried any of its claims has answered the MARK of
this number, or of a later one; they come out in ascending order; and one that is passed over is covered by the next.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from bmigrate.ship.window import ProtocolError


class Ready(NamedTuple):
    """A SYNC to be sent now: its number, and a bit for each volume that other streams than the first wrote."""

    number: int
    volumes: int


@dataclass
class _Waiting:
    number: int
    lanes: set[int]
    volumes: int


@dataclass
class Marks:
    """The SYNCs of which some stream has not answered its MARK yet."""

    _waiting: list[_Waiting] = field(default_factory=list)
    _asked: dict[int, list[int]] = field(default_factory=dict)

    def wait(self, number: int, lanes: set[int], volumes: int) -> None:
        """SYNC ``number`` waits for the MARK of the same number on these streams; numbers ascend.

        Args:
            volumes: a bit for each volume that was written on them.
        """
        self._waiting.append(_Waiting(number, set(lanes), volumes))
        for lane in lanes:
            self._asked.setdefault(lane, []).append(number)

    def marked(self, lane: int, number: int) -> None:
        """The receiver of a stream has written everything before MARK ``number``.

        Raises:
            ProtocolError: this is not the oldest MARK that it owes an answer to.
        """
        asked = self._asked.get(lane)
        if not asked or asked[0] != number:
            raise ProtocolError(f"stream {lane} answered MARK {number}, which was not the next one asked for")
        asked.pop(0)
        for item in self._waiting:
            if item.number <= number:
                item.lanes.discard(lane)

    def ready(self) -> Ready | None:
        """Take out the newest SYNC before which none waits any more, or None."""
        found, volumes = None, 0
        while self._waiting and not self._waiting[0].lanes:
            item = self._waiting.pop(0)
            volumes |= item.volumes
            found = Ready(item.number, volumes)
        return found
