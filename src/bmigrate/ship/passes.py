# SPDX-License-Identifier: GPL-3.0-or-later
"""One pass: an ascending walk over everything dirty, claimed piece by piece, read and sent.

Promises: only blocks of the claim in hand are read and sent, never a neighbour to fill up an
extent (its content could overtake a newer version that is already under way); each block is read
after it was claimed, so that a write that the read misses makes it dirty again. A pass that is
interrupted has sent every claim that it took completely.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Callable

from bmigrate.common import faults, ranges
from bmigrate.ship import ledger as ledgers
from bmigrate.ship import zeros
from bmigrate.ship.ledger import Ledger
from bmigrate.ship.pacer import Pacer
from bmigrate.ship.session import Session
from bmigrate.ship.source import READ_BYTES, SourceVolume
from bmigrate.ship.window import Claim
from bmigrate.wire.frames import HEADER_BYTES, FrameType

CLAIM_BYTES = 2 << 20
MAX_ZERO_BYTES = 32 << 20
Observer = Callable[[str, list[tuple[int, int]]], None]


@dataclass
class PassResult:
    """What a pass did. Bytes and seconds; ``complete`` is False when it was interrupted."""

    complete: bool = True
    claims: int = 0
    data_bytes: int = 0
    zero_bytes: int = 0
    seconds: float = 0.0
    limiter: str | None = None


class Sender:
    """Puts what was read on the wire: zeroes as ZERO frames, the rest as DATA.

    Args:
        session, pacer: the open session and its pacing.
        ledger: of a drain: each piece is noted with its digest; what loses its digest is marked dirty again.
    """

    def __init__(self, session: Session, pacer: Pacer, ledger: Ledger | None = None) -> None:
        self._session = session
        self._pacer = pacer
        self._ledger = ledger
        self._zero: tuple[SourceVolume, Claim, int, int] | None = None

    def put(self, volume: SourceVolume, claim: Claim, offset: int, data: bytes) -> None:
        """Send the bytes of a claimed range. Adjacent zeroes are kept back and merged: call ``flush`` at the end."""
        for part in zeros.split(data):
            if part.zero:
                self._add_zero(volume, claim, offset + part.offset, part.length)
                continue
            self.flush()
            payload = data if part.length == len(data) else data[part.offset : part.offset + part.length]
            self._note(volume.name, offset + part.offset, part.length, payload)
            if faults.point("ship.payload") == "corrupt":
                payload = bytes([payload[0] ^ 0xFF]) + payload[1:]
            self._pacer.before_send(part.length + HEADER_BYTES)
            began = time.monotonic()
            self._session.send(FrameType.DATA, volume=volume.index, offset=offset + part.offset, payload=payload)
            self._pacer.charge("link", time.monotonic() - began)
            claim.data_bytes += part.length

    def _add_zero(self, volume: SourceVolume, claim: Claim, offset: int, length: int) -> None:
        if self._zero is not None:
            held_volume, held_claim, held_offset, held_length = self._zero
            if held_volume is volume and held_claim is claim and held_offset + held_length == offset:
                self._zero = (volume, claim, held_offset, held_length + length)
                return
            self.flush()
        self._zero = (volume, claim, offset, length)

    def flush(self) -> None:
        """Send the zeroes that were kept back."""
        if self._zero is None:
            return
        volume, claim, offset, length = self._zero
        self._zero = None
        for piece_offset, piece_length in ranges.pieces(offset, length, MAX_ZERO_BYTES):
            self._note(volume.name, piece_offset, piece_length, None)
            self._session.send(FrameType.ZERO, volume=volume.index, offset=piece_offset, aux=piece_length)
        claim.zero_bytes += length

    def _note(self, volume: str, offset: int, length: int, data: bytes | None) -> None:
        if self._ledger is None:
            return
        digest = ledgers.piece_digest(bytes(length) if data is None else data)
        orphans = self._ledger.add(volume, offset, length, digest)
        if orphans:
            self._session.mark(volume, orphans, "drain: shipped again to be proved")


def run_pass(
    session: Session,
    pacer: Pacer,
    interrupted: Callable[[], bool],
    ledger: Ledger | None = None,
    observer: Observer | None = None,
) -> PassResult:
    """Walk over everything dirty once. Does not wait for the last acknowledgements.

    Args:
        interrupted: asked before each claim.
        ledger: of a drain, or None.
        observer: called with each claim's volume and extents before they are read.

    Raises:
        BmigrateError: the session is over.
    """
    result = PassResult()
    sender = Sender(session, pacer, ledger)
    began = time.monotonic()
    waited = session.standby_wait_seconds
    pacer.begin()
    for volume in session.volumes:
        offset = 0
        while offset < volume.size_bytes:
            if interrupted():
                result.complete = False
                break
            read_before = pacer.spent["source_read"]
            claim = session.claim(volume, offset, CLAIM_BYTES)
            if claim is None:
                break
            if observer is not None:
                observer(volume.name, claim.extents)
            _ship(session, pacer, sender, volume, claim)
            offset = claim.next_offset
            result.claims += 1
            result.data_bytes += claim.data_bytes
            result.zero_bytes += claim.zero_bytes
            pacer.rest(pacer.spent["source_read"] - read_before)
    session.flush()
    result.seconds = time.monotonic() - began
    pacer.charge("standby", session.standby_wait_seconds - waited)
    result.limiter = pacer.limiter(result.seconds)
    return result


def _ship(session: Session, pacer: Pacer, sender: Sender, volume: SourceVolume, claim: Claim) -> None:
    """Read and send all of one claim, then hand it to the window."""
    for offset, length in claim.extents:
        for piece_offset, piece_length in ranges.pieces(offset, length, READ_BYTES):
            began = time.monotonic()
            data = volume.read(piece_offset, piece_length)
            pacer.charge("source_read", time.monotonic() - began)
            faults.point("ship.read")
            sender.put(volume, claim, piece_offset, data)
    sender.flush()
    session.sent(claim)
    faults.point("ship.sent")
