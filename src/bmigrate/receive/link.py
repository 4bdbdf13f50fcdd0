# SPDX-License-Identifier: GPL-3.0-or-later
"""The receiver's two pipes: frames in, frames out, silence noticed, the end of hold noticed.

It promises that waiting is always bounded: the peer must be heard within the limit (any byte
counts), our own frames must leave within it, and when the connection to hold ends the receiver ends
too, because without hold nobody could kill it before the next session writes. The buffer that
payloads are read into is page-aligned, so that a DATA payload goes from the pipe to the device
without another copy. Only one frame is in memory at any time. Two threads may send, each frame in one piece.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import select
import threading
import time

from bmigrate.common.errors import BmigrateError, UnreachableError
from bmigrate.wire.frames import (
    FROM_SENDER,
    MAX_PAYLOAD_BYTES,
    Buffer,
    Frame,
    FrameReader,
    FrameType,
    FrameWriter,
    from_sender,
)

_F_SETPIPE_SZ = 1031
_PIPE_BYTES = 1 << 20


class Link:
    """Framed connection over two descriptors (pipes or sockets); they are made non-blocking.

    Args:
        fd_in, fd_out: from and to the sender. silence_seconds: the longest silence that is borne.
    """

    def __init__(self, fd_in: int, fd_out: int, silence_seconds: float) -> None:
        self.silence_seconds = silence_seconds
        self._in = fd_in
        self._out = fd_out
        self._hold: int | None = None
        self._buffer = mmap.mmap(-1, MAX_PAYLOAD_BYTES)
        self.reader = FrameReader(FROM_SENDER, epoch=0, buffer=memoryview(self._buffer))
        self.writer = FrameWriter()
        for fd in (fd_in, fd_out):
            os.set_blocking(fd, False)
            try:
                fcntl.fcntl(fd, _F_SETPIPE_SZ, _PIPE_BYTES)
            except OSError:
                continue  # a socket, or the limit for pipes is lower: slower, nothing else
        self._poll = select.poll()
        self._poll.register(fd_in, select.POLLIN)
        self._heard = self._said = time.monotonic()
        self._send_lock = threading.Lock()
        self._failure: BmigrateError | None = None
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._poll.register(self._wake_read, select.POLLIN)

    def fail(self, error: BmigrateError) -> None:
        """From another thread: `receive` raises `error`, now if it waits, else before the next frame."""
        self._failure = error
        os.write(self._wake_write, b"x")

    def start_session(self, epoch: int, hold_fd: int, silence_seconds: float, version: int) -> None:
        """From now on frames carry `epoch` and are of `version`, and the end of `hold_fd` ends the session."""
        # The sender has said all that it had to say, and we let it wait: that was no silence.
        self._heard = time.monotonic()
        self.reader.allowed = from_sender(version)
        self.reader.epoch = self.writer.epoch = epoch
        self._hold = hold_fd
        self.silence_seconds = silence_seconds
        self._poll.register(hold_fd, select.POLLIN)

    def receive(self) -> Frame | None:
        """The next frame, or None when the sender closed the connection between two frames.

        Raises:
            FrameError: the stream is broken.
            UnreachableError: silence, or hold is gone.
        """
        self._check_hold(0)
        while True:
            try:
                count = os.readv(self._in, [self.reader.space()])
            except BlockingIOError:
                self._wait()
                continue
            self._heard = time.monotonic()
            frame = self.reader.filled(count)
            if frame is not None or count == 0:
                return frame

    def send(self, type_: FrameType, *, volume: int = 0, offset: int = 0, aux: int = 0, payload: Buffer = b"") -> None:
        """Send one frame, waiting for the sender to take it at most `silence_seconds`.

        Raises:
            UnreachableError: it does not take it.
        """
        with self._send_lock:
            self._send(type_, volume, offset, aux, payload)

    def _send(self, type_: FrameType, volume: int, offset: int, aux: int, payload: Buffer) -> None:
        parts = [
            memoryview(part)
            for part in self.writer.encode(type_, volume=volume, offset=offset, aux=aux, payload=payload)
            if len(part)
        ]
        deadline = time.monotonic() + self.silence_seconds
        while parts:
            try:
                sent = os.writev(self._out, parts)
            except BlockingIOError:
                left = deadline - time.monotonic()
                poll = select.poll()
                poll.register(self._out, select.POLLOUT)
                if left <= 0 or not poll.poll(left * 1000):
                    raise UnreachableError(
                        f"the sender has taken nothing for {self.silence_seconds:g} s", reason="silence"
                    ) from None
                continue
            except OSError as error:
                raise UnreachableError(f"the sender is gone: {error.strerror}", reason="sender_gone") from error
            while parts and sent >= len(parts[0]):
                sent -= len(parts.pop(0))
            if parts:
                parts[0] = parts[0][sent:]
        self._said = time.monotonic()

    def keep_alive(self) -> None:
        """To be called during long work: says something when nothing was said for a quarter of the limit."""
        self._check_hold(0)
        if time.monotonic() - self._said >= self.silence_seconds / 4:
            self.send(FrameType.PING)

    def _wait(self) -> None:
        now = time.monotonic()
        if now - self._heard > self.silence_seconds:
            raise UnreachableError(f"nothing heard from the sender for {self.silence_seconds:g} s", reason="silence")
        if self._hold is not None and now - self._said >= self.silence_seconds / 4:
            self.send(FrameType.PING)
            now = time.monotonic()
        limit = min(self._heard + self.silence_seconds, self._said + self.silence_seconds / 4) - now
        self._check_hold(max(limit, 0.01))

    def _check_hold(self, timeout_seconds: float) -> None:
        for fd, _events in self._poll.poll(timeout_seconds * 1000):
            if fd == self._wake_read and self._failure is not None:
                raise self._failure
            if fd == self._hold:
                raise UnreachableError(
                    "bmigrate-hold closed the connection: this session is over",
                    hint="see: journalctl -u bmigrate-hold",
                    reason="session_over",
                )
