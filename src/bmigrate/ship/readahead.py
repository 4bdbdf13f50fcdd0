# SPDX-License-Identifier: GPL-3.0-or-later
"""Claims and reads of a walk, in a thread ahead of the one that sends; with several streams, one such pair for each.

Promises: a block is read after it was claimed, by the thread that claimed it or for it, so that a write that the
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
from bmigrate.common.scatter import Scatter
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


class Walk:
    """The claims of one walk over everything dirty, ascending; several readers may take from it.

    Args:
        interrupted: asked before each claim, in the reading thread. What it raises ends the walk too, and is
            kept in ``refused``: the caller raises it after it has sent what was claimed before.
        observer: called with each claim's volume and extents before they are read, in the reading thread.

    Attributes:
        complete: False when the walk was interrupted.
    """

    def __init__(self, session: Session, interrupted: Callable[[], bool], observer: Observer | None = None) -> None:
        self.complete = True
        self.refused: Exception | None = None
        self._session = session
        self._interrupted = interrupted
        self._observer = observer
        self._lock = threading.Lock()
        self._volumes = iter(session.volumes)
        self._volume: SourceVolume | None = next(self._volumes, None)
        self._offset = 0

    def next(self) -> tuple[SourceVolume, Claim] | None:
        """The next claim, or None at the end of the walk.

        Raises:
            BmigrateError: the session is over.
        """
        with self._lock:
            while self._volume is not None:
                volume = self._volume
                if self._offset < volume.size_bytes:
                    if not self.complete or self._stop_now():
                        return None
                    claim = self._session.claim(volume, self._offset, CLAIM_BYTES)
                    if claim is not None:
                        self._offset = claim.next_offset
                        if self._observer is not None:
                            self._observer(volume.name, claim.extents)
                        return volume, claim
                self._volume, self._offset = next(self._volumes, None), 0
            return None

    def _stop_now(self) -> bool:
        try:
            if not self._interrupted():
                return False
        except Exception as exc:
            self.refused = exc
        self.complete = False
        return True


class ReadAhead:
    """The batches of one reader of a walk. Iterate, ``give_back`` each batch, and ``close`` in any case."""

    def __init__(self, session: Session, pacer: Pacer, walk: Walk) -> None:
        self._pacer = pacer
        self._claims = walk
        self._failure: BaseException | None = None
        self._stopping = False
        self._scatter = Scatter(f"{session.config.workload}-scatter", pacer.enter)
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
        self._scatter.close()

    # -- the reading thread ------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._walk()
        except BaseException as exc:
            self._failure = exc
        finally:
            self._ready.put(None)

    def _walk(self) -> None:
        while not self._stopping:
            self._pacer.enter()
            found = self._claims.next()
            if found is None or not self._read(*found):
                return

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
                    self._fill(volume, runs)
                    self._ready.put(Batch(volume, claim, runs, buffer, False))
                    buffer = self._free.get()
                    if buffer is None:
                        return False
                    used, runs = 0, []
                step = min(length, BUFFER_BYTES - used)
                runs.append((offset, buffer[used : used + step]))
                used += step
                offset += step
                length -= step
        self._fill(volume, runs)
        self._ready.put(Batch(volume, claim, runs, buffer, True))
        return True

    def _fill(self, volume: SourceVolume, runs: list[Run]) -> None:
        """Read the runs: one short read after the other while the foreground comes first, else several at a time."""
        pacer = self._pacer
        if not pacer.polite:
            began = time.monotonic()
            self._scatter.each(lambda run: self._read_run(volume, *run), runs)
            spent = time.monotonic() - began
            pacer.charge("source_read", spent)
            pacer.rest(volume.number, sum(len(view) for _, view in runs), spent)
            return
        for offset, whole in runs:
            done = 0
            while done < len(whole):
                view = whole[done : done + pacer.read_bytes(volume.number)]
                with pacer.turn():
                    began = time.monotonic()
                    self._read_run(volume, offset + done, view)
                    spent = time.monotonic() - began
                    pacer.charge("source_read", spent)
                    pacer.rest(volume.number, len(view), spent)
                done += len(view)

    @staticmethod
    def _read_run(volume: SourceVolume, offset: int, view: memoryview) -> None:
        volume.read_into(view, offset)
        faults.point("ship.read")
