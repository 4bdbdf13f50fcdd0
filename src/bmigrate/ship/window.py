# SPDX-License-Identifier: GPL-3.0-or-later
"""Which claims are under way: sent, synced, acknowledged. Pure accounting, no I/O, no locks.

Promises: a claim is handed out for acknowledgement only when an ACK arrived for a SYNC that was
sent after the last frame of that claim, and only once. This is what makes "clear" mean "durable":
an ACK(n) says nothing about frames that followed SYNC(n).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

Extent = tuple[int, int]
ZERO_WEIGHT = 16


@dataclass
class Claim:
    """A claim on some dirty blocks of a volume.

    Attributes:
        volume: its name.
        key: breqd's claim id {incarnation, epoch, n}, handed back unchanged.
        extents: (offset, length) in bytes.
        next_offset: where the walk goes on.
        data_bytes, zero_bytes, same_bytes: how its bytes travelled, filled in while it is sent.
        lane: number of the stream that all its frames travel on.
    """

    volume: str
    key: dict[str, Any]
    extents: list[Extent]
    next_offset: int
    data_bytes: int = 0
    zero_bytes: int = 0
    same_bytes: int = 0
    lane: int = 0

    @property
    def total_bytes(self) -> int:
        """Bytes that the claim covers."""
        return sum(length for _, length in self.extents)

    @property
    def weight_bytes(self) -> int:
        """What it counts for while it is under way: zeroes cost the link nothing and the standby's disk little."""
        return self.total_bytes - self.zero_bytes + self.zero_bytes // ZERO_WEIGHT


class ProtocolError(Exception):
    """The receiver acknowledged something that was never asked for."""


@dataclass
class Window:
    """The claims between "all frames sent" and "acknowledged to breqd".

    ``sent(claim)`` after its last frame was written; ``sync()`` gives the number of the SYNC frame to
    write now; ``acked(n)`` gives the claims that ACK(n) covers; ``released(claim)`` after breqd said yes.
    """

    _unsynced: list[Claim] = field(default_factory=list)
    _synced: deque[tuple[int, list[Claim]]] = field(default_factory=deque)
    _last_sync: int = 0
    last_ack: int = 0
    in_flight_bytes: int = 0
    in_flight_total_bytes: int = 0
    in_flight_claims: int = 0

    def sent(self, claim: Claim) -> None:
        """All frames of the claim were written to the stream."""
        self._unsynced.append(claim)
        self.in_flight_bytes += claim.weight_bytes
        self.in_flight_total_bytes += claim.total_bytes
        self.in_flight_claims += 1

    @property
    def unsynced_bytes(self) -> int:
        """Weight of what was sent and no SYNC follows yet."""
        return sum(claim.weight_bytes for claim in self._unsynced)

    @property
    def syncs_under_way(self) -> int:
        """SYNCs that were sent and not acknowledged."""
        return self._last_sync - self.last_ack

    @property
    def unsynced(self) -> bool:
        """Whether a SYNC is due before everything sent can be acknowledged."""
        return bool(self._unsynced)

    @property
    def last_sync(self) -> int:
        """Number of the last SYNC."""
        return self._last_sync

    def sync(self) -> int:
        """Number for a SYNC frame that must be written now, before any further frame."""
        self._last_sync += 1
        self._synced.append((self._last_sync, self._unsynced))
        self._unsynced = []
        return self._last_sync

    @property
    def last_batch(self) -> list[Claim]:
        """The claims that the last SYNC covers and no earlier one does."""
        return self._synced[-1][1] if self._synced else []

    def acked(self, number: int) -> list[Claim]:
        """The claims that ACK(number) makes durable, oldest first.

        Raises:
            ProtocolError: no such SYNC was sent, or it was acknowledged before.
        """
        if not self.last_ack < number <= self._last_sync:
            raise ProtocolError(
                f"acknowledgement {number} is impossible: the last SYNC was {self._last_sync}, "
                f"acknowledged up to {self.last_ack}"
            )
        self.last_ack = number
        claims: list[Claim] = []
        while self._synced and self._synced[0][0] <= number:
            claims += self._synced.popleft()[1]
        return claims

    def released(self, claim: Claim) -> None:
        """breqd has taken the acknowledgement of the claim."""
        self.in_flight_bytes -= claim.weight_bytes
        self.in_flight_total_bytes -= claim.total_bytes
        self.in_flight_claims -= 1
