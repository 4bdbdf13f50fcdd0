# SPDX-License-Identifier: GPL-3.0-or-later
"""The source side of a volume: an O_DIRECT descriptor, its geometry, and whole reads.

It only reads, and never through the page cache: a buffered read of a mounted device may be older
than what the file system has already been told is on disk.
"""

from __future__ import annotations

import os
import stat

from bmigrate.common import blockdev
from bmigrate.common.errors import RefusedError

READ_BYTES = 1 << 20
"""Longest read, longest DATA frame, and longest piece of a digest."""


class SourceVolume:
    """One volume of the open session.

    Args:
        name: of the volume. path: its device on this host. granule_bytes: breqd's.

    Raises:
        RefusedError: the device cannot be opened.
    """

    def __init__(self, name: str, path: str, granule_bytes: int) -> None:
        self.name = name
        self.path = path
        self.granule_bytes = granule_bytes
        self.index = -1
        #: breqd's, as of the opening of the session.
        self.attachment_id = ""
        try:
            self.fd = blockdev.open_direct(path)
        except OSError as exc:
            raise RefusedError(
                f"device {path} cannot be opened: {exc.strerror}",
                volume=name,
                hint="check 'devices' of the volume in the configuration",
                reason="device_missing",
            ) from exc
        status = os.fstat(self.fd)
        self.number = status.st_rdev if stat.S_ISBLK(status.st_mode) else 0
        self.size_bytes = blockdev.size_bytes(self.fd)
        self.logical_block_size = blockdev.logical_block_size(self.fd)
        self._reader = blockdev.DirectReader(self.fd, READ_BYTES)

    def read(self, offset: int, length: int) -> bytes:
        """At most READ_BYTES at an offset, copied.

        Raises:
            RefusedError: reason ``read_failed``; the session ends and the blocks stay claimed.
        """
        try:
            return bytes(self._reader.read(offset, length))
        except OSError as exc:
            raise self._failed(offset, length, exc) from exc

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill a view, aligned in memory to the logical block size, from an offset. For any thread.

        Raises:
            RefusedError: reason ``read_failed``; the session ends and the blocks stay claimed.
        """
        try:
            blockdev.read_exactly(self.fd, view, offset)
        except OSError as exc:
            raise self._failed(offset, len(view), exc) from exc

    def writes_in_flight(self) -> int:
        """How many writes to the device have begun and not ended, as the kernel counts them."""
        return blockdev.writes_in_flight(self.number) if self.number else 0

    def _failed(self, offset: int, length: int, exc: OSError) -> RefusedError:
        return RefusedError(
            f"reading {length} bytes at {offset} of {self.path} failed: {exc.strerror or exc}",
            volume=self.name,
            hint="see the kernel log; replace the device or its cable",
            reason="read_failed",
        )

    def close(self) -> None:
        """Close the device."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
