# SPDX-License-Identifier: GPL-3.0-or-later
"""Verify: compare the replica with the running source by checksum, and report what really differs.

A live volume always differs from its replica where it was just written; that is not damage. So a
mismatch is only a candidate. A round re-reads both sides of each candidate, then passes a barrier,
and then ships everything dirty: a candidate that was dirty is explained and gets another round; one
that differed although it was neither dirty nor claimed is counted against it. What was found
different so in ROUNDS rounds in a row is reported: an uncompleted write (on the medium, not yet
recorded) explains one such round, not three.

Promises: it marks nothing and repairs nothing by itself; what it reports was seen with 128-bit digests. Memory is
bounded whatever differs: candidates are extents, not blocks, and there are MAX_EXTENTS of them at the most. When there
are more, it compares no further, and says that what it found is not all (``complete``).
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Callable

from bmigrate.common import ranges
from bmigrate.common.errors import RefusedError
from bmigrate.ship.compare import BATCH_BYTES, Comparison, Piece
from bmigrate.ship.pacer import Pacer
from bmigrate.ship.passes import run_pass
from bmigrate.ship.session import Session
from bmigrate.ship.source import READ_BYTES, SourceVolume

ROUNDS = 3
#: A round waits until the device has been seen without a write under way, but no longer than this: one that never rests
#: still ends what was under way when the round began, unless a write takes ROUNDS times as long.
REST_SECONDS = 5.0
#: A bio is counted out shortly before it is recorded.
LATE_SECONDS = 0.01
MAX_ROUNDS = 12
MAX_LISTED = 256
MAX_EXTENTS = 1 << 17
"""Some 16 MiB for each list of them. A replica with more places that differ needs a resync, not a list."""
Extent = tuple[int, int]


@dataclass
class Outcome:
    """What a verify found. Bytes; extents by volume.

    Attributes:
        different: proved to differ. busy: still explained by writes when the rounds were used up.
        complete: False: there were too many differences to look at all; the others are lower bounds.
    """

    compared_bytes: int = 0
    different: dict[str, list[Extent]] = field(default_factory=dict)
    busy_bytes: int = 0
    rounds: int = 0
    complete: bool = True

    def to_dict(self) -> dict[str, object]:
        """For the answer on ship.sock; at most MAX_LISTED extents are listed, all are counted."""
        listed = [
            {"volume": name, "offset_bytes": offset, "length_bytes": length}
            for name, extents in sorted(self.different.items())
            for offset, length in extents
        ]
        return {
            "compared_bytes": self.compared_bytes,
            "different_blocks": listed[:MAX_LISTED],
            "different_extents": len(listed),
            "different_bytes": sum(ranges.total(extents) for extents in self.different.values()),
            "busy_bytes": self.busy_bytes,
            "rounds": self.rounds,
            "complete": self.complete,
        }


def verify(session: Session, pacer: Pacer, interrupted: Callable[[], bool], progress: Callable[[int], None]) -> Outcome:
    """Compare every block of every volume of the session.

    Args:
        interrupted: asked now and then. progress: called with each amount of bytes compared.

    Raises:
        RefusedError: reason ``interrupted``.
        BmigrateError: the session is over.
    """
    pacer.begin()
    try:
        return _verify(session, pacer, interrupted, progress)
    finally:
        pacer.end()


def _verify(
    session: Session, pacer: Pacer, interrupted: Callable[[], bool], progress: Callable[[int], None]
) -> Outcome:
    outcome = Outcome()
    candidates: dict[str, Votes] = {}

    def counted(count: int) -> None:
        outcome.compared_bytes += count
        progress(count)

    room = MAX_EXTENTS
    for volume in session.volumes:
        found = _compare(session, pacer, volume, [(0, volume.size_bytes)], interrupted, counted, room)
        outcome.complete &= found.complete
        room -= len(found.extents)
        if found.extents:
            candidates[volume.name] = [found.extents, *([] for _ in range(ROUNDS))]
        if not outcome.complete:
            break
    while candidates and outcome.rounds < MAX_ROUNDS:
        outcome.rounds += 1
        candidates, complete = _round(session, pacer, candidates, interrupted)
        outcome.complete &= complete
        if not any(extents for votes in candidates.values() for extents in votes[:ROUNDS]):
            break
    for name, votes in candidates.items():
        if votes[ROUNDS]:
            outcome.different[name] = ranges.merge(votes[ROUNDS])
        outcome.busy_bytes += sum(ranges.total(extents) for extents in votes[:ROUNDS])
    return outcome


Votes = list[list[Extent]]
"""At n: the extents that were different without an explanation in the last n rounds, up to ROUNDS; none is in two."""


def _round(
    session: Session, pacer: Pacer, candidates: dict[str, Votes], interrupted: Callable[[], bool]
) -> tuple[dict[str, Votes], bool]:
    """Compare the candidates again, then learn which of them were dirty by shipping everything dirty.

    Returns: those that still differ, with their votes, and False when there were too many of them to keep.
    """
    # Nothing may be claimed while we look: breqd gives out no block that is claimed already, so a block that
    # was written again while claimed would look clean below.
    session.settle()
    remaining: dict[str, list[Extent]] = {}
    complete = True
    for volume in session.volumes:
        if volume.name in candidates:
            extents = ranges.merge(extent for extents in candidates[volume.name] for extent in extents)
            room = MAX_EXTENTS - sum(map(len, remaining.values()))
            found = _compare(session, pacer, volume, extents, interrupted, lambda count: None, room)
            complete &= found.complete
            remaining[volume.name] = found.extents
    for volume in session.volumes:
        if volume.name in candidates:
            _until_written(session, volume, interrupted)
    session.barrier()
    dirty: dict[str, list[Extent]] = {}
    granule = {volume.name: volume.granule_bytes for volume in session.volumes}

    def note(name: str, extents: list[Extent]) -> None:
        # What is no candidate explains nothing, and a workload may have written anything meanwhile.
        known = dirty.setdefault(name, [])
        known += ranges.intersect(ranges.widen(extents, granule[name]), remaining.get(name, []))
        if len(known) > 2 * MAX_EXTENTS:
            dirty[name] = _coarse(known)

    result = run_pass(session, pacer, interrupted, observer=note)
    if not result.complete:
        raise _interrupted()
    session.settle()
    after: dict[str, Votes] = {}
    for name, extents in remaining.items():
        written = _coarse(dirty.get(name, []))
        before = [ranges.intersect(extents, ranges.merge(votes)) for votes in candidates[name]]
        unexplained = [ranges.subtract(votes, written) for votes in before]
        explained = ranges.intersect(extents, written)
        # One vote more for each, and no vote left for what was written.
        votes = [explained, *unexplained[: ROUNDS - 1], unexplained[ROUNDS - 1] + unexplained[ROUNDS]]
        if any(votes):
            after[name] = votes
    room = MAX_EXTENTS
    for number in range(ROUNDS, -1, -1):
        for votes in after.values():
            complete &= len(votes[number]) <= room
            del votes[number][room:]
            room -= len(votes[number])
    return after, complete


def _until_written(session: Session, volume: SourceVolume, interrupted: Callable[[], bool]) -> None:
    """Wait until what was on the medium when it was read is also recorded.

    A write is recorded when it is complete, and a large one may be on the medium in part long before: three quick
    rounds would all fall into it, and it explain none of them.
    """
    deadline = time.monotonic() + REST_SECONDS
    while volume.writes_in_flight() and time.monotonic() < deadline:
        if interrupted():
            raise _interrupted()
        session.check()
        time.sleep(0.005)
    time.sleep(LATE_SECONDS)


def _coarse(extents: list[Extent]) -> list[Extent]:
    """Merged extents that cover these, MAX_EXTENTS at the most: more counts as written then, and is asked once more."""
    extents = ranges.merge(extents)
    unit = READ_BYTES
    while len(extents) > MAX_EXTENTS:
        extents = ranges.widen(extents, unit)
        unit *= 2
    return extents


@dataclass
class _Found:
    """Extents that differ, at most ``room`` of them; ``complete`` is False when there are more."""

    room: int
    extents: list[Extent] = field(default_factory=list)
    complete: bool = True

    def full(self) -> bool:
        """There is no room for more: look no further."""
        return not self.complete

    def add(self, offset: int, length: int) -> None:
        """One more; they come nearly in order."""
        if self.extents and sum(self.extents[-1]) == offset:
            self.extents[-1] = (self.extents[-1][0], self.extents[-1][1] + length)
        else:
            self.extents.append((offset, length))
        if len(self.extents) >= 2 * self.room:
            self.extents = ranges.merge(self.extents)
            self.complete = len(self.extents) < self.room

    def finish(self) -> _Found:
        """Merge, and give up what there is no room for."""
        self.extents = ranges.merge(self.extents)
        self.complete = self.complete and len(self.extents) <= self.room
        del self.extents[self.room :]
        return self


def _compare(
    session: Session,
    pacer: Pacer,
    volume: SourceVolume,
    extents: list[Extent],
    interrupted: Callable[[], bool],
    progress: Callable[[int], None],
    room: int,
) -> _Found:
    """The parts of the extents whose two sides have different digests right now, in whole granules."""
    found = _Found(room)

    def compared(piece: Piece, runs: list[Extent]) -> None:
        for start, length in runs:
            found.add(piece.offset + start, length)
        progress(len(piece.data))

    comparison = Comparison(session, pacer, compared)
    try:
        for extent in extents:
            if found.full():
                break
            for offset, length in ranges.pieces(*extent, BATCH_BYTES):
                if interrupted():
                    # The session goes on with a drain: no answer to us may be taken for one to it.
                    comparison.finish()
                    raise _interrupted()
                if found.full():
                    break
                comparison.put(volume, offset, length)
        comparison.finish()
    finally:
        comparison.close()
    return found.finish()


def _interrupted() -> RefusedError:
    return RefusedError(
        "the comparison was interrupted by a pause, a role change or a handover",
        hint="start it again",
        reason="interrupted",
    )
