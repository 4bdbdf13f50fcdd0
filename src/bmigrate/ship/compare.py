# SPDX-License-Identifier: GPL-3.0-or-later
"""Comparing ranges of a volume with the standby's by digests: read, hashed on both ends, and asked for, all overlapped.

The hash is the session's (wire/hashing.py), with 128 bits. A range is at first asked for as one digest for each
READ_BYTES, which costs least while most is equal; what differs, or all where much has differed of late, is asked for
granule by granule. A few threads read and hash, and the standby is asked when a range is put: both ends
read at once, and the device has the next read waiting when one is done.

Promises: a range is read from the device once, after it was put and never before, and what is handed out is what was
hashed; it is called equal only by digests of 128 bits. Memory is bounded: UNDER_WAY buffers of BATCH_BYTES. Answers of
the standby arrive in the order of the requests; ranges may come out in another order than they were put in.
"""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Callable

from bmigrate.common import ranges
from bmigrate.common.errors import BmigrateError
from bmigrate.ship.pacer import Pacer
from bmigrate.ship.session import Session
from bmigrate.ship.source import READ_BYTES, SourceVolume
from bmigrate.wire import frames, hashing
from bmigrate.wire.frames import FrameType

BATCH_BYTES = 4 << 20
"""Read and asked for at once: what a frame, a wake-up of five processes and a read cost is shared by so much."""
UNDER_WAY = 6
MAX_WORKERS = 4
"""That read or hash; one more than there are processors, so that one of them may wait for the device."""
FINE_SHARE = 0.25
"""Of the last READ_BYTES, weighted: when more than that differed, granules are asked for at once."""
_MEMORY = 1 / 8


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
    """At most READ_BYTES that were compared: the place on the volume, the data, and what the caller attached to it."""

    volume: SourceVolume
    offset: int
    data: memoryview
    tag: Any


@dataclass
class _Batch:
    """A range in its buffer, and what the standby was asked for: all of it, or, ``again``, ``start`` to ``end``."""

    volume: SourceVolume
    offset: int
    data: memoryview
    tag: Any
    buffer: memoryview
    start: int
    end: int
    chunk_bytes: int
    again: bool = False
    own: Future[bytes] | None = None


class Comparison:
    """Compares ranges. ``put`` them, ``finish``, and ``close`` in any case.

    Args:
        compared: called with each piece and the (offset, length) within it that differ, in whole granules; in the
            caller's thread, from ``put`` and ``finish``. The data is valid until it returns.

    Raises (put, finish):
        BmigrateError: the session is over; also when a read failed, because answers are left that nobody takes.
    """

    def __init__(
        self, session: Session, pacer: Pacer, compared: Callable[[Piece, list[tuple[int, int]]], None]
    ) -> None:
        self._session = session
        self._pacer = pacer
        self._compared = compared
        self._pool = ThreadPoolExecutor(min(MAX_WORKERS, 1 + (os.cpu_count() or 1)), "compare")
        self._turn = threading.Lock()
        self._free = [memoryview(mmap.mmap(-1, BATCH_BYTES)) for _ in range(UNDER_WAY)]
        self._under_way: deque[_Batch] = deque()
        self._differed = 0.0

    def put(self, volume: SourceVolume, offset: int, length: int, tag: Any = None) -> None:
        """Have a range compared, of at most BATCH_BYTES, whole granules but for the volume's end."""
        while not self._free:
            self._oldest()
        buffer = self._free.pop()
        granule = volume.granule_bytes
        chunk = granule if self._differed > FINE_SHARE else max(READ_BYTES, granule)
        batch = _Batch(volume, offset, buffer[:length], tag, buffer, 0, length, chunk)
        self._ask(batch, self._read_and_hash)

    def finish(self) -> None:
        """Wait for everything that was put."""
        while self._under_way:
            self._oldest()

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    # -- the threads that read and hash ------------------------------------------------------------

    def _read_and_hash(self, batch: _Batch) -> bytes:
        try:
            self._pacer.enter()
            if self._pacer.polite:
                # The foreground comes first: one read at a time, short ones, with rests between them.
                with self._turn:
                    step = self._pacer.read_bytes(batch.volume.number)
                    for at in range(0, len(batch.data), step):
                        view = batch.data[at : at + step]
                        seconds = self._read(batch.volume, view, batch.offset + at)
                        self._pacer.rest(batch.volume.number, len(view), seconds)
            else:
                seconds = self._read(batch.volume, batch.data, batch.offset)
                with self._turn:  # the pacer's books are kept by one thread at a time
                    self._pacer.rest(batch.volume.number, len(batch.data), seconds)
        except BmigrateError as error:
            self._session.fail(error)
            raise
        return self._hash(batch)

    def _read(self, volume: SourceVolume, view: memoryview, offset: int) -> float:
        began = time.monotonic()
        volume.read_into(view, offset)
        return time.monotonic() - began

    def _hash(self, batch: _Batch) -> bytes:
        return hashing.digests(self._session.hash, batch.data[batch.start : batch.end], batch.chunk_bytes)

    # -- the caller's thread -----------------------------------------------------------------------

    def _ask(self, batch: _Batch, here: Callable[[_Batch], bytes]) -> None:
        """Ask the standby, and have the same done ``here`` beside it."""
        length = batch.end - batch.start
        self._session.request(
            FrameType.HASH,
            FrameType.HASHES,
            frames.chunk_count(length, batch.chunk_bytes),
            volume=batch.volume.index,
            offset=batch.offset + batch.start,
            aux=length,
            payload=frames.encode_chunk(batch.chunk_bytes),
        )
        batch.own = self._pool.submit(here, batch)
        self._under_way.append(batch)

    def _oldest(self) -> None:
        batch = self._under_way.popleft()
        assert batch.own is not None
        began = time.monotonic()
        own = batch.own.result()
        here = time.monotonic()
        other = self._session.answer()
        self._pacer.charge("source_read", here - began)
        self._pacer.charge("standby", time.monotonic() - here)
        granule, length = batch.volume.granule_bytes, batch.end - batch.start
        runs = differing(own, other, length, batch.chunk_bytes)
        if not batch.again:
            self._remember(runs, length)
            if runs and batch.chunk_bytes > granule:
                # What the runs leave out within their bounds is compared once more: one request, whatever the runs are.
                batch.start, batch.end = runs[0][0], runs[-1][0] + runs[-1][1]
                batch.chunk_bytes, batch.again = granule, True
                self._ask(batch, self._hash)
                return
        try:
            self._hand_out(batch, [(batch.start + start, count) for start, count in runs])
        finally:
            self._free.append(batch.buffer)

    def _remember(self, runs: list[tuple[int, int]], length: int) -> None:
        """Note for each READ_BYTES of a range whether it differed."""
        for at in range(0, length, READ_BYTES):
            hit = any(start < at + READ_BYTES and at < start + count for start, count in runs)
            self._differed += (hit - self._differed) * _MEMORY

    def _hand_out(self, batch: _Batch, runs: list[tuple[int, int]]) -> None:
        for at in range(0, len(batch.data), READ_BYTES):
            data = batch.data[at : at + READ_BYTES]
            within = [
                (max(start, at) - at, min(start + count, at + len(data)) - max(start, at))
                for start, count in runs
                if start < at + len(data) and at < start + count
            ]
            self._compared(Piece(batch.volume, batch.offset + at, data, batch.tag), within)
