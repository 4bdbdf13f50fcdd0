# SPDX-License-Identifier: GPL-3.0-or-later
"""Answers HASH beside the writes: the caller's thread reads, a few threads hash, one sends the answers in order.

Promises: what is hashed was read when the frame was handled, so a write that follows the frame is not in it, and one
before it is; answers leave in the order of the requests. Memory is bounded: BUFFERS buffers of BUFFER_BYTES and
MAX_OPEN answers; who asks for more waits. The first failure ends the session.
"""

from __future__ import annotations

import logging
import mmap
import os
import queue
import threading
from concurrent.futures import Future, ThreadPoolExecutor

from bmigrate.common.errors import BmigrateError, DefectError
from bmigrate.receive.link import Link
from bmigrate.receive.volumes import StandbyVolume
from bmigrate.wire import hashing
from bmigrate.wire.frames import FrameType

BUFFERS = 6
BUFFER_BYTES = 4 << 20
"""Read at once: whole chunks, because it is a multiple of the largest chunk that framing lets through."""
MAX_WORKERS = 4
MAX_OPEN = 64
log = logging.getLogger("breceive")


class _Answer:
    """One HASHES frame in the making."""

    def __init__(self, volume: int, offset: int, length: int) -> None:
        self.volume, self.offset, self.length = volume, offset, length
        self.parts: queue.SimpleQueue[Future[bytes] | None] = queue.SimpleQueue()
        self.whole = False


class Hasher:
    """The threads that hash and answer. ``stop`` when the session ends.

    Args:
        link: the answers leave through it, and a failure is reported through it. hash_name: of the session.
    """

    def __init__(self, link: Link, hash_name: str = hashing.BLAKE2B) -> None:
        self._link = link
        self._hash_name = hash_name
        self._pool: ThreadPoolExecutor | None = None
        self._free: queue.SimpleQueue[memoryview] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[_Answer | None] = queue.SimpleQueue()
        self._cond = threading.Condition()
        self._open = 0
        self._failed = False
        self._thread = threading.Thread(target=self._run, name="hasher", daemon=True)

    def _start(self) -> ThreadPoolExecutor:
        """Only a session that compares anything needs threads and buffers."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(min(MAX_WORKERS, os.cpu_count() or 1), "hash")
            for _ in range(BUFFERS):
                self._free.put(memoryview(mmap.mmap(-1, BUFFER_BYTES)))
            self._thread.start()
        return self._pool

    def hash(self, volume: StandbyVolume, index: int, offset: int, length: int, chunk_bytes: int) -> None:
        """Read a range and have its digests sent, one per chunk. Returns when all of it is read.

        Raises:
            RefusedError: out of bounds, or the device failed.
        """
        volume.check("HASH", offset, length)
        pool = self._start()
        answer = _Answer(index, offset, length)
        with self._cond:
            # An answer that the sender does not take is kept, and digests of 64 MiB may be 256 KiB.
            while self._open >= MAX_OPEN and not self._failed:
                if not self._cond.wait(1.0):
                    self._link.keep_alive()
            self._open += 1
        self._answers.put(answer)
        end = offset + length
        try:
            while offset < end:
                step = min(BUFFER_BYTES, end - offset)
                buffer = self._buffer()
                view = volume.read_into(buffer[:step], offset)
                answer.parts.put(pool.submit(self._digests, buffer, view, chunk_bytes))
                offset += step
            answer.whole = True
        finally:
            answer.parts.put(None)

    def _buffer(self) -> memoryview:
        while True:
            try:
                return self._free.get(timeout=1.0)
            except queue.Empty:
                self._link.keep_alive()

    def _digests(self, buffer: memoryview, view: memoryview, chunk_bytes: int) -> bytes:
        try:
            return hashing.digests(self._hash_name, view, chunk_bytes)
        finally:
            self._free.put(buffer)

    def settle(self) -> None:
        """Wait until every answer so far has left."""
        with self._cond:
            while self._open and not self._failed:
                if not self._cond.wait(1.0):
                    self._link.keep_alive()

    def stop(self) -> None:
        """No answer leaves after this."""
        if self._pool is None:
            return
        self._failed = True
        self._answers.put(None)
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._thread.join()

    def _run(self) -> None:
        try:
            while True:
                answer = self._answers.get()
                if answer is None:
                    return
                parts = []
                while True:
                    part = answer.parts.get()
                    if part is None:
                        break
                    parts.append(part.result())
                if self._failed or not answer.whole:
                    return  # the range could not be read: who read it says why, and the session is over
                self._link.send(
                    FrameType.HASHES,
                    volume=answer.volume,
                    offset=answer.offset,
                    aux=answer.length,
                    payload=b"".join(parts),
                )
                with self._cond:
                    self._open -= 1
                    self._cond.notify_all()
        except BmigrateError as error:
            self._give_up(error)
        except Exception as error:
            if not self._failed:
                log.exception("the hasher failed")
                self._give_up(DefectError(f"hasher: {error!r}", reason="unexpected"))

    def _give_up(self, error: BmigrateError) -> None:
        with self._cond:
            self._failed = True
            self._cond.notify_all()
        self._link.fail(error)
