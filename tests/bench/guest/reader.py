# SPDX-License-Identifier: GPL-3.0-or-later
"""Runs in a guest: attaches a device and consumes its records as breqd does, until it is told to stop.

What it does with a batch is breqd's own code in breqd's order: the product's channel, translation of records and maps;
only the bitmap file is memory without a file. It says `started`; a line `attach DEVICE` on standard input is answered
with `ready`, `detach` with the numbers of sectors, records, batches and widened batches, when all have been consumed.
"""

from __future__ import annotations

import os
import select
import time

import numpy

from bmigrate.breqd.maps import Maps
from bmigrate.breqd.records import Slots
from bmigrate.kernel.channel import Channel
from bmigrate.kernel.control import Control

GRANULE_BYTES = 4096


class Reader:
    """The volume under protection and its log."""

    def __init__(self, path: str) -> None:
        self.control = Control()
        self.channel = Channel()
        fd = os.open(path, os.O_RDONLY)
        try:
            self.attached = self.control.attach(fd, bio_based=True)
        finally:
            os.close(fd)
        size_bytes = self.attached.sectors * 512
        mirror = numpy.zeros(-(-size_bytes // GRANULE_BYTES // 8), dtype=numpy.uint8)
        self.maps = Maps()
        self.maps.add(("bench", path), size_bytes, GRANULE_BYTES, mirror, mirror.copy(), time.monotonic())
        self.slots = Slots()
        self.slots.put(self.attached.slot, self.attached.start_sector, size_bytes, GRANULE_BYTES, 0)
        self.sectors = self.records = self.batches = self.widened = 0

    def consume(self) -> None:
        """All batches that there are."""
        batch = self.channel.read_batch()
        while batch is not None:
            ranges = self.slots.ranges(batch.records)
            self.maps.mark(ranges.starts, ranges.ends, time.monotonic(), ranges.failed)
            self.sectors += int(batch.records["nr_sectors"].sum())
            self.records += len(batch.records)
            self.batches += 1
            self.widened += batch.widened
            self.channel.consumed(batch.seq)
            batch = self.channel.read_batch()

    def detach(self) -> str:
        """Stop recording, consume what is left; what was consumed in all."""
        self.control.detach(self.attached.slot, self.attached.attachment_id)
        self.consume()
        left = [a.slot for a in self.control.list()]
        assert not left, f"slots {left} are not drained"
        self.channel.close()
        self.control.close()
        return f"{self.sectors} {self.records} {self.batches} {self.widened}"


def main() -> None:
    """Commands on standard input; ends with it."""
    reader: Reader | None = None
    waiting = select.poll()
    waiting.register(0, select.POLLIN)
    print("started", flush=True)
    while True:
        command = next_command(waiting, reader).decode().split()
        if not command:
            return
        if command[0] == "attach":
            reader = Reader(command[1])
            waiting.register(reader.channel, select.POLLIN)
            print("ready", flush=True)
        elif reader is not None:
            waiting.unregister(reader.channel)
            print(reader.detach(), flush=True)
            reader = None


def next_command(waiting: select.poll, reader: Reader | None) -> bytes:
    """The next line on standard input, empty at its end; until it comes, the log is consumed."""
    while True:
        ready = [fd for fd, _ in waiting.poll()]
        if reader is not None:
            reader.consume()
        if 0 in ready:
            return os.read(0, 4096)


if __name__ == "__main__":
    main()
