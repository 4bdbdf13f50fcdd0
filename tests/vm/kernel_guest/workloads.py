# SPDX-License-Identifier: GPL-3.0-or-later
"""In a guest: ways to change a block device, each from a seed.

Promises that every sector that is written gets content it did not have, so that a missed record shows as a difference.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import random
import struct
import threading
from collections.abc import Callable

from tracker import SECTOR, run

BLKDISCARD = 0x1277
BLKZEROOUT = 0x127F
PUNCH_HOLE_KEEP_SIZE = 3
ZERO_RANGE_KEEP_SIZE = 0x11
MAX_BYTES = 1 << 20


def _logical_block_bytes(fd: int) -> int:
    return struct.unpack("i", fcntl.ioctl(fd, 0x1268, bytes(4)))[0]


class RawWriter:
    """Random writes, zeroes and discards of 512 bytes to 1 MiB, overlapping, also over the tail of the device."""

    def __init__(self, path: str, seed: int, kinds: tuple[str, ...]) -> None:
        self.random = random.Random(seed)
        self.kinds = kinds
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
        if kind in ("write", "fua", "buffered"):
            self.buffer[:length] = pick.randbytes(length)
            fd = {"write": self.direct, "fua": self.forced, "buffered": self.buffered}[kind]
            if os.pwritev(fd, [memoryview(self.buffer)[:length]], offset) != length:
                raise OSError("short write")
        elif kind == "discard":
            fcntl.ioctl(self.direct, BLKDISCARD, struct.pack("QQ", offset, length))
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
        os.fsync(self.buffered)
        for fd in (self.direct, self.forced, self.buffered):
            os.close(fd)


def _fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.fallocate(fd, mode, ctypes.c_long(offset), ctypes.c_long(length)):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def raw(path: str, seed: int, operations: int, kinds: tuple[str, ...], threads: int = 4) -> None:
    """Several RawWriters at once."""
    failures: list[BaseException] = []

    def work(number: int) -> None:
        writer = RawWriter(path, seed * 100 + number, kinds)
        try:
            for _ in range(operations // threads):
                writer.one()
        except BaseException as error:
            failures.append(error)
        finally:
            writer.close()

    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if failures:
        raise failures[0]


def filesystem(path: str, seed: int, kind: str, operations: int) -> None:
    """Files made, changed, cut and removed on a file system mounted with discard, then fstrim and unmount."""
    pick = random.Random(seed)
    options = {"ext4": ["-q", "-F", "-E", "nodiscard"], "xfs": ["-q", "-f", "-K"]}[kind]
    run(f"mkfs.{kind}", *options, path)
    directory = f"/run/kernel-test-{os.path.basename(path)}"
    os.makedirs(directory, exist_ok=True)
    run("mount", "-o", "discard", path, directory)
    try:
        for step in range(operations):
            name = f"{directory}/{pick.randrange(operations // 3)}"
            choice = pick.random()
            if choice < 0.6:
                with open(name, "ab" if pick.random() < 0.5 else "wb") as file:
                    file.write(pick.randbytes(pick.randrange(1, 100_000)))
            elif os.path.exists(name):
                if choice < 0.7:
                    os.truncate(name, os.path.getsize(name) // 2)
                else:
                    os.unlink(name)
            if step % 40 == 39:
                run("sync", "-f", directory)
        for name in os.listdir(directory):
            # Every other file: the free space is in many small pieces, freed in one transaction.
            if name.isdigit() and int(name) % 2:
                os.unlink(f"{directory}/{name}")
        run("sync", "-f", directory)
        run("fstrim", directory)
    finally:
        run("umount", directory)


def partition_table(path: str) -> None:
    """Two partitions on `path`: one from the first MiB, one up to the end, a gap between."""
    import subprocess

    sectors = int(run("blockdev", "--getsz", path))
    middle = sectors // 2 // 2048 * 2048
    table = f"label: gpt\nstart=2048, size={middle - 4096}\nstart={middle}\n"
    subprocess.run(["sfdisk", "-q", "--wipe", "always", path], input=table, text=True, check=True)
    run("udevadm", "settle")


ALL_KINDS = ("write", "write", "write", "fua", "discard", "zeroout", "zero_range", "punch")
WORKLOADS: dict[str, Callable[[str, int], None]] = {
    "raw": lambda path, seed: raw(path, seed, 480, ALL_KINDS),
    "writes": lambda path, seed: raw(path, seed, 400, ("write", "fua")),
    # Alone: the kernel refuses to mix the page cache with O_DIRECT on the same sectors.
    "buffered": lambda path, seed: raw(path, seed, 200, ("buffered",)),
    "discards": lambda path, seed: raw(path, seed, 400, ("write", "discard", "punch", "discard")),
    "zeroes": lambda path, seed: raw(path, seed, 300, ("write", "zeroout", "zero_range")),
    "ext4": lambda path, seed: filesystem(path, seed, "ext4", 400),
    "xfs": lambda path, seed: filesystem(path, seed, "xfs", 400),
}
