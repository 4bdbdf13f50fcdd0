# SPDX-License-Identifier: GPL-3.0-or-later
"""One session after its handshake: what each frame makes the receiver do.

Frames are handled one after another in the order in which they were sent, and a write is complete when
its frame is done with; so whatever came before a SYNC is on the device, in its cache at worst, when
the flusher is told of that SYNC. Flush, note and ACK follow there, in another thread (flusher.py),
while the next frames are written.

A session may have further streams, each with a receiver like this one (``Member``) that only writes. It never flushes:
the first one flushes for all, so that one failed flush, which the kernel reports once, is the end of every
acknowledgement. Its answer to MARK says that all frames before are written, and so in reach of that flush.
"""

from __future__ import annotations

import logging
from typing import Callable

from bmigrate.common import faults
from bmigrate.common.errors import RefusedError
from bmigrate.common.scatter import Scatter
from bmigrate.receive.ackfile import AckFile
from bmigrate.receive.flusher import Flusher
from bmigrate.receive.hasher import Hasher
from bmigrate.receive.link import Link
from bmigrate.receive.volumes import StandbyVolume
from bmigrate.wire import frames, hashing
from bmigrate.wire.frames import Frame, FrameType
from bmigrate.wire.packing import Unpacker

log = logging.getLogger("breceive")


class Writes:
    """What every stream of a session takes: frames that write, and those that keep it alive.

    Args:
        link: the connection. volumes: in the order of the indexes of WELCOME.
        unpacker: when compression was agreed on. first_write: called once, before the first byte is written.
    """

    def __init__(
        self,
        link: Link,
        volumes: list[StandbyVolume],
        unpacker: Unpacker | None = None,
        first_write: Callable[[], None] = lambda: None,
    ) -> None:
        self._unpacker = unpacker
        self._first_write: Callable[[], None] | None = first_write
        self._link = link
        self._volumes = volumes
        self._scatter = Scatter("scatter")
        self._handlers: dict[FrameType, Callable[[Frame], None]] = {
            FrameType.DATA: self._data,
            FrameType.EXTENTS: self._extents,
            FrameType.PACKED: self._packed,
            FrameType.ZERO: self._zero,
            FrameType.PING: self._ping,
            FrameType.PONG: lambda frame: None,
        }

    def run(self) -> str:
        """Handle frames until the sender ends the session; returns why it ended.

        Raises:
            FrameError, BmigrateError: the session is over and nothing after the last ACK may be believed.
        """
        self.begin()
        try:
            while True:
                frame = self._link.receive()
                if frame is None:
                    return "the sender closed the connection"
                if frame.type is FrameType.BYE:
                    self._link.send(FrameType.BYE)
                    return "the sender said goodbye"
                self.handle(frame)
        finally:
            self._scatter.close()
            self.end()

    def begin(self) -> None:
        """Start what works beside the frames."""

    def end(self) -> None:
        """Nothing leaves after this; due before the volumes are closed."""

    def handle(self, frame: Frame) -> None:
        """Do what one frame asks for.

        Raises:
            FrameError, BmigrateError: the session is over.
        """
        handler = self._handlers.get(frame.type)
        if handler is None:
            raise RefusedError(f"{frame.type.name} frame in the middle of a session", reason="bad_type")
        faults.point("receive.frame")
        handler(frame)

    def _volume(self, frame: Frame) -> StandbyVolume:
        if frame.volume >= len(self._volumes):
            raise RefusedError(
                f"{frame.type.name} frame for volume number {frame.volume}, the session has {len(self._volumes)}",
                reason="unknown_volume",
            )
        return self._volumes[frame.volume]

    def _begin_to_write(self) -> None:
        if self._first_write is not None:
            self._first_write()
            self._first_write = None

    def _data(self, frame: Frame) -> None:
        self._begin_to_write()
        self._volume(frame).write(frame.offset, frame.payload)

    def _packed(self, frame: Frame) -> None:
        if self._unpacker is None:
            raise RefusedError("PACKED frame, and no compression was agreed on", reason="bad_type")
        self._extents(frames.unpacked(frame, self._unpacker.unpack(frame.payload)))

    def _extents(self, frame: Frame) -> None:
        volume, parts = self._volume(frame), frame.parts()
        volume.check_extents(parts)
        self._begin_to_write()
        volume.write_extents(parts, self._scatter, self._link.keep_alive)

    def _zero(self, frame: Frame) -> None:
        self._begin_to_write()
        self._volume(frame).zero(frame.offset, frame.aux, self._link.keep_alive)

    def _ping(self, frame: Frame) -> None:
        self._link.send(FrameType.PONG, aux=frame.aux)


