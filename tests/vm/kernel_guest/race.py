# SPDX-License-Identifier: GPL-3.0-or-later
"""In a guest: the race that all rests on. A slow disk is copied as the shipper does it while writes are in flight.

usage: race.py --seed N

The copier takes records (which clears them), then reads those sectors from the disk into the copy, over and over, while
writes take tens of milliseconds and complete in two halves. At the end, after a barrier, copy and disk must be equal in
each bit: the last look at a sector came after the record of the last write to it, and that record after the write.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import threading
from typing import Any

import numpy

from bmigrate.kernel.channel import Batch, Channel
from bmigrate.kernel.control import Control
from tests.vm.kernel_guest import devices, workloads
from tests.vm.kernel_guest.tracker import SECTOR

MIB = 1 << 20
DELAY_MICROSECONDS = 40_000
OPERATIONS = 240
THREADS = 12


class Copier:
    """The copy of a disk, and how it is kept."""

    def __init__(self, path: str, channel: Channel) -> None:
        self.channel = channel
        self.fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
        self.size = os.lseek(self.fd, 0, os.SEEK_END)
        self.copy = bytearray(self.size)
        self.buffer = mmap.mmap(-1, MIB)
        self.reads = self.reads_in_flight = 0
        self.in_flight = os.path.realpath(f"/sys/block/{os.path.basename(path)}/inflight")

    def read(self, start: int, end: int, into: bytearray | None = None) -> None:
        """Bytes of the disk, as it has them now."""
        copy = self.copy if into is None else into
        while start < end:
            length = min(MIB, end - start)
            with memoryview(self.buffer) as view, view[:length] as part:
                if os.preadv(self.fd, [part], start) != length:
                    raise OSError("short read")
                copy[start : start + length] = part
            start += length

    def take(self, batch: Batch) -> None:
        """Clear what a batch says, then read it."""
        dirty = numpy.zeros(self.size // SECTOR + 2, dtype=bool)
        for sector, count, _, _, _ in batch.records.tolist():
            dirty[sector + 1 : sector + count + 1] = True
        self.channel.consumed(batch.seq)
        edges = numpy.flatnonzero(dirty[1:] != dirty[:-1]).tolist()
        for first, last in zip(edges[::2], edges[1::2]):
            with open(self.in_flight) as file:
                self.reads_in_flight += int(file.read().split()[1]) > 0
            self.reads += 1
            self.read(first * SECTOR, last * SECTOR)

    def take_all(self) -> bool:
        """What the log has now; whether it had something."""
        batch = self.channel.read_batch()
        if batch is None:
            return False
        self.take(batch)
        return True


def race(path: str, seed: int) -> dict[str, Any]:
    """Writers against the copier; how many sectors of the copy are wrong."""
    with Control() as control, Channel() as channel:
        fd = os.open(path, os.O_RDONLY)
        attachment = control.attach(fd, 65536)
        os.close(fd)
        copier = Copier(path, channel)
        copier.read(0, copier.size)
        over = threading.Event()
        failures: list[BaseException] = []

        def copy() -> None:
            try:
                while not over.is_set():
                    if not copier.take_all():
                        over.wait(0.001)
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=copy)
        thread.start()
        devices.set_bmtest(delay_us=DELAY_MICROSECONDS, partial=1)
        try:
            done = workloads.raw(path, seed, OPERATIONS, ("write", "write", "discard", "zeroout"), threads=THREADS)
        finally:
            devices.set_bmtest(delay_us=0, partial=0)
            over.set()
            thread.join()
        if failures:
            raise failures[0]
        barrier = channel.barrier()
        while not channel.passed(barrier):
            copier.take_all()
        truth = bytearray(copier.size)
        copier.read(0, copier.size, truth)
        os.close(copier.fd)
        control.detach(attachment.slot, attachment.attachment_id)
        wrong = numpy.frombuffer(truth, numpy.uint8) != numpy.frombuffer(copier.copy, numpy.uint8)
        return {
            "done": dict(done),
            "wrong_sectors": int(wrong.reshape(-1, SECTOR).any(axis=1).sum()),
            "reads": copier.reads,
            "reads_in_flight": copier.reads_in_flight,
            "partials": int((devices.BMTEST_PARAMETERS / "partials").read_text()),
        }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, required=True)
    options = parser.parse_args()
    devices.drop_bmtest()
    path = devices.bmtest()
    try:
        print(json.dumps(race(path, options.seed)))
    finally:
        devices.drop_bmtest()


if __name__ == "__main__":
    main()
