# SPDX-License-Identifier: GPL-3.0-or-later
"""The thin edge to Linux block devices: sizes, counters, identity, direct reads, zero-out, caches.

Everything is by open descriptor or sysfs; nothing here decides anything. Offsets and lengths are
bytes. Regular files are accepted by the read and size functions, so that tests can use them.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import mmap
import os
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Union

from bmigrate.common.errors import RefusedError

PathLike = Union[str, Path]

BLKRRPART = 0x125F
BLKFLSBUF = 0x1261
BLKSSZGET = 0x1268
BLKGETSIZE64 = 0x80081272
BLKZEROOUT = 0x127F

MIB = 1 << 20
SECTOR = 512
LARGEST_BLOCK_BYTES = 4096
"""Of the logical blocks of a device: what is dirty is told, and zeroes are, in units of so much."""


def is_block(fd: int) -> bool:
    """Whether the descriptor is a block device."""
    return stat.S_ISBLK(os.fstat(fd).st_mode)


def size_bytes(fd: int) -> int:
    """Size of the device (BLKGETSIZE64), or of a regular file."""
    if not is_block(fd):
        return os.fstat(fd).st_size
    buffer = bytearray(8)
    fcntl.ioctl(fd, BLKGETSIZE64, buffer)
    return int(struct.unpack("Q", buffer)[0])


def logical_block_size(fd: int) -> int:
    """Logical block size in bytes (BLKSSZGET); 512 for a regular file."""
    if not is_block(fd):
        return SECTOR
    buffer = bytearray(4)
    fcntl.ioctl(fd, BLKSSZGET, buffer)
    return int(struct.unpack("i", buffer)[0])


def device_number(path: PathLike) -> int:
    """st_rdev of a block device node, links followed.

    Raises:
        RefusedError: missing, or not a block device.
    """
    try:
        status = os.stat(path)
    except OSError as exc:
        raise RefusedError(
            f"device {path} does not exist or cannot be read: {exc.strerror}",
            hint="check 'devices' of the volume in the configuration, and ls -l /dev/disk/by-id",
            reason="device_missing",
        ) from exc
    if not stat.S_ISBLK(status.st_mode):
        raise RefusedError(f"{path} is not a block device", hint="name a disk, partition or LV", reason="not_block")
    return status.st_rdev


def sysfs_dir(path: PathLike) -> Path:
    """The sysfs directory of a block device (disk or partition)."""
    number = device_number(path)
    return Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}").resolve()


def disk_dir(path: PathLike) -> Path:
    """The sysfs directory of the whole disk that a device is, or is a partition of."""
    directory = sysfs_dir(path)
    return directory.parent if (directory / "partition").exists() else directory


def scheduler_of(disk: Path) -> str | None:
    """The I/O scheduler in use of a whole disk, by its sysfs directory; None when the kernel does not say."""
    try:
        words = (disk / "queue" / "scheduler").read_text().split()
    except OSError:
        return None
    return next((word.strip("[]") for word in words if word.startswith("[")), words[0] if words else None)


def schedulers_below(disk: Path) -> list[str]:
    """The I/O schedulers that requests to a disk meet: its own, or those of the disks that it is made of (dm, md).

    Args:
        disk: its sysfs directory. A disk that does not say what schedules it is left out.
    """
    below = disk / "slaves"
    parts = sorted(below.iterdir()) if below.is_dir() else []
    if not parts:
        own = scheduler_of(disk)
        return [] if own is None else [own]
    whole = {part.resolve().parent if (part / "partition").exists() else part.resolve() for part in parts}
    return sorted({name for part in whole for name in schedulers_below(part)})


@dataclass(frozen=True)
class WriteCounters:
    """What the kernel counted for a device since it appeared (Documentation/block/stat.rst).

    Attributes:
        writes: completed write requests, flushes of somebody's fsync among them, which write nothing;
            therefore they are shown and never compared. sectors_written: their 512-byte sectors.
        discards: completed discard requests. sectors_discarded: their sectors.
        counted: False when ``queue/iostats`` is 0 and the numbers say nothing.
    """

    writes: int = field(compare=False)
    sectors_written: int
    discards: int
    sectors_discarded: int
    counted: bool

    @property
    def untouched(self) -> bool:
        """True when the kernel counts and has counted no sector written or discarded.

        Requests without sectors do not count: a flush of a device (fsync, sync) is counted as a write
        of 0 sectors by some drivers, and it changes nothing.
        """
        return self.counted and not (self.sectors_written or self.sectors_discarded)

    def same_content(self, before: WriteCounters) -> bool:
        """True when no sector was written or discarded between two samples of one device."""
        return (self.sectors_written, self.sectors_discarded) == (before.sectors_written, before.sectors_discarded)

    def to_dict(self) -> dict[str, Any]:
        """For state files."""
        return dict(self.__dict__)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> WriteCounters:
        """From a state file."""
        return cls(**fields)


def write_counters(path: PathLike) -> WriteCounters:
    """Read the write counters of a device. Flush the device first if in-flight writes matter."""
    return _counters(sysfs_dir(path), disk_dir(path))


def _number_dir(number: int) -> Path:
    return Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")


def counters_of_number(number: int) -> WriteCounters:
    """The same for a device number.

    Raises:
        OSError: there is no such device any more.
    """
    directory = _number_dir(number)
    # The entry is a link into the disk's directory: a partition's parent is the disk.
    return _counters(directory, directory / ".." if (directory / "partition").exists() else directory)


def _counters(directory: Path, disk: Path) -> WriteCounters:
    fields = [int(word) for word in (directory / "stat").read_text().split()]
    fields += [0] * (17 - len(fields))
    try:
        counted = (disk / "queue" / "iostats").read_text().strip() != "0"
    except OSError:
        counted = False
    return WriteCounters(fields[4], fields[6], fields[11], fields[13], counted)


def writes_in_flight(number: int) -> int:
    """How many writes the kernel counts as begun and not ended (Documentation/block/stat.rst, ``inflight``).

    Raises:
        OSError: there is no such device any more.
    """
    return int((_number_dir(number) / "inflight").read_text().split()[1])


def extent_of_number(number: int) -> tuple[int, int] | None:
    """(first sector on the disk, sectors) of a device as the kernel has it now; None when it is gone."""
    directory = _number_dir(number)
    try:
        start = int(_text(directory / "start") or 0)
        return start, int((directory / "size").read_text())
    except (OSError, ValueError):
        return None


def boot_id() -> str:
    """Random id of this boot of the kernel."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def diskseq(path: PathLike) -> int | None:
    """Sequence number of the disk object (Linux 5.15 on), or None."""
    try:
        return int((disk_dir(path) / "diskseq").read_text())
    except (OSError, ValueError):
        return None