class Member(Writes):
    """Handles the frames of a further stream of an open session."""

    def __init__(
        self,
        link: Link,
        volumes: list[StandbyVolume],
        unpacker: Unpacker | None = None,
        first_write: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(link, volumes, unpacker, first_write)
        self._last_mark = 0
        self._handlers[FrameType.MARK] = self._mark

    def _mark(self, frame: Frame) -> None:
        if frame.aux <= self._last_mark:
            raise RefusedError(f"MARK number {frame.aux} after number {self._last_mark}", reason="bad_sequence")
        self._last_mark = frame.aux
        faults.point("receive.mark")
        self._link.send(FrameType.MARKED, aux=frame.aux, offset=frame.seq)


class Session(Writes):
    """Handles the frames of the first stream of an epoch.

    Args:
        acks: the open receive.ack. hash_name: the hash that was agreed on.
        clear_suspect: tells hold that the volume of that name was compared as a whole and is equal again.
    """

    def __init__(
        self,
        link: Link,
        volumes: list[StandbyVolume],
        acks: AckFile,
        clear_suspect: Callable[[str], None],
        unpacker: Unpacker | None = None,
        hash_name: str = hashing.BLAKE2B,
        first_write: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(link, volumes, unpacker, first_write)
        self._flusher = Flusher(link, volumes, acks)
        self._hasher = Hasher(link, hash_name)
        self._clear_suspect = clear_suspect
        self._last_sync = 0
        self._handlers.update(
            {
                FrameType.SYNC: self._sync,
                FrameType.HASH: self._hash,
                FrameType.REREAD: self._reread,
                FrameType.RESYNC_DONE: self._resync_done,
            }
        )

    def begin(self) -> None:
        """Start what answers SYNC."""
        self._flusher.start()

    def end(self) -> None:
        """No ACK leaves after this; due before the volumes and the note are closed, which a flush may be using."""
        self._flusher.stop()
        self._hasher.stop()

    def _sync(self, frame: Frame) -> None:
        if frame.aux <= self._last_sync:
            raise RefusedError(f"SYNC number {frame.aux} after number {self._last_sync}", reason="bad_sequence")
        if frame.offset >> len(self._volumes):
            raise RefusedError(
                f"SYNC for the volumes {frame.offset:#x}, the session has {len(self._volumes)}", reason="unknown_volume"
            )
        self._last_sync = frame.aux
        for number, volume in enumerate(self._volumes):
            if frame.offset >> number & 1:
                volume.written_elsewhere()
        self._flusher.wanted(frame.aux, frame.seq)

    def _hash(self, frame: Frame) -> None:
        self._hasher.hash(self._volume(frame), frame.volume, frame.offset, frame.aux, frame.chunk_bytes())

    def _reread(self, frame: Frame) -> None:
        extents = frame.extents()
        self._hasher.settle()  # answers leave in the order of the requests
        answer = self._volume(frame).digests(extents, self._scatter, self._link.keep_alive)
        self._link.send(FrameType.DIGESTS, volume=frame.volume, aux=len(extents), payload=answer)

    def _resync_done(self, frame: Frame) -> None:
        volume = self._volume(frame)
        if any(item.unsynced for item in self._volumes):
            raise RefusedError(
                "RESYNC_DONE before the SYNC of what the resync wrote", volume=volume.name, reason="bad_sequence"
            )
        self._hasher.settle()
        self._clear_suspect(volume.name)
        log.info("volume %s was compared and is no longer suspect", volume.name)
        self._link.send(FrameType.RESYNC_DONE, volume=frame.volume)
