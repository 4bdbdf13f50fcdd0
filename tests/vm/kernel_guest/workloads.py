# SPDX-License-Identifier: GPL-3.0-or-later
"""In a guest: ways to change a block device, each from a seed.

Promises that every sector that is written gets content it did not have, so that a missed record shows as a difference.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import random
import struct
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import closing

from tests.vm.kernel_guest.command import run
from tests.vm.kernel_guest.tracker import SECTOR

BLKDISCARD = 0x1277
BLKSECDISCARD = 0x127D
BLKZEROOUT = 0x127F
PUNCH_HOLE_KEEP_SIZE = 3
ZERO_RANGE_KEEP_SIZE = 0x11
MAX_BYTES = 1 << 20


def _logical_block_bytes(fd: int) -> int:
    return struct.unpack("i", fcntl.ioctl(fd, 0x1268, bytes(4)))[0]


class RawWriter:
    """Random writes, zeroes and discards of 512 bytes to 1 MiB, overlapping, also over the tail of the device."""

    def __init__(self, path: str, seed: int, kinds: tuple[str, ...], may_fail: bool = False) -> None:
        self.random = random.Random(seed)
        self.kinds = kinds
        self.may_fail = may_fail
        self.done: Counter[str] = Counter()
        self.direct = os.open(path, os.O_RDWR | os.O_DIRECT)
        self.forced = os.open(path, os.O_RDWR | os.O_DIRECT | os.O_DSYNC)
        self.buffered = os.open(path, os.O_RDWR)
        self.size = os.lseek(self.direct, 0, os.SEEK_END)
        self.block = _logical_block_bytes(self.direct)
        self.buffer = mmap.mmap(-1, MAX_BYTES)

    def one(self) -> None:
        """One operation."""
        pick = self.random
        length = min(max(self.block, SECTOR << pick.randrange(12)), self.size)
        offset = pick.randrange(0, (self.size - length) // self.block + 1) * self.block
        if pick.random() < 0.05:
            offset = (self.size - length) // self.block * self.block
        kind = pick.choice(self.kinds)
        try:
            self._do(kind, offset, length)
            self.done[kind] += 1
        except OSError as error:
            if error.errno in (errno.EIO, errno.EILSEQ) and self.may_fail:
                self.done[f"{kind} that failed"] += 1
                return
            if error.errno != errno.EOPNOTSUPP or len(set(self.kinds)) == 1:
                raise
            # The result says what was done: a device that refuses what it should do is seen there.
            self.kinds = tuple(other for other in self.kinds if other != kind)

    def _do(self, kind: str, offset: int, length: int) -> None:
        if kind in ("write", "fua", "buffered"):
            self.buffer[:length] = self.random.randbytes(length)
            fd = {"write": self.direct, "fua": self.forced, "buffered": self.buffered}[kind]
            if os.pwritev(fd, [memoryview(self.buffer)[:length]], offset) != length:
                raise OSError("short write")
        elif kind == "discard":
            fcntl.ioctl(self.direct, BLKDISCARD, struct.pack("QQ", offset, length))
        elif kind == "erase":
            fcntl.ioctl(self.direct, BLKSECDISCARD, struct.pack("QQ", offset, length))
        elif kind == "zeroout":
            fcntl.ioctl(self.direct, BLKZEROOUT, struct.pack("QQ", offset, length))
        elif kind == "zero_range":
            _fallocate(self.direct, ZERO_RANGE_KEEP_SIZE, offset, length)
        elif kind == "punch":
            _fallocate(self.direct, PUNCH_HOLE_KEEP_SIZE, offset, length)
        else:
            raise ValueError(kind)

    def close(self) -> None:
        """Write back what is buffered."""
        try:
            os.fsync(self.buffered)
        except OSError as error:
            if error.errno != errno.EIO or not self.may_fail:
                raise
        for fd in (self.direct, self.forced, self.buffered):
            os.close(fd)


def _fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.fallocate(fd, mode, ctypes.c_long(offset), ctypes.c_long(length)):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def raw(
    path: str, seed: int, operations: int, kinds: tuple[str, ...], threads: int = 4, may_fail: bool = False
) -> Counter[str]:
    """Several RawWriters at once; how many operations of each kind were done.

    may_fail: operations that end with an input/output error are counted, and the rest goes on.
    """
    failures: list[BaseException] = []
    done: Counter[str] = Counter()

    def work(number: int) -> None:
        try:
            with closing(RawWriter(path, seed * 100 + number, kinds, may_fail)) as writer:
                for _ in range(operations // threads):
                    writer.one()
        except BaseException as error:
            failures.append(error)
        else:
            done.update(writer.done)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if failures:
        raise failures[0]
    return done


class Raw:
    """Random operations on the bare device."""

    def __init__(self, path: str, seed: int, operations: int, kinds: tuple[str, ...]) -> None:
        self.arguments = (path, seed, operations, kinds)
        self.done: Counter[str] = Counter()

    def prepare(self) -> None:
        """Nothing to do before the truth is read for the first time."""

    def work(self) -> None:
        """All operations."""
        self.done = raw(*self.arguments)


class Filesystem:
    """Files made, changed, cut and removed on a file system mounted with discard, or with an fstrim at the end.

    It is made and filled before the truth is read for the first time, so that the removal of old files is known by its
    discards alone. fstrim marks nearly all of the device, and would hide what discards before it missed: never both.
    """

    def __init__(self, path: str, seed: int, kind: str, operations: int, trim: bool) -> None:
        self.path, self.kind, self.operations, self.trim = path, kind, operations, trim
        self.random = random.Random(seed)
        self.done: Counter[str] = Counter()
        self.directory = f"/run/kernel-test-{os.path.basename(path)}"

    def _name(self) -> str:
        return f"{self.directory}/{self.random.randrange(self.operations)}"

    def _settle(self) -> None:
        run("sync", "-f", self.directory)

    def prepare(self) -> None:
        """mkfs, mount, and fill with many small files."""
        options = {"ext4": ["-q", "-F", "-E", "nodiscard"], "xfs": ["-q", "-f", "-K"]}[self.kind]
        run(f"mkfs.{self.kind}", *options, self.path)
        os.makedirs(self.directory, exist_ok=True)
        run("mount", *(() if self.trim else ("-o", "discard")), self.path, self.directory)
        for number in range(self.operations):
            with open(f"{self.directory}/{number}", "wb") as file:
                file.write(self.random.randbytes(self.random.randrange(1, 60_000)))
        self._settle()

    def work(self) -> None:
        """Change it, remove every other file, unmount."""
        try:
            for step in range(self.operations // 2):
                name, choice = self._name(), self.random.random()
                if choice < 0.3:
                    with open(name, "ab") as file:
                        file.write(self.random.randbytes(self.random.randrange(1, 60_000)))
                elif os.path.exists(name):
                    if choice < 0.5:
                        os.truncate(name, os.path.getsize(name) // 2)
                    else:
                        os.unlink(name)
                if step % 40 == 39:
                    self._settle()
            for name in os.listdir(self.directory):
                # Every other one: the space is in many small pieces, freed in one transaction.
                if name.isdigit() and int(name) % 2:
                    os.unlink(f"{self.directory}/{name}")
            self._settle()
            if self.trim:
                run("fstrim", self.directory)
        finally:
            run("umount", self.directory)


def partition_table(path: str, later: int = 0) -> None:
    """Two partitions on `path`: one from the first MiB, one up to the end that begins so much later, a gap between."""
    import subprocess

    sectors = int(run("blockdev", "--getsz", path))
    middle = sectors // 2 // 2048 * 2048
    table = f"label: gpt\nstart=2048, size={middle - 4096}\nstart={middle + later}\n"
    subprocess.run(["sfdisk", "-q", "--wipe", "always", path], input=table, text=True, check=True)
    run("udevadm", "settle")


ALL_KINDS = ("write", "write", "write", "fua", "discard", "zeroout", "zero_range", "punch")
WORKLOADS: dict[str, Callable[[str, int], Raw | Filesystem]] = {
    "raw": lambda path, seed: Raw(path, seed, 400, ALL_KINDS),
    # Alone: the kernel refuses to mix the page cache with O_DIRECT on the same sectors.
    "buffered": lambda path, seed: Raw(path, seed, 200, ("buffered",)),
    "ext4": lambda path, seed: Filesystem(path, seed, "ext4", 160, True),
    "ext4-removal": lambda path, seed: Filesystem(path, seed, "ext4", 400, False),
    "xfs-removal": lambda path, seed: Filesystem(path, seed, "xfs", 600, False),
}
