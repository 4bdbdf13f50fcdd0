# SPDX-License-Identifier: GPL-3.0-or-later
"""One pass: an ascending walk over everything dirty, claimed and read ahead in a thread, sent in this one; with several
streams, the same once more for each of them, on claims of the same walk.

Promises: only blocks of a claim are read and sent, never a neighbour to fill up an
extent (its content could overtake a newer version that is already under way); a claim counts as sent when the
last of its frames is, held back zeroes included. A pass that is interrupted has sent every claim that it
took completely; one that fails for another reason ends the session, because claims that
it took and did not send are in nobody's hands until the next fence.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass, field
from typing import Callable

from bmigrate.common import faults, ranges
from bmigrate.common.errors import BmigrateError, DefectError
from bmigrate.ship import ledger as ledgers
from bmigrate.ship import zeros
from bmigrate.ship.lane import Lane
from bmigrate.ship.ledger import Ledger
from bmigrate.ship.pacer import Pacer
from bmigrate.ship.readahead import CLAIM_BYTES, Observer, ReadAhead, Run, Walk
from bmigrate.ship.session import Session
from bmigrate.ship.source import SourceVolume
from bmigrate.ship.window import Claim
from bmigrate.wire import frames
from bmigrate.wire.frames import HEADER_BYTES, FrameType

MAX_ZERO_BYTES = 1 << 30
MAX_ZERO_BYTES_DRAIN = 32 << 20
"""A piece of a drain is read back as a whole: not longer than the receiver re-reads at once."""
ZERO_HOLD_SECONDS = 0.5
"""A run that is older is sent with whatever comes next: until then its claims count as lag."""
LANE_BYTES = 2 * CLAIM_BYTES
"""A further stream takes part when there is so much for it: less is sooner durable by the first alone."""


_log = logging.getLogger("ship")


@dataclass
class PassResult:
    """What a pass did. Bytes and seconds; ``complete`` is False when it was interrupted."""

    complete: bool = True
    claims: int = 0
    data_bytes: int = 0
    zero_bytes: int = 0
    seconds: float = 0.0
    limiter: str | None = None


@dataclass
class _Zeroes:
    """A run of zeroes that is kept back because it may go on, with the claims that wait for it."""

    volume: SourceVolume
    offset: int
    length: int
    since: float
    claims: list[Claim] = field(default_factory=list)
    finished: list[Claim] = field(default_factory=list)


class Sender:
    """Puts what was read on the wire: zeroes as ZERO frames, the rest as EXTENTS and DATA.

    Args:
        session, pacer: the open session and its pacing.
        ledger: of a drain: each piece is noted with its digest; what loses its digest is marked dirty again.
        lane: the stream that everything goes to; the first of the session by default.
    """

    def __init__(self, session: Session, pacer: Pacer, ledger: Ledger | None = None, lane: Lane | None = None) -> None:
        self._session = session
        self._pacer = pacer
        self._ledger = ledger
        self._lane = lane or session.lanes[0]
        self._zero: _Zeroes | None = None

    def send(self, volume: SourceVolume, claim: Claim, runs: list[Run]) -> None:
        """Send claimed ranges, ascending. The data is free on return; adjacent zeroes are kept back and merged."""
        self._flush_old()
        parts: list[Run] = []
        for offset, data in runs:
            for part in zeros.split(data):
                if part.zero:
                    self._add_zero(volume, claim, offset + part.offset, part.length)
                else:
                    parts.append((offset + part.offset, data[part.offset : part.offset + part.length]))
        for start in range(0, len(parts), frames.MAX_EXTENTS):
            self._put(volume, claim, parts[start : start + frames.MAX_EXTENTS])

    def finished(self, claim: Claim) -> None:
        """``send`` was called for all of the claim: it goes to the window now, or when its last zeroes are sent."""
        claim.lane = self._lane.number
        if self._zero is not None and claim in self._zero.claims:
            self._zero.finished.append(claim)
        else:
            self._session.sent(claim)
            faults.point("ship.sent")

    def flush(self) -> None:
        """Send the zeroes that were kept back."""
        run, self._zero = self._zero, None
        if run is None:
            return
        largest = MAX_ZERO_BYTES if self._ledger is None else MAX_ZERO_BYTES_DRAIN
        for offset, length in ranges.pieces(run.offset, run.length, largest):
            self._note(run.volume.name, offset, length, None)
            self._session.check()
            self._lane.send(FrameType.ZERO, volume=run.volume.index, offset=offset, aux=length)
        for claim in run.finished:
            self._session.sent(claim)
            faults.point("ship.sent")

    def _flush_old(self) -> None:
        """Send zeroes that were kept back for too long. Data that is rate-limited may follow them for hours."""
        if self._zero is not None and time.monotonic() - self._zero.since > ZERO_HOLD_SECONDS:
            self.flush()

    def _put(self, volume: SourceVolume, claim: Claim, parts: list[Run]) -> None:
        self._flush_old()
        total = sum(len(data) for _, data in parts)
        for offset, data in parts:
            self._note(volume.name, offset, len(data), data)
        if faults.point("ship.payload") == "corrupt":
            offset, data = parts[0]
            parts[0] = (offset, memoryview(bytes([data[0] ^ 0xFF]) + bytes(data[1:])))
        lane, packer, choice = self._lane, self._lane.packer, self._lane.choice
        self._session.check()
        if packer is None:
            self._pacer.before_send(total + HEADER_BYTES, self._session.check)
            began = time.monotonic()
            lane.send_extents(volume.index, parts)
            self._pacer.charge("link", time.monotonic() - began)
        else:
            began = time.monotonic()
            packed = None
            if choice.packing:
                table = frames.encode_extents([(offset, len(data)) for offset, data in parts])
                packed = packer.pack([*(data for _, data in parts), table])
            packing_seconds = time.monotonic() - began
            self._pacer.before_send((total if packed is None else len(packed)) + HEADER_BYTES, self._session.check)
            sending = time.monotonic()
            if packed is None or len(packed) >= total:
                lane.send_extents(volume.index, parts)
            else:
                lane.send_packed(volume.index, len(parts), packed)
            now = time.monotonic()
            self._pacer.charge("link", now - sending)
            choice.spent(total, packing_seconds, now - began)
        claim.data_bytes += total

    def _add_zero(self, volume: SourceVolume, claim: Claim, offset: int, length: int) -> None:
        now = time.monotonic()
        run = self._zero
        if run is not None and (
            run.volume is not volume or run.offset + run.length != offset or run.length >= MAX_ZERO_BYTES
        ):
            self.flush()
            run = None
        if run is None:
            run = self._zero = _Zeroes(volume, offset, 0, now)
        run.length += length
        if not run.claims or run.claims[-1] is not claim:
            run.claims.append(claim)
        claim.zero_bytes += length

    def _note(self, volume: str, offset: int, length: int, data: memoryview | None) -> None:
        if self._ledger is None:
            return
        digest = ledgers.piece_digest(bytes(length) if data is None else data)
        orphans = self._ledger.add(volume, offset, length, digest)
        if orphans:
            self._session.mark(volume, orphans, "drain: shipped again to be proved")


class _Carrier:
    """One lane's part in a pass: sends what its reader has read, claim by claim."""

    def __init__(self, session: Session, pacer: Pacer, walk: Walk, ledger: Ledger | None, lane: Lane) -> None:
        self._session, self._pacer, self._walk = session, pacer, walk
        self._sender = Sender(session, pacer, ledger, lane)
        self.result = PassResult()

    def run(self) -> None:
        """Until the walk is over; what fails ends the session and is raised."""
        ahead = ReadAhead(self._session, self._pacer, self._walk)
        result = self.result
        try:
            for batch in ahead:
                self._sender.send(batch.volume, batch.claim, batch.runs)
                ahead.give_back(batch)
                if batch.last:
                    self._sender.finished(batch.claim)
                    result.claims += 1
                    result.data_bytes += batch.claim.data_bytes
                    result.zero_bytes += batch.claim.zero_bytes
            self._sender.flush()
            self._session.flush()
        except BmigrateError as error:
            self._session.fail(error)
            raise
        except BaseException as exc:
            self._session.fail(DefectError(f"the pass failed: {exc!r}", reason="unexpected"))
            raise
        finally:
            ahead.close()

    def run_beside(self) -> None:
        """``run`` in a thread of its own: whoever began the pass learns of a failure from the session."""
        try:
            self.run()
        except BmigrateError:
            return
        except Exception:
            _log.exception("a stream of workload %s failed", self._session.config.workload)


