# SPDX-License-Identifier: GPL-3.0-or-later
"""Comparing ranges of a volume with the standby's by digests: read, hashed on both ends, and asked for, all overlapped.

The hash is BLAKE2b with 128 bits (RFC 7693). A piece is at first asked for as one digest, which costs least while
most is equal; where that differs, or where much has differed of late, each granule is asked for.

Promises: a piece is read from the device once, when it is put, and what is handed out is what was hashed; it is called
equal only by digests of 128 bits. Memory is bounded: PIECES buffers of READ_BYTES. Answers of the standby arrive in the
order of the requests; pieces may come out in another order than they were put in.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Callable

from bmigrate.common import ranges
from bmigrate.ship.pacer import Pacer
from bmigrate.ship.session import Session
from bmigrate.ship.source import READ_BYTES, SourceVolume
from bmigrate.wire import frames
from bmigrate.wire.frames import FrameType

PIECES = 12
UNDER_WAY = 8
MAX_WORKERS = 4
FINE_SHARE = 0.25
"""Of the last pieces, weighted: when more than that differed, granules are asked for at once."""
_MEMORY = 1 / 8


def digests(data: memoryview | bytes, chunk_bytes: int) -> bytes:
    """16-byte BLAKE2b digests of each chunk, concatenated, as in a HASHES frame."""
    view = memoryview(data)
    return b"".join(
        hashlib.blake2b(view[start : start + chunk_bytes], digest_size=frames.HASH_DIGEST_BYTES).digest()
        for start in range(0, len(view), chunk_bytes)
    )


def differing(own: bytes, other: bytes, length: int, chunk_bytes: int) -> list[tuple[int, int]]:
    """(offset, length) of the runs of chunks whose digests differ, relative to the piece.

    Args:
        own, other: concatenated digests of the same range. length: of the range in bytes.
    """
    size = frames.HASH_DIGEST_BYTES
    if own == other:
        return []
    return ranges.merge(
        (at * chunk_bytes, min(chunk_bytes, length - at * chunk_bytes))
        for at in range(len(own) // size)
        if own[at * size : at * size + size] != other[at * size : at * size + size]
    )


@dataclass
class Piece:
    """A range that was read: its place on the volume, the data, and what the caller attached to it."""

    volume: SourceVolume
    offset: int
    data: memoryview
    tag: Any


class Comparison:
    """Compares pieces. ``put`` them, ``finish``, and ``close`` in any case.

    Args:
        compared: called with each piece and the (offset, length) within it that differ, in whole granules; in the
            caller's thread, from ``put`` and ``finish``. The data is valid until it returns.

    Raises (put, finish):
        BmigrateError: the session is over, or a read failed.
    """

    def __init__(
        self, session: Session, pacer: Pacer, compared: Callable[[Piece, list[tuple[int, int]]], None]
    ) -> None:
        self._session = session
        self._pacer = pacer
        self._compared = compared
        self._pool = ThreadPoolExecutor(min(MAX_WORKERS, os.cpu_count() or 1), "hash")
        self._free = [memoryview(mmap.mmap(-1, READ_BYTES)) for _ in range(PIECES)]
        self._under_way: deque[tuple[Piece, memoryview, int, Future[bytes]]] = deque()
        self._differed = 0.0

    def put(self, volume: SourceVolume, offset: int, length: int, tag: Any = None) -> None:
        """Read a range of at most READ_BYTES and have it compared."""
        while not self._free or len(self._under_way) >= UNDER_WAY:
            self._oldest()
        buffer = self._free.pop()
        data = buffer[:length]
        began = time.monotonic()
        volume.read_into(data, offset)
        spent = time.monotonic() - began
        self._pacer.charge("source_read", spent)
        self._pacer.rest(volume.number, length, spent)
        chunk = volume.granule_bytes if self._differed > FINE_SHARE else READ_BYTES
        self._ask(Piece(volume, offset, data, tag), buffer, max(chunk, volume.granule_bytes))

    def finish(self) -> None:
        """Wait for everything that was put."""
        while self._under_way:
            self._oldest()

    def close(self) -> None:
        """End the hashing threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _ask(self, piece: Piece, buffer: memoryview, chunk_bytes: int) -> None:
        self._session.request(
            FrameType.HASH,
            FrameType.HASHES,
            frames.chunk_count(len(piece.data), chunk_bytes),
            volume=piece.volume.index,
            offset=piece.offset,
            aux=len(piece.data),
            payload=frames.encode_chunk(chunk_bytes),
        )
        own = self._pool.submit(digests, piece.data, chunk_bytes)
        self._under_way.append((piece, buffer, chunk_bytes, own))

    def _oldest(self) -> None:
        piece, buffer, chunk_bytes, future = self._under_way.popleft()
        began = time.monotonic()
        other = self._session.answer()
        self._pacer.charge("standby", time.monotonic() - began)
        own = future.result()
        granule = piece.volume.granule_bytes
        if chunk_bytes > granule:
            self._differed += ((own != other) - self._differed) * _MEMORY
            if own != other:
                self._ask(piece, buffer, granule)
                return
            runs = []
        else:
            runs = differing(own, other, len(piece.data), granule)
            self._differed += (bool(runs) - self._differed) * _MEMORY
        try:
            self._compared(piece, runs)
        finally:
            self._free.append(buffer)
