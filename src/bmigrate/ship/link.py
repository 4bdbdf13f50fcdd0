# SPDX-License-Identifier: GPL-3.0-or-later
"""Frames over a stream: whole frames out under one lock, whole frames in by one thread.

Promises: frames leave in the order of the calls to ``send``, each in one piece; what comes in was
checked by the framing. After a failed write nothing more is ever written: half a frame may be out,
and anything after it would be taken for its payload.
"""

from __future__ import annotations

import os
import select
import threading
import time

from bmigrate.common import faults
from bmigrate.common.errors import RefusedError
from bmigrate.ship.transport import Stream
from bmigrate.wire import frames
from bmigrate.wire.frames import Buffer, Frame, FrameError, FrameReader, FrameType, FrameWriter


class StreamEnded(Exception):
    """The other end is gone; the transport may know why."""


def _damaged(data: Buffer) -> memoryview:
    """For tests: a copy with one byte wrong."""
    damaged = bytearray(data)
    damaged[len(damaged) // 2] ^= 0xFF
    return memoryview(damaged)


def _rest(buffers: list[Buffer], left: int) -> list[Buffer]:
    """The last ``left`` bytes of the buffers."""
    result: list[Buffer] = []
    for buffer in reversed(buffers):
        if left <= 0:
            break
        result.append(buffer if len(buffer) <= left else memoryview(buffer)[len(buffer) - left :])
        left -= len(buffer)
    result.reverse()
    return result


class Link:
    """Both directions of one connection, seen from the sender."""

    def __init__(self, stream: Stream, host: str) -> None:
        self.stream = stream
        self.host = host
        self.last_sent = time.monotonic()
        self.last_heard = time.monotonic()
        self._writer = FrameWriter()
        self._reader = FrameReader(frames.FROM_RECEIVER)
        self._lock = threading.Lock()
        self._broken = False
        self._poll = select.poll()
        self._poll.register(stream.read_fd, select.POLLIN)

    def set_epoch(self, epoch: int) -> None:
        """From WELCOME on, frames of both directions carry this epoch."""
        self._writer.epoch = epoch
        self._reader.epoch = epoch

    def send(self, type_: FrameType, *, volume: int = 0, offset: int = 0, aux: int = 0, payload: Buffer = b"") -> None:
        """Write one frame; blocks while the pipe is full.

        Raises:
            StreamEnded: the connection is over.
        """
        with self._lock:
            self._write(type_, volume, offset, aux, payload)

    def send_extents(self, volume: int, parts: list[tuple[int, memoryview]]) -> None:
        """Write one EXTENTS frame of (offset in bytes, data), not copied; blocks while the pipe is full.

        Raises:
            StreamEnded: the connection is over.
        """
        with self._lock:
            if self._broken:
                raise StreamEnded("an earlier write failed")
            buffers = self._writer.encode_extents(volume, parts)
            if faults.point("ship.send") == "corrupt":
                buffers[1] = _damaged(buffers[1])
            self._put(buffers)

    def send_packed(self, volume: int, count: int, packed: bytes) -> None:
        """Write one PACKED frame of ``count`` extents; blocks while the pipe is full.

        Raises:
            StreamEnded: the connection is over.
        """
        with self._lock:
            if self._broken:
                raise StreamEnded("an earlier write failed")
            header, body = self._writer.encode_packed(volume, count, packed)
            if faults.point("ship.send") == "corrupt":
                body = _damaged(body)
            self._put([header, body])

    def send_if_free(self, type_: FrameType) -> bool:
        """Write one small frame unless somebody is writing; False then (what he writes says the same: alive)."""
        if not self._lock.acquire(blocking=False):
            return False
        try:
            self._write(type_, 0, 0, 0, b"")
            return True
        finally:
            self._lock.release()

    def _write(self, type_: FrameType, volume: int, offset: int, aux: int, payload: Buffer) -> None:
        if self._broken:
            raise StreamEnded("an earlier write failed")
        header, body = self._writer.encode(type_, volume=volume, offset=offset, aux=aux, payload=payload)
        if type_ is FrameType.DATA and faults.point("ship.send") == "corrupt":
            body = _damaged(body)
        self._put([header, body] if len(body) else [header])

    def _put(self, buffers: list[Buffer]) -> None:
        """All of the buffers, in order."""
        try:
            left = sum(len(buffer) for buffer in buffers)
            left -= os.writev(self.stream.write_fd, buffers)
            while left:
                buffers = _rest(buffers, left)
                left -= os.writev(self.stream.write_fd, buffers)
        except OSError as exc:
            self._broken = True
            raise StreamEnded(str(exc)) from exc
        self.last_sent = time.monotonic()

    def receive(self, timeout_seconds: float) -> Frame | None:
        """The next frame, or None when nothing came in time. The payload is valid until the next call.

        Raises:
            StreamEnded: end of the stream.
            RefusedError: the peer does not speak our protocol (reason from the framing).
        """
        deadline = time.monotonic() + timeout_seconds
        while True:
            wait = max(0.0, deadline - time.monotonic())
            if not self._poll.poll(wait * 1000):
                return None
            try:
                count = os.readv(self.stream.read_fd, [self._reader.space()])
            except OSError as exc:
                raise StreamEnded(str(exc)) from exc
            if not count:
                raise StreamEnded("end of stream")
            self.last_heard = time.monotonic()
            try:
                frame = self._reader.filled(count)
            except FrameError as exc:
                raise RefusedError(
                    f"{self.host} sent something that is not our protocol: {exc}",
                    host=self.host,
                    hint="are both hosts on the same release, and is nothing printed by root's login shell there?",
                    reason=exc.reason,
                ) from exc
            if frame is not None:
                return frame