def run_pass(
    session: Session,
    pacer: Pacer,
    interrupted: Callable[[], bool],
    ledger: Ledger | None = None,
    observer: Observer | None = None,
    left_bytes: int = 0,
) -> PassResult:
    """Walk over everything dirty once. Does not wait for the last acknowledgements.

    Args:
        interrupted: asked before each claim, in the reading thread; what it raises is raised here, after
            everything claimed before was sent.
        ledger: of a drain, or None.
        observer: called with each claim's volume and extents before they are read, in the reading thread.
        left_bytes: about how much is dirty: how many streams are worth while.

    Raises:
        BmigrateError: the session is over, or what ``interrupted`` raised.
    """
    pacer.begin()
    try:
        return _walked(session, pacer, interrupted, ledger, observer, left_bytes)
    finally:
        pacer.end()


def _walked(
    session: Session,
    pacer: Pacer,
    interrupted: Callable[[], bool],
    ledger: Ledger | None,
    observer: Observer | None,
    left_bytes: int,
) -> PassResult:
    result = PassResult()
    began = time.monotonic()
    waited = session.standby_wait_seconds
    walk = Walk(session, interrupted, observer)
    lanes = session.lanes[: max(1, left_bytes // LANE_BYTES)]
    carriers = [_Carrier(session, pacer, walk, ledger, lane) for lane in lanes]
    threads = [
        threading.Thread(target=carrier.run_beside, name=f"{session.config.workload}-send-{number}", daemon=True)
        for number, carrier in enumerate(carriers[1:], 1)
    ]
    for thread in threads:
        thread.start()
    try:
        carriers[0].run()
    finally:
        for thread in threads:
            thread.join()
    session.check()
    if walk.refused is not None:
        raise walk.refused
    for carrier in carriers:
        result.claims += carrier.result.claims
        result.data_bytes += carrier.result.data_bytes
        result.zero_bytes += carrier.result.zero_bytes
    result.complete = walk.complete
    result.seconds = time.monotonic() - began
    pacer.charge("standby", session.standby_wait_seconds - waited)
    result.limiter = pacer.limiter(result.seconds)
    return result
