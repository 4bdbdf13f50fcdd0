# SPDX-License-Identifier: GPL-3.0-or-later
"""A standby volume as the receiver uses it: its own O_DIRECT descriptor, and nothing beyond its bounds.

It promises that no byte is read or written outside [0, size announced by the sender), that zeroes
are written and never discarded, and that a failed flush is final: the kernel reports it once and
may forget the pages, so a second fdatasync on the same descriptor would lie. It must never open the
device exclusively (that is hold's), or write through the page cache.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator
from typing import Callable

from bmigrate.common import blockdev, faults
from bmigrate.common.errors import RefusedError
from bmigrate.common.scatter import Scatter
from bmigrate.wire import frames

READ_BYTES = 1 << 20
ZERO_STEP_BYTES = 64 << 20

Alive = Callable[[], None]


class StandbyVolume:
    """One volume of the session.

    Args:
        name: of the volume. device: its path, from hold. number: the device number (st_rdev) that hold holds.
        limit_bytes: the sender's size of the volume; everything beyond is out of bounds.

    Raises:
        RefusedError: the path now leads to another device than the one held, or the device has shrunk.
    """

    def __init__(self, name: str, device: str, number: int, limit_bytes: int) -> None:
        self.name = name
        self.device = device
        self.limit_bytes = limit_bytes
        self.written_bytes = 0
        self._writes = 0
        # The first flush of a session is never skipped: what an earlier receiver wrote, and died before it could flush,
        # may be found equal in this session, and be acknowledged without being written again.
        self._synced = -1
        self._broken: str | None = None
        self._readers = threading.local()
        try:
            self.fd = blockdev.open_direct(device, write=True)
        except OSError as error:
            raise RefusedError(
                f"{device} cannot be opened: {error.strerror}",
                volume=name,
                reason="device_missing",
                hint="see: journalctl -u bmigrate-hold",
            ) from error
        try:
            if os.fstat(self.fd).st_rdev != number:
                raise RefusedError(
                    f"{device} is another device than the one that hold has",
                    volume=name,
                    hint="restart bmigrate-hold, then compare the volume: bmigrate verify",
                    reason="device_changed",
                )
            size = blockdev.size_bytes(self.fd)
            if size < limit_bytes:
                raise RefusedError(
                    f"{device} has {size} bytes, the source's volume {limit_bytes}",
                    volume=name,
                    hint="use a device at least as large as the source's",
                    reason="too_small",
                )
            self.block_bytes = blockdev.logical_block_size(self.fd)
        except BaseException:
            os.close(self.fd)
            raise

    @property
    def unsynced(self) -> bool:
        """Whether something may have been written, in this session or before it, that no flush has made durable."""
        return self._writes != self._synced

    def written_elsewhere(self) -> None:
        """Another stream of this session has written: the next flush is due although nothing was written here."""
        self._writes += 1

    def check_extents(self, parts: list[tuple[int, memoryview]]) -> None:
        """Refuse an EXTENTS frame as a whole before the first of its bytes is written.

        Raises:
            RefusedError: out of bounds, or not whole blocks.
        """
        for offset, data in parts:
            self.check("EXTENTS", offset, len(data))

    def write_extents(self, parts: list[tuple[int, memoryview]], scatter: Scatter, alive: Alive) -> None:
        """Write what ``check_extents`` has passed, several parts at a time where the device is slow.

        They do not overlap (the decoder of the frame has seen to it), so their order is of no account. All are complete
        on return, and only then counted: a flush that began before, and may miss one of them, is followed by another.

        Raises:
            RefusedError: the device failed; any of the others may be written.
        """
        scatter.each(self._write, parts, alive)
        self._writes += 1
        self.written_bytes += sum(len(data) for _, data in parts)

    def write(self, offset: int, data: memoryview) -> None:
        """Write `data` at `offset` (bytes). The buffer must be aligned in memory; it is not copied.

        Raises:
            RefusedError: out of bounds, not whole blocks, or the device failed.
        """
        self.check("DATA", offset, len(data))
        self._write((offset, data))
        self._writes += 1
        self.written_bytes += len(data)

    def _write(self, part: tuple[int, memoryview]) -> None:
        """For any thread; what is counted is counted by the caller, when all is complete."""
        offset, data = part
        if faults.point("receive.write") == "corrupt":
            data[0] ^= 0xFF
        done = 0
        try:
            while done < len(data):
                done += os.pwritev(self.fd, [data[done:]], offset + done)
        except OSError as error:
            raise self._failed(f"write of {len(data)} bytes at offset {offset}", error) from error

    def zero(self, offset: int, length: int, alive: Alive) -> None:
        """Make `length` bytes at `offset` read back as zeroes; `alive` is called between long steps."""
        self.check("ZERO", offset, length)
        end = offset + length
        try:
            while offset < end:
                step = min(ZERO_STEP_BYTES, end - offset)
                blockdev.zero_out(self.fd, offset, step)
                offset += step
                alive()
        except OSError as error:
            raise self._failed(f"zero-out at offset {offset}", error) from error
        self._writes += 1
        self.written_bytes += length

    def sync(self) -> None:
        """Make everything durable that was written before this call; once it has failed it always fails.

        May run in another thread than the writes: what is written meanwhile counts as not flushed.

        Raises:
            RefusedError: reason ``io_error``.
        """
        if self._broken is not None:
            raise RefusedError(self._broken, volume=self.name, reason="io_error")
        # A write counts when it is complete: one that is under way now, and that this flush may miss, counts later, and
        # the next flush is not skipped. Counted at its begin, it would pass for flushed, and its SYNC be acknowledged.
        writes = self._writes
        if writes == self._synced:
            return
        try:
            faults.point("receive.fdatasync")
            os.fdatasync(self.fd)
        except OSError as error:
            failed = self._failed("flush", error)
            self._broken = failed.message
            raise failed from error
        self._synced = writes

    def read_into(self, view: memoryview, offset: int) -> memoryview:
        """Fill a view, aligned in memory, from the device past the cache; returns the view.

        Raises:
            RefusedError: reason ``io_error``.
        """
        try:
            blockdev.read_exactly(self.fd, view, offset)
        except OSError as error:
            raise self._failed(f"read of {len(view)} bytes at offset {offset}", error) from error
        return view

    def digests(self, extents: list[tuple[int, int]], scatter: Scatter, alive: Alive) -> bytes:
        """32-byte BLAKE2b digest of each extent, read from the device past the cache."""
        for offset, length in extents:
            self.check("REREAD", offset, length)
        result = [b""] * len(extents)

        def digest(number: int) -> None:
            result[number] = self._digest(*extents[number], frames.EXTENT_DIGEST_BYTES)

        scatter.each(digest, range(len(extents)), alive)
        return b"".join(result)

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self.fd)

    def _digest(self, offset: int, length: int, size: int) -> bytes:
        digest = hashlib.blake2b(digest_size=size)
        for part in self._read(offset, length):
            digest.update(part)
        return digest.digest()

    def _read(self, offset: int, length: int) -> Iterator[memoryview]:
        reader: blockdev.DirectReader | None = getattr(self._readers, "reader", None)
        if reader is None:
            reader = self._readers.reader = blockdev.DirectReader(self.fd, READ_BYTES)
        end = offset + length
        while offset < end:
            step = min(READ_BYTES, end - offset)
            try:
                view = reader.read(offset, step)
            except OSError as error:
                raise self._failed(f"read of {step} bytes at offset {offset}", error) from error
            yield view
            offset += step

    def check(self, what: str, offset: int, length: int) -> None:
        """Refuse what is not whole blocks within the volume; ``what`` names the frame.

        Raises:
            RefusedError: reason ``out_of_bounds`` or ``misaligned``.
        """
        if offset + length > self.limit_bytes:
            raise RefusedError(
                f"{what} frame for bytes {offset} to {offset + length} of a volume of {self.limit_bytes} bytes",
                volume=self.name,
                reason="out_of_bounds",
                hint="the sender is defective or the volume has grown; restart bmigrate-ship",
            )
        if offset % self.block_bytes or length % self.block_bytes:
            raise RefusedError(
                f"{what} frame for {length} bytes at offset {offset}: not whole blocks of {self.block_bytes} bytes",
                volume=self.name,
                reason="misaligned",
            )

    def _failed(self, what: str, error: OSError) -> RefusedError:
        return RefusedError(
            f"{what} on {self.device} failed: {error.strerror or error}",
            volume=self.name,
            hint="look at the kernel log of this host (dmesg); the session has ended and nothing "
            "unacknowledged is lost",
            reason="io_error",
        )
