# SPDX-License-Identifier: GPL-3.0-or-later
"""A disk with a volatile write cache, over a raw file.

Promises: what was written is read back at once, but reaches the file only with flush() (or when the cache is full, as
in any disk); if the process dies before that, it is gone. Discarded and zeroed ranges read as zeros from then on, so
the content is a function of the requests alone. Must never write to the file outside flush(): the power-cut tests
rest on that.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import re

SECTOR = 512
CHUNK = 64 * 1024
_PER_CHUNK = CHUNK // SECTOR

_CLEAN, _DATA, _ZERO = 0, 1, 2
_RUNS = re.compile(rb"\x00+|\x01+|\x02+")

_FALLOC_KEEP_SIZE, _FALLOC_PUNCH_HOLE = 1, 2
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


def punch_hole(fd: int, offset: int, length: int) -> None:
    """Make `length` bytes at `offset` read as zeros and take no room.

    Raises:
        OSError: the file system refuses.
    """
    if _libc.fallocate(fd, _FALLOC_KEEP_SIZE | _FALLOC_PUNCH_HOLE, offset, length) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


class VolatileDisk:
    """See the module's text. Offsets and lengths are in bytes, multiples of 512."""

    def __init__(self, path: str, limit_bytes: int = 256 << 20) -> None:
        """Open the raw file at `path`; `limit_bytes` is how much may stay unflushed."""
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self.size = os.fstat(self._fd).st_size
        if self.size == 0 or self.size % SECTOR:
            raise ValueError(f"{path}: {self.size} bytes is not a whole number of sectors")
        self._limit = limit_bytes
        self._overlay = mmap.mmap(-1, self.size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._state = bytearray(self.size // SECTOR)
        self._touched: set[int] = set()
        self._since_release = 0
        self.forced_flushes = 0

    def close(self) -> None:
        """Let go of the file; what was not flushed is lost."""
        os.close(self._fd)
        self._overlay.close()

    @property
    def volatile_bytes(self) -> int:
        """How much would be lost at a power cut now, rounded up to 64 KiB chunks."""
        return len(self._touched) * CHUNK

    def _sectors(self, offset: int, length: int) -> tuple[int, int]:
        if offset % SECTOR or length % SECTOR or offset + length > self.size:
            raise ValueError(f"{length} bytes at {offset} are not whole sectors within {self.size} bytes")
        return offset // SECTOR, (offset + length) // SECTOR

    def read(self, offset: int, length: int) -> bytes:
        """What the disk holds, the cache included."""
        first, end = self._sectors(offset, length)
        state = self._state[first:end]
        if not any(state):
            return os.pread(self._fd, length, offset)
        parts = []
        for run in _RUNS.finditer(state):
            at = offset + run.start() * SECTOR
            size = (run.end() - run.start()) * SECTOR
            kind = state[run.start()]
            if kind == _CLEAN:
                parts.append(os.pread(self._fd, size, at))
            elif kind == _DATA:
                parts.append(self._overlay[at : at + size])
            else:
                parts.append(bytes(size))
        return b"".join(parts)

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Take `data` into the cache."""
        first, end = self._sectors(offset, len(data))
        self._overlay[offset : offset + len(data)] = data
        self._state[first:end] = b"\x01" * (end - first)
        self._note(first, end)

    def zero(self, offset: int, length: int) -> None:
        """Make a range read as zeros (write-zeroes and discard)."""
        first, end = self._sectors(offset, length)
        self._state[first:end] = b"\x02" * (end - first)
        self._note(first, end)

    def _note(self, first: int, end: int) -> None:
        if first == end:
            return
        self._touched.update(range(first // _PER_CHUNK, (end - 1) // _PER_CHUNK + 1))
        if len(self._touched) * CHUNK > self._limit:
            self.forced_flushes += 1
            self.flush()

    def flush(self) -> None:
        """Bring the cache to the file.

        The host's own fsync is left out on purpose: a host crash ends the lab anyway, only guests lose power here.
        """
        if not self._touched:
            return
        view = memoryview(self._overlay)
        try:
            for chunk in sorted(self._touched):
                self._flush_chunk(view, chunk)
        finally:
            view.release()
        self._since_release += len(self._touched) * CHUNK
        self._touched.clear()
        if self._since_release > 64 << 20:
            self._overlay.madvise(mmap.MADV_DONTNEED)
            self._since_release = 0

    def _flush_chunk(self, view: memoryview, chunk: int) -> None:
        first = chunk * _PER_CHUNK
        state = self._state[first : first + _PER_CHUNK]
        for run in _RUNS.finditer(state):
            kind = state[run.start()]
            at = (first + run.start()) * SECTOR
            size = (run.end() - run.start()) * SECTOR
            if kind == _DATA:
                done = os.pwrite(self._fd, view[at : at + size], at)
                if done != size:
                    raise OSError(f"wrote {done} of {size} bytes at {at}: is the host's disk full?")
            elif kind == _ZERO:
                punch_hole(self._fd, at, size)
        self._state[first : first + len(state)] = bytes(len(state))
