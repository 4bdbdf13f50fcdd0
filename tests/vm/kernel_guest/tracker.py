# SPDX-License-Identifier: GPL-3.0-or-later
"""In a guest: one attached volume, what the log said of it, and what really changed.

Promises to compare the kernel's log with the truth: fingerprints of every 512-byte sector, read with O_DIRECT
before and after. It must never look at what the workload believes it wrote.
"""

from __future__ import annotations

import mmap
import os
import select
import time
from collections.abc import Callable, Iterator

import numpy

from bmigrate.kernel import abi
from bmigrate.kernel.channel import Barrier, Batch, Channel
from bmigrate.kernel.control import Control

SECTOR = 512
CHUNK = 4 << 20
LIMIT_SECONDS = 120


def fingerprints(path: str) -> numpy.ndarray:
    """A 64-bit fingerprint of each sector of the device `path`, as the device has it now."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    factors = numpy.random.default_rng(7).integers(1, 2**63, size=SECTOR // 8, dtype=numpy.uint64) | numpy.uint64(1)
    parts = []
    try:
        size = os.lseek(fd, 0, os.SEEK_END)
        with mmap.mmap(-1, CHUNK) as buffer:
            offset = 0
            while offset < size:
                got = os.preadv(fd, [buffer], offset)
                if got <= 0:
                    raise OSError(f"{path}: short read at {offset}")
                words = numpy.frombuffer(buffer, dtype=numpy.uint64, count=got // 8).reshape(-1, SECTOR // 8)
                parts.append((words * factors).sum(axis=1, dtype=numpy.uint64))
                del words
                offset += got
    finally:
        os.close(fd)
    return numpy.concatenate(parts)


def batches(channel: Channel, limit_seconds: float = 0) -> Iterator[Batch]:
    """Batches as they come, each consumed when the next is asked for.

    Ends when nothing is left, and nothing came for so long.
    """
    while True:
        batch = channel.read_batch()
        if batch is None:
            poll = select.poll()
            poll.register(channel, select.POLLIN)
            if not poll.poll(limit_seconds * 1000):
                return
            continue
        yield batch
        channel.consumed(batch.seq)


def drain(channel: Channel, note: Callable[[Batch], None]) -> Barrier:
    """Everything that has completed by now was noted when this returns."""
    barrier = channel.barrier()
    end = time.monotonic() + LIMIT_SECONDS
    while not channel.passed(barrier):
        if time.monotonic() > end:
            raise TimeoutError(f"the barrier is not passed: {channel.stats()}")
        for batch in batches(channel):
            note(batch)
    return barrier


class Tracked:
    """A volume under protection: attach at the start, detach at the end, and all records in between as a map."""

    def __init__(self, path: str, region_bytes: int = 65536, channel: Channel | None = None) -> None:
        self.path = path
        self.control = Control()
        fd = os.open(path, os.O_RDONLY)
        try:
            self.attachment = self.control.attach(fd, region_bytes, bio_based=True)
        finally:
            os.close(fd)
        self.channel = channel or Channel()
        self.map = numpy.zeros(self.attachment.sectors, dtype=bool)
        self.exact = numpy.zeros(self.attachment.sectors, dtype=bool)
        self.records = self.widened = self.failed = self.beyond = self.foreign = 0

    def note(self, batch: Batch) -> None:
        """Put the batch's records into the maps."""
        for sector, count, slot, _, flags in batch.records.tolist():
            if slot != self.attachment.slot:
                self.foreign += 1
                continue
            first = sector - self.attachment.start_sector
            self.records += 1
            self.failed += bool(flags & abi.FLAG_FAILED)
            self.beyond += sector + count > self.attachment.start_sector + self.attachment.sectors
            self.map[first : first + count] = True
            if flags & abi.FLAG_WIDENED:
                self.widened += 1
            else:
                self.exact[first : first + count] = True

    def batches(self, limit_seconds: float = 0) -> Iterator[Batch]:
        """Batches as they come, each consumed when the next is asked for; ends when nothing is left."""
        return batches(self.channel, limit_seconds)

    def drain(self) -> Barrier:
        """Everything that has completed by now is in the map when this returns."""
        os.sync()
        return drain(self.channel, self.note)

    def stats(self) -> dict[str, int]:
        """The kernel's counters of this attachment."""
        return dict(vars(self.control.stats(self.attachment.slot, self.attachment.attachment_id)))

    def detach(self) -> None:
        """End the attachment and let go of the channel."""
        self.control.detach(self.attachment.slot, self.attachment.attachment_id)
        self.channel.close()
        self.control.close()


def verdict(tracked: Tracked, before: numpy.ndarray, after: numpy.ndarray) -> dict[str, object]:
    """Changed sectors, and those of them that the log did not have."""
    changed = before != after
    missed = numpy.flatnonzero(changed & ~tracked.map)
    return {
        "changed": int(changed.sum()),
        "missed": len(missed),
        "missed_first": missed[:8].tolist(),
        "marked": int(tracked.map.sum()),
        "records": tracked.records,
        "widened": tracked.widened,
        "failed": tracked.failed,
        "beyond": tracked.beyond,
        "foreign": tracked.foreign,
        "missed_without_overflow": int((changed & ~tracked.exact).sum()),
        "blind": any(item.blind for item in tracked.control.list()),
        "stats": tracked.stats(),
        "channel": dict(vars(tracked.channel.stats())),
    }
