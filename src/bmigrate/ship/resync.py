# SPDX-License-Identifier: GPL-3.0-or-later
"""Resync of a suspect volume: every block is compared by checksum, and only what differs is sent.

How: the whole volume is marked dirty, then walked like in a pass, but each claim is compared
before it is sent: our own O_DIRECT read of the claimed blocks against the digests (128
bits, one per granule where anything differs) of the standby's own direct read. Equal granules are not sent. Then the
claim goes the way of every claim: SYNC, durable acknowledgement, cleared.

Why a write during the comparison is safe. (1) A block is read after it was claimed: a write that the read
misses completes later, is recorded later, and makes the block dirty again, whatever the comparison
says. (2) Frames are handled in the order in which they were sent: the standby computes the digest after all
data that this session sent before, and no older receiver lives (the fence). (3) Nothing that was read earlier
is sent after a newer read of the same block: a pass visits a block once, and the comparisons under way
are finished before the next pass begins. So "equal" means that the replica's block is what we read
after the claim, and everything newer is dirty.

Why "equal" may be acknowledged. The standby's block may sit in a volatile cache, written by a
receiver that was killed before its flush, and breceive flushes only volumes that this session wrote
to. So the first granule of each resynced volume is always sent: the flush before the
acknowledgement then covers the whole device.

A volume stays suspect, on both sides, until all of it was compared: the standby clears its note
first, then breqd; a death in between or before finds at least one of them.

Why it may go on after its session has ended. Since the mark of everything, a block became clean only by an
acknowledgement, of a comparison or of its data; what was under way is dirty again after the fence. So what is clean is
proved, and what is dirty is what is left, with whatever was written since. breqd says whether that is still so: it is
the same daemon, and no suspicion came up. The standby must not be suspect itself: then nobody watches whether others
write to it between two sessions, and everything is compared again. The first granule is sent again, for the same
reason as in the beginning.
"""

from __future__ import annotations

from typing import Callable

from bmigrate.common import faults, ranges
from bmigrate.common.errors import DefectError, RefusedError
from bmigrate.ship.compare import BATCH_BYTES, Comparison, Piece
from bmigrate.ship.pacer import Pacer
from bmigrate.ship.passes import Sender
from bmigrate.ship.readahead import CLAIM_BYTES
from bmigrate.ship.session import Session
from bmigrate.ship.source import READ_BYTES, SourceVolume
from bmigrate.ship.window import Claim
from bmigrate.wire.frames import FrameType

SAME_CLAIM_BYTES = 16 << 20
"""Claimed at once while nothing differs: fewer questions to breqd. Else as much as in a pass: who interrupts the resync
waits until what was claimed is sent."""


class _Pending:
    """A claim of which pieces are being compared."""

    def __init__(self, claim: Claim, pieces: int) -> None:
        self.claim, self.pieces = claim, pieces


class Resync:
    """Resync of one volume in an open session.

    Args:
        interrupted: asked before each claim; the volume stays suspect then.
        progress: called with each amount of bytes compared. already: with what an earlier session had compared.
        resume: the id of a resync of this volume whose session has ended, or None. begun: told the id of this one.
    """

    def __init__(
        self,
        session: Session,
        pacer: Pacer,
        volume: SourceVolume,
        interrupted: Callable[[], bool],
        progress: Callable[[int], None],
        already: Callable[[int], None] = lambda count: None,
        resume: str | None = None,
        begun: Callable[[str], None] = lambda identifier: None,
    ) -> None:
        self._already, self._resume, self._begun = already, resume, begun
        self._expected_bytes = volume.size_bytes
        self._session = session
        self._pacer = pacer
        self._volume = volume
        self._interrupted = interrupted
        self._progress = progress
        self._sender = Sender(session, pacer)
        self._compared_bytes = 0
        self._claim_bytes = CLAIM_BYTES
        self.different_bytes = 0

    def run(self) -> None:
        """Compare everything, ship what differs, and clear the suspicion on both sides.

        Raises:
            RefusedError: reason ``interrupted``.
            BmigrateError: the session is over.
        """
        self._pacer.begin()
        try:
            self._run()
        finally:
            self._pacer.end()

    def _run(self) -> None:
        session, name = self._session, self._volume.name
        # What an earlier claim of this session has under way must be durable before the same blocks are
        # claimed and compared: breqd hands out no block twice, and the walk below must not miss one.
        session.settle()
        resume = None if name in session.standby_suspects else self._resume
        resync_id, resumed = session.breqd(lambda tracker: tracker.resync_begin(name, resume))
        self._begun(resync_id)
        # The id is of the attachment that breqd has now, and is good for nothing once there is another. It must be the
        # one of which this session knows path and size.
        session.snapshot()
        size = self._volume.size_bytes
        if resumed:
            session.mark(name, [(0, min(self._volume.granule_bytes, size))], "resync, continued")
            self._expected_bytes = session.snapshot().volumes[name].dirty_bytes
            self._already(size - self._expected_bytes)
        else:
            session.mark(name, [(0, size)], "resync")
        self._walk()
        session.settle()
        faults.point("ship.resync_compared")
        session.request(FrameType.RESYNC_DONE, FrameType.RESYNC_DONE, 0, volume=self._volume.index)
        session.answer()
        faults.point("ship.resync_done")
        session.standby_suspects.pop(name, None)
        session.breqd(lambda tracker: tracker.resync_end(name, resync_id))

    def _walk(self) -> None:
        comparison = Comparison(self._session, self._pacer, self._compared)
        try:
            offset = 0
            while offset < self._volume.size_bytes:
                if self._interrupted():
                    # Every answer that was asked for is taken, and every claim sent: the session may go on.
                    comparison.finish()
                    self._sender.flush()
                    raise RefusedError("the resync was interrupted", volume=self._volume.name, reason="interrupted")
                claim = self._session.claim(self._volume, offset, self._claim_bytes)
                if claim is None:
                    break
                self._pacer.enter()
                batches = [piece for extent in claim.extents for piece in ranges.pieces(*extent, BATCH_BYTES)]
                pending = _Pending(claim, sum(-(-length // READ_BYTES) for _, length in batches))
                for start, length in batches:
                    comparison.put(self._volume, start, length, pending)
                offset = claim.next_offset
            comparison.finish()
        finally:
            comparison.close()
        self._sender.flush()
        if self._compared_bytes < self._expected_bytes:
            # Whatever kept blocks from being claimed: what was not compared is not proved.
            raise DefectError(
                f"the resync compared {self._compared_bytes} of {self._expected_bytes} bytes",
                volume=self._volume.name,
                hint="the volume stays suspect and is compared again",
                reason="incomplete",
            )

    def _compared(self, piece: Piece, runs: list[tuple[int, int]]) -> None:
        pending: _Pending = piece.tag
        granule = self._volume.granule_bytes
        self.different_bytes += ranges.total(runs)
        if piece.offset == 0:
            runs = ranges.merge([*runs, (0, min(granule, len(piece.data)))])
        self._sender.send(
            self._volume,
            pending.claim,
            [(piece.offset + start, piece.data[start : start + length]) for start, length in runs],
        )
        self._compared_bytes += len(piece.data)
        self._progress(len(piece.data))
        pending.pieces -= 1
        if not pending.pieces:
            claim = pending.claim
            claim.same_bytes = claim.total_bytes - claim.data_bytes - claim.zero_bytes
            self._claim_bytes = SAME_CLAIM_BYTES if claim.same_bytes == claim.total_bytes else CLAIM_BYTES
            self._sender.finished(claim)
