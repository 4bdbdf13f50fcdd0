# SPDX-License-Identifier: GPL-3.0-or-later
"""One stream of a session: its connection, and what belongs to the connection alone.

The first lane carries requests, SYNC and their answers beside data; the others carry data and MARK. Each has a process
of the transport on this side and a receiver on the other, so that encryption and writing use as many cores.

Promises: frames leave a lane in the order of the calls; the data is not copied. It never retries: the end of one lane
is the end of the session, which says so to the others.
"""

from __future__ import annotations

import time
from typing import Callable

from bmigrate.common.errors import BmigrateError, UnreachableError
from bmigrate.ship.link import Link, StreamEnded
from bmigrate.wire.frames import Buffer, Frame, FrameType
from bmigrate.wire.packing import Choice, Packer


class Lane:
    """One connection of an open session.

    Args:
        number: 0 for the first. link: the connection. lost: waits for the reason why the connection ended, and
            gives it. version: of the protocol.

    Attributes:
        packer: compresses extents when that was agreed on, else None. choice: whether it is worth while.
    """

    def __init__(self, number: int, link: Link, version: int, lost: Callable[[], BmigrateError]) -> None:
        self.number = number
        self.link = link
        self.version = version
        self.packer: Packer | None = None
        self.choice = Choice()
        self._lost = lost

    def send(self, type_: FrameType, *, volume: int = 0, offset: int = 0, aux: int = 0, payload: Buffer = b"") -> None:
        """Write one frame.

        Raises:
            BmigrateError: why the session is over.
        """
        try:
            self.link.send(type_, volume=volume, offset=offset, aux=aux, payload=payload)
        except StreamEnded as exc:
            raise self._lost() from exc

    def send_extents(self, volume: int, parts: list[tuple[int, memoryview]]) -> None:
        """Write data as one frame: (offset, data), ascending; the data is not copied and is free on return.

        Raises:
            BmigrateError: why the session is over.
        """
        try:
            if len(parts) > 1 and self.version >= 2:
                self.link.send_extents(volume, parts)
                return
            for offset, data in parts:
                self.link.send(FrameType.DATA, volume=volume, offset=offset, payload=data)
        except StreamEnded as exc:
            raise self._lost() from exc

    def send_packed(self, volume: int, count: int, packed: bytes) -> None:
        """Write ``count`` extents that are compressed.

        Raises:
            BmigrateError: why the session is over.
        """
        try:
            self.link.send_packed(volume, count, packed)
        except StreamEnded as exc:
            raise self._lost() from exc

    def read(self, silence_seconds: float, take: Callable[[Frame], None], over: Callable[[], bool]) -> None:
        """Take frames in until the session is over, and say something whenever nothing was said for long.

        Raises:
            StreamEnded: the connection is over.
            UnreachableError: the receiver is silent.
            BmigrateError, FrameError: what ``take`` raises, or a frame that is none.
        """
        quarter = silence_seconds / 4
        link = self.link
        while not over():
            frame = link.receive(min(quarter, 1.0))
            now = time.monotonic()
            if now - link.last_sent >= quarter:
                link.send_if_free(FrameType.PING)
            if frame is not None:
                take(frame)
            elif now - link.last_heard > 2 * silence_seconds:
                raise UnreachableError(
                    f"{link.host} said nothing for {now - link.last_heard:.0f} s",
                    host=link.host,
                    hint="check the network and the peer's disks; shipping resumes by itself",
                    reason="silent",
                )
