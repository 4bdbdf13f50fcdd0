# SPDX-License-Identifier: GPL-3.0-or-later
"""The bitmap file of one volume: header, map of dirty blocks, map of failed writes (docs/on-disk.md).

Promises: the file is created whole or not at all, its space is reserved up front (a sparse map
would kill the daemon with SIGBUS when the disk is full), and a header that is damaged, of another
version or of another volume is refused by name, never read as a map. The maps are mapped shared,
so that what was stored survives any death of the process; surviving a death of the host is not
promised (the volume is suspect then). It must never lie on a volume that it tracks: each store
would be a write to be tracked.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from bmigrate.common import atomic, faults
from bmigrate.common.errors import DefectError, RefusedError

MAGIC = b"BREQDMAP"
VERSION = 1
HEADER_BYTES = 4096
#: magic, version, header bytes, granule, reserved, size, blocks, bytes of one map, offsets of the
#: two maps, whole file, random id of this map, length of the JSON that follows.
_FIXED = struct.Struct("<8sIIII6Q16sI")
_CRC = struct.Struct("<I")

SMALLEST_GRANULE = 4096
LARGEST_GRANULE = 1 << 20
_AUTO_LIMIT_BYTES = 128 << 20


def choose_granule(size_bytes: int, wanted: int | None) -> int:
    """The granule in bytes: as configured, or 4 KiB while the map takes 128 MiB at most (4 TiB), coarser beyond.

    Args:
        size_bytes: of the volume.
        wanted: a power of two in bytes, or None for automatic.
    """
    if wanted is not None:
        return wanted
    granule = SMALLEST_GRANULE
    while granule < LARGEST_GRANULE and size_bytes // granule // 8 > _AUTO_LIMIT_BYTES:
        granule *= 2
    return granule


def _round_up(number: int) -> int:
    return -(-number // HEADER_BYTES) * HEADER_BYTES


class BitmapFile:
    """An open bitmap file. ``map`` and ``failed`` are uint8 arrays over the shared mapping.

    Attributes:
        size_bytes, granule_bytes: of the volume.
        map_id: random, new each time a file is made.
        label: {workload, volume, identity} as written when the file was made.
    """

    def __init__(self, path: Path) -> None:
        """Open and check an existing file.

        Raises:
            FileNotFoundError: there is none.
            DefectError: reason ``bad_bitmap``: not a map, damaged, or of a newer version.
            RefusedError: reason ``no_space``: it had holes, and the disk is too full to fill them.
        """
        self.path = path
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            self._read_header(os.pread(fd, HEADER_BYTES, 0), os.fstat(fd).st_size)
            _reserve(fd, self.file_bytes, path)
            self._mapping = mmap.mmap(fd, self.file_bytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        except BaseException:
            os.close(fd)
            raise
        self._fd = fd
        self.map: Any = np.frombuffer(self._mapping, np.uint8, self.map_bytes, HEADER_BYTES)
        self.failed: Any = np.frombuffer(self._mapping, np.uint8, self.map_bytes, self.failed_offset)

    def _read_header(self, header: bytes, file_bytes: int) -> None:
        if len(header) < HEADER_BYTES or header[:8] != MAGIC:
            raise self._bad("it is not a bitmap file")
        if _CRC.unpack_from(header, HEADER_BYTES - 4)[0] != zlib.crc32(header[: HEADER_BYTES - 4]):
            raise self._bad("the checksum of its header is wrong")
        fields = _FIXED.unpack_from(header)
        if fields[1] != VERSION or fields[2] != HEADER_BYTES:
            raise self._bad(f"its version {fields[1]} is not {VERSION}")
        (self.granule_bytes, _, self.size_bytes, blocks, self.map_bytes, offset, self.failed_offset) = fields[3:10]
        self.file_bytes, identifier, label_bytes = fields[10:13]
        geometry = geometry_of(self.size_bytes, self.granule_bytes)
        if (blocks, self.map_bytes, offset, self.failed_offset, self.file_bytes) != geometry:
            raise self._bad("its geometry does not fit the size of the volume")
        if file_bytes != self.file_bytes:
            raise self._bad(f"it has {file_bytes} bytes, not {self.file_bytes}")
        self.map_id = identifier.hex()
        self.label: dict[str, Any] = json.loads(header[_FIXED.size : _FIXED.size + label_bytes])

    def _bad(self, why: str) -> DefectError:
        return DefectError(f"bitmap file {self.path}: {why}", hint="the volume needs a resync", reason="bad_bitmap")

    def crc(self) -> int:
        """CRC-32 over both maps, for the clean flag."""
        return zlib.crc32(self.failed, zlib.crc32(self.map))

    def sync(self) -> None:
        """Make the maps durable.

        Raises:
            OSError: they are not.
        """
        faults.point("breqd.bitmap_sync")
        self._mapping.flush()
        os.fsync(self._fd)

    def close(self) -> None:
        """Let go of the file; the mapping ends when the last array over it does."""
        self.map = self.failed = np.zeros(0, dtype=np.uint8)
        os.close(self._fd)


def geometry_of(size_bytes: int, granule_bytes: int) -> tuple[int, int, int, int, int]:
    """(blocks, bytes of one map, offset of the first map, of the second, bytes of the file)."""
    blocks = -(-size_bytes // granule_bytes)
    map_bytes = -(-blocks // 8)
    second = HEADER_BYTES + _round_up(map_bytes)
    return blocks, map_bytes, HEADER_BYTES, second, second + _round_up(map_bytes)


def create(path: Path, size_bytes: int, granule_bytes: int, label: dict[str, Any], all_dirty: bool) -> BitmapFile:
    """Make a new file in place of an old one, atomically and durably, and open it.

    Args:
        size_bytes, granule_bytes: of the volume.
        label: {workload, volume, identity}; at most some 3 KiB as JSON.
        all_dirty: every block marked (a seed), or none.

    Raises:
        RefusedError: reason ``no_space``; the old file is still there.
    """
    blocks, map_bytes, first, second, file_bytes = geometry_of(size_bytes, granule_bytes)
    text = json.dumps(label, sort_keys=True).encode()
    fixed = _FIXED.pack(
        MAGIC, VERSION, HEADER_BYTES, granule_bytes, 0, size_bytes, blocks, map_bytes, first, second, file_bytes,
        os.urandom(16), len(text),
    )  # fmt: skip
    header = (fixed + text).ljust(HEADER_BYTES - 4, b"\0")
    if len(header) != HEADER_BYTES - 4:
        raise DefectError(f"label of bitmap file {path} is too long", reason="too_long")
    atomic.make_directory(path.parent)
    temporary = path.with_name(f".{path.name}.new")
    fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        try:
            _reserve(fd, file_bytes, path)
            os.pwrite(fd, header + _CRC.pack(zlib.crc32(header)), 0)
            if all_dirty:
                _fill(fd, blocks)
            os.fsync(fd)
        finally:
            os.close(fd)
        faults.point("breqd.bitmap_rename")
        os.rename(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    atomic.fsync_directory(path.parent)
    return BitmapFile(path)


def _reserve(fd: int, file_bytes: int, path: Path) -> None:
    try:
        os.posix_fallocate(fd, 0, file_bytes)
    except OSError as exc:
        raise RefusedError(
            f"bitmap file {path} needs {file_bytes} bytes, which cannot be reserved: {exc.strerror}",
            hint=f"make room in {path.parent}, or set bitmap_directory in the workload's configuration",
            reason="no_space",
        ) from exc


def _fill(fd: int, blocks: int) -> None:
    whole, rest = divmod(blocks, 8)
    offset, ones = HEADER_BYTES, b"\xff" * (1 << 20)
    while whole:
        written = os.pwrite(fd, ones[: min(whole, len(ones))], offset)
        offset, whole = offset + written, whole - written
    if rest:
        os.pwrite(fd, bytes([0xFF >> (8 - rest)]), offset)
