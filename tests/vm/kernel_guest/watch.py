# SPDX-License-Identifier: GPL-3.0-or-later
"""In a guest: several volumes attached at once, and what the log said of each since it was last asked.

Promises to compare the kernel's log with the truth, as tracker.py does, but step by step: the content after one step is
the content before the next. It must never look at what the workload believes it wrote.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy

from bmigrate.kernel import abi
from bmigrate.kernel.channel import Batch, Channel
from bmigrate.kernel.control import Attachment, AttachmentStats, Control
from tests.vm.kernel_guest.tracker import batches, drain, fingerprints


@dataclass
class Volume:
    """One attachment.

    `map`: what the log had since the last look at the content began. `since`: the same, kept for the next look: what is
    written while a look is under way may be in the content or not, and counts for both.
    """

    path: str
    attachment: Attachment
    content: numpy.ndarray
    map: numpy.ndarray
    since: numpy.ndarray
    counts: dict[str, int] = field(default_factory=dict)
    stats: AttachmentStats | None = None

    def clear(self) -> None:
        """Begin a step."""
        self.map[:] = self.since
        self.counts = {"records": 0, "widened": 0, "failed": 0}

    def note(self, sector: int, count: int, flags: int) -> None:
        """One record."""
        first = sector - self.attachment.start_sector
        for one in (self.map, self.since):
            one[first : first + count] = True
        self.counts["records"] += 1
        self.counts["widened"] += bool(flags & abi.FLAG_WIDENED)
        self.counts["failed"] += bool(flags & abi.FLAG_FAILED)


class Watch:
    """The attachments of one test; used by one thread at a time."""

    def __init__(self, paths: list[str], region_bytes: int = 65536) -> None:
        self.control, self.channel = Control(), Channel()
        self.volumes: dict[int, Volume] = {}
        self.foreign = 0
        attached: list[Attachment] = []
        try:
            for path in paths:
                fd = os.open(path, os.O_RDONLY)
                try:
                    attached.append(self.control.attach(fd, region_bytes, bio_based=True))
                finally:
                    os.close(fd)
        except BaseException:
            for one in attached:
                self.control.detach(one.slot, one.attachment_id)
            self.control.close()
            self.channel.close()
            raise
        for path, one in zip(paths, attached):
            empty = numpy.zeros(one.sectors, dtype=bool)
            self.volumes[one.slot] = Volume(path, one, fingerprints(path), empty, empty.copy())

    def read(self, limit_seconds: float = 0) -> None:
        """Take what is in the log, waiting so long for the first of it."""
        for batch in batches(self.channel, limit_seconds):
            self.note(batch)

    def note(self, batch: Batch) -> None:
        """Put the batch's records into the volumes' maps."""
        for sector, count, slot, _, flags in batch.records.tolist():
            if slot in self.volumes:
                self.volumes[slot].note(sector, count, flags)
            else:
                self.foreign += 1

    def drain(self) -> None:
        """Everything that has completed by now is in the maps when this returns."""
        drain(self.channel, self.note)

    @contextmanager
    def step(self) -> Iterator[None]:
        """What happens in here is compared by `verdicts`; the log is read meanwhile."""
        for volume in self.volumes.values():
            volume.clear()
            volume.stats = self._stats(volume)
        over = threading.Event()

        def read() -> None:
            while not over.is_set():
                self.read(0.2)

        reader = threading.Thread(target=read)
        reader.start()
        try:
            yield
        finally:
            over.set()
            reader.join()

    def verdicts(self) -> list[dict[str, Any]]:
        """For each volume: what changed since the last call, and what of it the log did not have."""
        os.sync()
        self.drain()
        found = []
        for volume in self.volumes.values():
            volume.since[:] = False
        now = {slot: fingerprints(volume.path) for slot, volume in self.volumes.items()}
        # What was written between the barrier and the end of the look is in the content, or will be in the next.
        self.drain()
        blind = {item.slot: item.blind for item in self.control.list()}
        for slot, volume in self.volumes.items():
            changed = volume.content != now[slot]
            missed = numpy.flatnonzero(changed & ~volume.map)
            volume.content = now[slot]
            before, after = volume.stats, self._stats(volume)
            assert before is not None
            kinds = {name: value - getattr(before, name) for name, value in vars(after).items() if name != "regions"}
            found.append(
                {
                    "path": volume.path,
                    "changed": int(changed.sum()),
                    "missed": len(missed),
                    "missed_first": missed[:8].tolist(),
                    "marked": int(volume.map.sum()),
                    "sectors": len(changed),
                    "blind": blind[slot],
                    "kinds": {name: value for name, value in kinds.items() if value},
                    **volume.counts,
                }
            )
        return found

    def _stats(self, volume: Volume) -> AttachmentStats:
        return self.control.stats(volume.attachment.slot, volume.attachment.attachment_id)

    def close(self) -> None:
        """Detach everything and let go of the channel."""
        for volume in self.volumes.values():
            self.control.detach(volume.attachment.slot, volume.attachment.attachment_id)
        self.read()
        self.channel.close()
        self.control.close()
