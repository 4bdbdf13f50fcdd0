# SPDX-License-Identifier: GPL-3.0-or-later
"""Verify: compare the replica with the running source by checksum, and report what really differs.

A live volume always differs from its replica where it was just written; that is not damage. So a
mismatch is only a candidate. A round re-reads both sides of each candidate, then passes a barrier,
and then ships everything dirty: a candidate that was dirty is explained and gets another round; one
that differed although it was neither dirty nor claimed is counted against it. What was found
different so in ROUNDS rounds in a row is reported: an uncompleted write (on the medium, not yet
recorded) explains one such round, not three.

Promises: it marks nothing and repairs nothing by itself; what it reports was seen with 128-bit digests.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Callable

from bmigrate.common import ranges
from bmigrate.common.errors import RefusedError
from bmigrate.ship.compare import BATCH_BYTES, Comparison, Piece
from bmigrate.ship.pacer import Pacer
from bmigrate.ship.passes import run_pass
from bmigrate.ship.session import Session
from bmigrate.ship.source import SourceVolume

ROUNDS = 3
MAX_ROUNDS = 12
MAX_LISTED = 256
Extent = tuple[int, int]


@dataclass
class Outcome:
    """What a verify found. Bytes; extents by volume.

    Attributes:
        different: proved to differ. busy: still explained by writes when the rounds were used up.
    """

    compared_bytes: int = 0
    different: dict[str, list[Extent]] = field(default_factory=dict)
    busy_bytes: int = 0
    rounds: int = 0

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
        }


def verify(session: Session, pacer: Pacer, interrupted: Callable[[], bool], progress: Callable[[int], None]) -> Outcome:
    """Compare every block of every volume of the session.

    Args:
        interrupted: asked now and then. progress: called with each amount of bytes compared.

    Raises:
        RefusedError: reason ``interrupted``.
        BmigrateError: the session is over.
    """
    outcome = Outcome()
    candidates: dict[str, set[int]] = {}
    pacer.begin()
    for volume in session.volumes:
        found = _compare(session, pacer, volume, [(0, volume.size_bytes)], interrupted, progress)
        outcome.compared_bytes += volume.size_bytes
        if found:
            candidates[volume.name] = found
    votes: dict[tuple[str, int], int] = {}
    while candidates and outcome.rounds < MAX_ROUNDS:
        outcome.rounds += 1
        candidates = _round(session, pacer, candidates, votes, interrupted)
        if all(votes[name, block] >= ROUNDS for name, blocks in candidates.items() for block in blocks):
            break
    for volume in session.volumes:
        blocks = candidates.get(volume.name, set())
        proved = [block for block in blocks if votes.get((volume.name, block), 0) >= ROUNDS]
        if proved:
            outcome.different[volume.name] = _extents(volume, proved)
        outcome.busy_bytes += ranges.total(_extents(volume, [block for block in blocks if block not in set(proved)]))
    return outcome


def _round(
    session: Session,
    pacer: Pacer,
    candidates: dict[str, set[int]],
    votes: dict[tuple[str, int], int],
    interrupted: Callable[[], bool],
) -> dict[str, set[int]]:
    """Compare the candidates again, then learn which of them were dirty by shipping everything dirty."""
    # Nothing may be claimed while we look: breqd gives out no block that is claimed already, so a block that
    # was written again while claimed would look clean below.
    session.settle()
    remaining: dict[str, set[int]] = {}
    for volume in session.volumes:
        if volume.name in candidates:
            extents = _extents(volume, candidates[volume.name])
            remaining[volume.name] = _compare(session, pacer, volume, extents, interrupted, lambda count: None)
    session.barrier()
    dirty: dict[str, list[Extent]] = {}

    def note(name: str, extents: list[Extent]) -> None:
        dirty.setdefault(name, []).extend(extents)

    result = run_pass(session, pacer, interrupted, observer=note)
    if not result.complete:
        raise _interrupted()
    session.settle()
    for volume in session.volumes:
        written = {
            block
            for offset, length in dirty.get(volume.name, [])
            for block in range(offset // volume.granule_bytes, -(-(offset + length) // volume.granule_bytes))
        }
        for block in remaining.get(volume.name, set()):
            votes[volume.name, block] = 0 if block in written else votes.get((volume.name, block), 0) + 1
    return {name: blocks for name, blocks in remaining.items() if blocks}


def _extents(volume: SourceVolume, blocks: set[int] | list[int]) -> list[Extent]:
    """Granule numbers as byte extents clipped to the volume."""
    size = volume.granule_bytes
    return ranges.merge((block * size, min(size, volume.size_bytes - block * size)) for block in blocks)


def _compare(
    session: Session,
    pacer: Pacer,
    volume: SourceVolume,
    extents: list[Extent],
    interrupted: Callable[[], bool],
    progress: Callable[[int], None],
) -> set[int]:
    """Numbers of the granules of the extents whose two sides have different digests right now."""
    found: set[int] = set()

    def compared(piece: Piece, runs: list[Extent]) -> None:
        for start, length in runs:
            first = (piece.offset + start) // volume.granule_bytes
            found.update(range(first, first + -(-length // volume.granule_bytes)))
        progress(len(piece.data))

    comparison = Comparison(session, pacer, compared)
    try:
        for extent in extents:
            for offset, length in ranges.pieces(*extent, BATCH_BYTES):
                if interrupted():
                    # The session goes on with a drain: no answer to us may be taken for one to it.
                    comparison.finish()
                    raise _interrupted()
                comparison.put(volume, offset, length)
        comparison.finish()
    finally:
        comparison.close()
    return found


def _interrupted() -> RefusedError:
    return RefusedError(
        "the comparison was interrupted by a pause, a role change or a handover",
        hint="start it again",
        reason="interrupted",
    )
