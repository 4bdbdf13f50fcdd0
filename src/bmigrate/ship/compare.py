# SPDX-License-Identifier: GPL-3.0-or-later
"""Comparing ranges of a volume with the standby's by digests: read, hashed on both ends, and asked for, all overlapped.

The hash is the session's (wire/hashing.py), with 128 bits. A range is at first asked for as one digest for each
READ_BYTES, which costs least while most is equal; what differs, or all where much has differed of late, is asked for
granule by granule. The standby is asked before the range is read here, so that both ends read at once.

Promises: a range is read from the device once, while it is put and never before, and what is handed out is what was
hashed; it is called equal only by digests of 128 bits. Memory is bounded: UNDER_WAY buffers of BATCH_BYTES. Answers of
the standby arrive in the order of the requests; ranges may come out in another order than they were put in.
"""

from __future__ import annotations

import mmap
import os
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
UNDER_WAY = 4
MAX_WORKERS = 4
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
        self._pool = ThreadPoolExecutor(min(MAX_WORKERS, os.cpu_count() or 1), "hash")
        self._free = [memoryview(mmap.mmap(-1, BATCH_BYTES)) for _ in range(UNDER_WAY)]
        self._under_way: deque[_Batch] = deque()
        self._differed = 0.0

    def put(self, volume: SourceVolume, offset: int, length: int, tag: Any = None) -> None:
        """Read a range of at most BATCH_BYTES, whole granules but for the volume's end, and have it compared."""
        while not self._free:
            self._oldest()
        buffer = self._free.pop()
        granule = volume.granule_bytes
        chunk = granule if self._differed > FINE_SHARE else max(READ_BYTES, granule)
        batch = _Batch(volume, offset, buffer[:length], tag, buffer, 0, length, chunk)
        self._ask(batch)
        self._read(batch)
        self._hash(batch)

    def finish(self) -> None:
        """Wait for everything that was put."""
        while self._under_way:
            self._oldest()

    def close(self) -> None:
        """End the hashing threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _read(self, batch: _Batch) -> None:
        """All at once; shorter reads with rests between them while the foreground comes first."""
        volume, length = batch.volume, len(batch.data)
        step = self._pacer.read_bytes(volume.number) if self._pacer.polite else length
        for at in range(0, length, step):
            view = batch.data[at : at + step]
            began = time.monotonic()
            try:
                volume.read_into(view, batch.offset + at)
            except BmigrateError as error:
                self._session.fail(error)
                raise
            spent = time.monotonic() - began
            self._pacer.charge("source_read", spent)
            self._pacer.rest(volume.number, len(view), spent)

    def _ask(self, batch: _Batch) -> None:
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
        self._under_way.append(batch)

    def _hash(self, batch: _Batch) -> None:
        data = batch.data[batch.start : batch.end]
        batch.own = self._pool.submit(hashing.digests, self._session.hash, data, batch.chunk_bytes)

    def _oldest(self) -> None:
        batch = self._under_way.popleft()
        began = time.monotonic()
        other = self._session.answer()
        self._pacer.charge("standby", time.monotonic() - began)
        assert batch.own is not None
        own = batch.own.result()
        granule, length = batch.volume.granule_bytes, batch.end - batch.start
        runs = differing(own, other, length, batch.chunk_bytes)
        if not batch.again:
            self._remember(runs, length)
            if runs and batch.chunk_bytes > granule:
                # What the runs leave out within their bounds is compared once more: one request, whatever the runs are.
                batch.start, batch.end = runs[0][0], runs[-1][0] + runs[-1][1]
                batch.chunk_bytes, batch.again = granule, True
                self._ask(batch)
                self._hash(batch)
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
