# SPDX-License-Identifier: GPL-3.0-or-later
"""Claims and reads of a walk, in a thread ahead of the one that sends.

Promises: a block is read after it was claimed, by the thread that claimed it, so that a write that the
read misses makes it dirty again; each claim comes out whole, in order, in one or more batches, also when
the walk is interrupted: what was claimed is sent. Memory is bounded: BUFFERS aligned buffers of BUFFER_BYTES,
used again and again; a batch is valid until it is given back. It must never read what is not claimed to fill up
a gap, and never send.
"""

from __future__ import annotations

import mmap
import queue
import threading
import time
from collections.abc import Iterator
from typing import Callable, NamedTuple

from bmigrate.common import faults
from bmigrate.ship.pacer import Pacer
from bmigrate.ship.session import Session
from bmigrate.ship.source import SourceVolume
from bmigrate.ship.window import Claim

CLAIM_BYTES = 4 << 20
BUFFERS = 8
BUFFER_BYTES = 1 << 20
Observer = Callable[[str, list[tuple[int, int]]], None]
Run = tuple[int, memoryview]
"""Offset on the volume in bytes, and the data that was read there."""


class Batch(NamedTuple):
    """Some of a claim, read. ``last``: the claim ends with it."""

    volume: SourceVolume
    claim: Claim
    runs: list[Run]
    buffer: memoryview
    last: bool


class ReadAhead:
    """One walk over everything dirty, as batches. Iterate, ``give_back`` each batch, and ``close`` in any case.

    Args:
        interrupted: asked before each claim, in the reading thread. What it raises ends the walk too, and is
            kept in ``refused``: the caller raises it after it has sent what was claimed before.
        observer: called with each claim's volume and extents before they are read, in the reading thread.

    Attributes:
        complete: False when the walk was interrupted.
    """

    def __init__(
        self, session: Session, pacer: Pacer, interrupted: Callable[[], bool], observer: Observer | None = None
    ) -> None:
        self.complete = True
        self.refused: Exception | None = None
        self._session = session
        self._pacer = pacer
        self._interrupted = interrupted
        self._observer = observer
        self._failure: BaseException | None = None
        self._stopping = False
        self._free: queue.SimpleQueue[memoryview | None] = queue.SimpleQueue()
        self._ready: queue.SimpleQueue[Batch | None] = queue.SimpleQueue()
        for _ in range(BUFFERS):
            self._free.put(memoryview(mmap.mmap(-1, BUFFER_BYTES)))
        self._thread = threading.Thread(target=self._run, name=f"{session.config.workload}-read", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Batch]:
        """The batches, in the order in which they were read.

        Raises:
            BmigrateError: a read failed, or the session is over.
        """
        while True:
            batch = self._ready.get()
            if batch is not None:
                yield batch
                continue
            if self._failure is not None:
                raise self._failure
            return

    def give_back(self, batch: Batch) -> None:
        """Its data was sent."""
        self._free.put(batch.buffer)

    def close(self) -> None:
        """Stop reading and wait for the thread. What is claimed and was not handed out stays claimed."""
        self._stopping = True
        self._free.put(None)
        self._thread.join()

    # -- the reading thread ------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._walk()
        except BaseException as exc:
            self._failure = exc
        finally:
            self._ready.put(None)

    def _stop_now(self) -> bool:
        try:
            if not self._interrupted():
                return False
        except Exception as exc:
            self.refused = exc
        self.complete = False
        return True

    def _walk(self) -> None:
        for volume in self._session.volumes:
            offset = 0
            while offset < volume.size_bytes:
                if self._stopping or self._stop_now():
                    return
                self._pacer.enter()
                claim = self._session.claim(volume, offset, CLAIM_BYTES)
                if claim is None:
                    break
                if self._observer is not None:
                    self._observer(volume.name, claim.extents)
                if not self._read(volume, claim):
                    return
                offset = claim.next_offset

    def _read(self, volume: SourceVolume, claim: Claim) -> bool:
        """Read all of a claim; False when nobody wants it any more."""
        buffer = self._free.get()
        if buffer is None:
            return False
        used = 0
        runs: list[Run] = []
        for offset, length in claim.extents:
            while length:
                if used == BUFFER_BYTES:
                    self._ready.put(Batch(volume, claim, runs, buffer, False))
                    buffer = self._free.get()
                    if buffer is None:
                        return False
                    used, runs = 0, []
                step = min(length, BUFFER_BYTES - used, self._pacer.read_bytes(volume.number))
                view = buffer[used : used + step]
                began = time.monotonic()
                volume.read_into(view, offset)
                spent = time.monotonic() - began
                self._pacer.charge("source_read", spent)
                self._pacer.rest(volume.number, step, spent)
                faults.point("ship.read")
                runs.append((offset, view))
                used += step
                offset += step
                length -= step
        self._ready.put(Batch(volume, claim, runs, buffer, True))
        return True