def _text(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace").strip() or None
    except OSError:
        return None


def identity(path: PathLike) -> dict[str, Any]:
    """What tells this device from another one across reboots: size and whatever unique names it has."""
    directory, disk = sysfs_dir(path), disk_dir(path)
    result: dict[str, Any] = {"size_bytes": int(_text(directory / "size") or 0) * SECTOR}
    for key, candidates in (
        ("serial", (disk / "serial", disk / "device" / "serial")),
        ("wwid", (disk / "wwid", disk / "device" / "wwid")),
        ("dm_uuid", (directory / "dm" / "uuid",)),
        ("md_uuid", (directory / "md" / "uuid",)),
        ("partition", (directory / "partition",)),
        ("start_sector", (directory / "start",)),
    ):
        value = next((text for text in map(_text, candidates) if text), None)
        if value is not None:
            result[key] = value
    return result


def read_exactly(fd: int, view: memoryview, offset: int) -> None:
    """Fill ``view`` from ``offset``; with O_DIRECT all of it must be whole logical blocks, aligned in memory too.

    Raises:
        OSError: device error, or the device ended early.
    """
    done, length = 0, len(view)
    while done < length:
        got = os.preadv(fd, [view[done:]], offset + done)
        if got <= 0:
            raise OSError(5, f"device ended at byte {offset + done}, {length - done} bytes early")
        done += got


class DirectReader:
    """Reads a device past the page cache into one aligned, reused buffer.

    Args:
        fd: opened O_RDONLY or O_RDWR with O_DIRECT.
        max_bytes: size of the buffer, the longest read.

    A buffered read of a mounted device is stale; never use one to ship data.
    """

    def __init__(self, fd: int, max_bytes: int) -> None:
        self.fd = fd
        self._map = mmap.mmap(-1, max(max_bytes, mmap.PAGESIZE))
        self._view = memoryview(self._map)

    def read(self, offset: int, length: int) -> memoryview:
        """``length`` bytes at ``offset``; valid until the next read. Both must be whole logical blocks.

        Raises:
            OSError: device error, or the device ended early.
        """
        view = self._view[:length]
        read_exactly(self.fd, view, offset)
        return view


def open_direct(path: PathLike, write: bool = False, exclusive: bool = False) -> int:
    """Open with O_DIRECT; ``exclusive`` adds O_EXCL, which for block devices means: nobody else's."""
    flags = (os.O_RDWR if write else os.O_RDONLY) | os.O_DIRECT | os.O_CLOEXEC
    return os.open(path, flags | (os.O_EXCL if exclusive else 0))


def superblock_digest(path: PathLike) -> str:
    """BLAKE2b-256 over the first and last MiB, read with O_DIRECT: where file systems keep their superblocks."""
    fd = open_direct(path)
    try:
        size = size_bytes(fd)
        reader = DirectReader(fd, MIB)
        digest = hashlib.blake2b(digest_size=32)
        digest.update(reader.read(0, min(MIB, size)))
        if size > MIB:
            tail = min(MIB, size - MIB)
            tail -= tail % logical_block_size(fd)
            digest.update(reader.read(size - tail, tail))
        return digest.hexdigest()
    finally:
        os.close(fd)


def zero_out(fd: int, offset: int, length: int) -> None:
    """Write zeroes by BLKZEROOUT: the blocks read back as zero; never a discard."""
    if is_block(fd):
        fcntl.ioctl(fd, BLKZEROOUT, struct.pack("QQ", offset, length))
        return
    zeroes = mmap.mmap(-1, MIB)
    done = 0
    while done < length:
        done += os.pwritev(fd, [memoryview(zeroes)[: min(MIB, length - done)]], offset + done)


def flush_buffers(fd: int) -> None:
    """BLKFLSBUF: write out and drop the device's page cache."""
    if is_block(fd):
        fcntl.ioctl(fd, BLKFLSBUF, 0)


def reread_partitions(fd: int) -> None:
    """BLKRRPART: read the partition table again.

    Raises:
        OSError: EINVAL for a device without partitions, EBUSY when one is in use.
    """
    fcntl.ioctl(fd, BLKRRPART, 0)


def mounts_of(path: PathLike) -> list[str]:
    """``PID: MOUNTPOINT`` for each mount of the device in any mount namespace of a live process."""
    return mounts_of_number(device_number(path))


def mounts_of_number(number: int) -> list[str]:
    """The same for a device number."""
    wanted = f"{os.major(number)}:{os.minor(number)}"
    seen_namespaces = set()
    found = []
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        try:
            namespace = os.readlink(process / "ns" / "mnt")
            if namespace in seen_namespaces:
                continue
            seen_namespaces.add(namespace)
            lines = (process / "mountinfo").read_text(errors="replace").splitlines()
        except OSError:
            continue
        for line in lines:
            words = line.split()
            if len(words) > 4 and words[2] == wanted:
                found.append(f"{process.name}: {words[4]}")
    return found


def _users(number: int) -> Iterator[tuple[str, str, bool]]:
    """Other processes that have the device open: number, name, and whether for writing."""
    for process in Path("/proc").iterdir():
        if not process.name.isdigit() or int(process.name) == os.getpid():
            continue
        flags = []
        # What ends or is closed while it is looked at has the device open no more; the rest of the process still may.
        with contextlib.suppress(OSError):
            for entry in (process / "fd").iterdir():
                with contextlib.suppress(OSError):
                    status = os.stat(entry)
                    if stat.S_ISBLK(status.st_mode) and status.st_rdev == number:
                        lines = (process / "fdinfo" / entry.name).read_text().splitlines()
                        flags += [int(line.split()[1], 8) for line in lines if line.startswith("flags:")]
        if not flags:
            continue
        try:
            command = (process / "comm").read_text().strip()
        except OSError:
            continue
        yield process.name, command, any(flag & os.O_ACCMODE != os.O_RDONLY for flag in flags)


def writers(path: PathLike) -> list[str]:
    """The processes, this one left out, that have the device open for writing, in words."""
    users = _users(device_number(path))
    return [f"open for writing in process {process} ({command})" for process, command, writes in users if writes]


def holders(path: PathLike) -> list[str]:
    """Who uses the device, in words: mounts, devices stacked on it, swap, processes that have it open."""
    result = [
        f"mounted at {where.split(': ', 1)[1]} (seen by process {where.split(':')[0]})" for where in mounts_of(path)
    ]
    directory = sysfs_dir(path)
    for parent in [directory] + [entry for entry in directory.iterdir() if (entry / "partition").exists()]:
        stacked = parent / "holders"
        if stacked.is_dir():
            result += [f"{parent.name} is part of {entry.name}" for entry in sorted(stacked.iterdir())]
    result += [f"open in process {process} ({command})" for process, command, _ in _users(device_number(path))]
    return result
