# SPDX-License-Identifier: GPL-3.0-or-later
"""In a guest: each way to change what a block device holds, alone and for a bounded time.

An operation returns how often it did what. One that is a generator makes preparations before its `yield`: then the
content is looked at, so that what they wrote cannot hide what the operation itself missed.

Promises: an operation that returns was carried out, and says how often; one that the device does not take raises
NotOffered with the reason. It must never do a bit of another operation to have something to show.
"""

from __future__ import annotations

import errno
import mmap
import os
import random
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.vm.kernel_guest import passthrough, workloads
from tests.vm.kernel_guest.command import run
from tests.vm.kernel_guest.devices import BMTEST_PARAMETERS, set_bmtest

WRITES = 40
FILES = 24
MADV_PAGEOUT = 21
PAGE = mmap.PAGESIZE
XFS_BYTES = 16 << 20
# Without these mkfs.xfs makes no file system of less than 300 MB.
SMALL_XFS = {"TEST_DIR": "1", "TEST_DEV": "1", "QA_CHECK_FS": "1"}


class NotOffered(Exception):
    """The device, or what is below it, does not do this; the text says why."""


@dataclass(frozen=True)
class Target:
    """Where an operation is carried out.

    path: of the device. seed: of its own. failing: makes writes of this device fail as long as it is entered, None if
    nothing can. on_bmtest: whether bmtest is below. first_sector: where the volume begins on the disk that executes
    commands. threads: how many may write at once.
    """

    path: str
    seed: int
    failing: Callable[[], AbstractContextManager[None]] | None
    on_bmtest: bool
    first_sector: int
    threads: int = 4

    def size(self) -> int:
        """Bytes."""
        fd = os.open(self.path, os.O_RDONLY)
        try:
            return os.lseek(fd, 0, os.SEEK_END)
        finally:
            os.close(fd)


Done = dict[str, int]
Steps = Generator[None, None, Done]
Operation = Callable[[Target], Done | Steps]


def _raw(*kinds: str) -> Callable[[Target], Done]:
    def do(target: Target) -> Done:
        try:
            return dict(workloads.raw(target.path, target.seed, WRITES, kinds, target.threads))
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            raise NotOffered("EOPNOTSUPP") from error

    return do


def _buffered(target: Target) -> Done:
    """Through the page cache; RawWriter ends with fsync."""
    return dict(workloads.raw(target.path, target.seed, WRITES, ("buffered",), target.threads))


def _fio(engine: str) -> Callable[[Target], Done]:
    def do(target: Target) -> Done:
        output = run(
            "fio",
            "--name=truth",
            f"--filename={target.path}",
            "--rw=randwrite",
            "--bsrange=4k-128k",
            "--direct=1",
            f"--io_size={3 << 20}",
            f"--ioengine={engine}",
            "--iodepth=16",
            "--thread",
            "--refill_buffers",
            f"--randseed={target.seed}",
            "--output-format=terse",
        )
        # Field 47 of the terse format, version 3: KiB written.
        return {"KiB": int(output.strip().splitlines()[-1].split(";")[46])}

    return do


def _mmap(target: Target) -> Done:
    """Pages of the device's page cache, changed in place, and msync."""
    pick = random.Random(target.seed)
    fd = os.open(target.path, os.O_RDWR)
    try:
        pages = target.size() // PAGE
        with mmap.mmap(fd, pages * PAGE) as memory:
            for _ in range(WRITES):
                first = pick.randrange(pages)
                count = min(pick.randrange(1, 16), pages - first)
                memory[first * PAGE : (first + count) * PAGE] = pick.randbytes(count * PAGE)
                memory.flush(first * PAGE, count * PAGE)
    finally:
        os.close(fd)
    return {"msync": WRITES}


def _passthrough(target: Target) -> Done:
    pick = random.Random(target.seed)
    data = pick.randbytes(4096)
    # Behind what LVM and md keep for themselves at the beginning of the disk below.
    sector = target.first_sector + pick.randrange(4096, 8192) // 8 * 8
    refusals = []
    for name, write in (("SG_IO", passthrough.scsi_write), ("NVME_IOCTL_IO_CMD", passthrough.nvme_write)):
        try:
            write(target.path, sector, data)
        except OSError as error:
            refusals.append(f"{name} {errno.errorcode.get(error.errno or 0, error.errno)}")
        else:
            return {name: 1}
    raise NotOffered(", ".join(refusals))


def _partial(target: Target) -> Done:
    """Writes of which the first half completes before the rest, and some that are queued twice; both late."""
    if not target.on_bmtest:
        raise NotOffered("no way to make this device do it")
    before = _counters()
    set_bmtest(partial=1, retry_every=5, delay_us=8000)
    try:
        done = dict(workloads.raw(target.path, target.seed, WRITES, ("write",), target.threads))
    finally:
        set_bmtest(partial=0, retry_every=0, delay_us=0)
    after = _counters()
    for name in ("partials", "retries"):
        done[name] = after[name] - before[name]
        if not done[name]:
            raise RuntimeError(f"the disk below made no {name}")
    return done


def _counters() -> Done:
    return {name: int((BMTEST_PARAMETERS / name).read_text()) for name in ("partials", "retries", "failures")}


def _failed(target: Target) -> Done:
    """Writes of which some end with an error."""
    if target.failing is None:
        raise NotOffered("no way to make this device do it")
    with target.failing():
        done = dict(workloads.raw(target.path, target.seed, WRITES, ("write",), target.threads, may_fail=True))
    if not done.get("write that failed"):
        raise RuntimeError(f"no write failed: {done}")
    return done


def _swapped_bytes(path: str) -> int:
    real = os.path.realpath(path)
    for line in Path("/proc/swaps").read_text().splitlines()[1:]:
        words = line.split()
        if os.path.realpath(words[0]) == real:
            return int(words[3]) * 1024
    return 0


def _swap(target: Target) -> Done:
    """Anonymous memory with random content goes out to the device and comes back as it was."""
    size = min(4 << 20, target.size() // 3)
    run("mkswap", target.path)
    run("swapon", "--priority", "32000", target.path)
    try:
        content = random.Random(target.seed).randbytes(size)
        with mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
            memory[:] = content
            end = time.monotonic() + 120
            while _swapped_bytes(target.path) < size // 2:
                if time.monotonic() > end:
                    raise TimeoutError(f"only {_swapped_bytes(target.path)} of {size} bytes went out")
                memory.madvise(MADV_PAGEOUT)
            out = _swapped_bytes(target.path)
            if memory[:] != content:
                raise RuntimeError("what came back from the swap space is not what went out")
    finally:
        run("swapoff", target.path)
    return {"KiB": out // 1024}


@contextmanager
def _environment(extra: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(extra)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _filesystem(kind: str, trim: bool = False) -> Operation:
    """mkfs and files; then files changed and removed, and unmount. trim: by fstrim, and not mounted with discard."""

    def do(target: Target) -> Steps:
        if kind == "xfs" and target.size() < XFS_BYTES:
            raise NotOffered("the device is too small for one")
        if trim and not _discards(target.path):
            raise NotOffered("the device takes no discards")
        filesystem = workloads.Filesystem(target.path, target.seed, kind, FILES, trim)
        with _environment(SMALL_XFS):
            filesystem.prepare()
        yield
        filesystem.work()
        return {"files": FILES}

    return do


def _discards(path: str) -> bool:
    name = os.path.basename(os.path.realpath(path))
    queue = Path(f"/sys/class/block/{name}").resolve()
    if not (queue / "queue").exists():
        queue = queue.parent
    return (queue / "queue/discard_max_bytes").read_text().strip() != "0"


OPERATIONS: dict[str, Operation] = {
    "write": _raw("write"),
    "fua": _raw("fua"),
    "buffered": _buffered,
    "aio": _fio("libaio"),
    "io_uring": _fio("io_uring"),
    "mmap": _mmap,
    "discard": _raw("discard"),
    "zeroes": _raw("zeroout", "zero_range", "punch"),
    "erase": _raw("erase"),
    "partial": _partial,
    "failed": _failed,
    "swap": _swap,
    "ext4": _filesystem("ext4"),
    "xfs": _filesystem("xfs"),
    "ext4-fstrim": _filesystem("ext4", trim=True),
    "xfs-fstrim": _filesystem("xfs", trim=True),
    "passthrough": _passthrough,
}
