# SPDX-License-Identifier: GPL-3.0-or-later
"""A flush and a write at the same time, in the receiver: what a flush may have missed is flushed before it is told."""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Callable

import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from bmigrate.common import blockdev
from bmigrate.common.scatter import Scatter
from bmigrate.receive.volumes import StandbyVolume

SIZE = 1 << 20
PAGE = memoryview(mmap.mmap(-1, 4096))


@pytest.fixture
def volume(tmp_path: Path) -> Iterator[StandbyVolume]:
    """A volume on a file."""
    path = tmp_path / "disk"
    path.write_bytes(bytes(SIZE))
    opened = StandbyVolume("data", str(path), os.stat(path).st_rdev, SIZE)
    yield opened
    opened.close()


def test_the_first_flush_of_a_session_is_never_skipped(volume: StandbyVolume, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a receiver before this one wrote and did not flush may be found equal, and be acknowledged unwritten."""
    flushed: list[int] = []
    monkeypatch.setattr(os, "fdatasync", flushed.append)
    assert volume.unsynced
    volume.sync()
    volume.sync()
    assert flushed == [volume.fd] and not volume.unsynced


@pytest.mark.parametrize("kind", ["write", "extents", "zero"])
def test_a_write_under_way_in_a_flush_is_flushed_by_the_next(
    volume: StandbyVolume, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The flush of an earlier SYNC begins and ends in the middle of a write; the SYNC after the write must flush."""
    events: list[str] = []
    inside, go = threading.Event(), threading.Event()

    def slow(*arguments: object) -> int:
        inside.set()
        assert go.wait(60)
        events.append("written")
        return 4096

    monkeypatch.setattr(os, "fdatasync", lambda fd: events.append("flushed"))
    monkeypatch.setattr(os, "pwritev", slow)
    monkeypatch.setattr(blockdev, "zero_out", slow)
    scatter = Scatter("test")
    bodies: dict[str, Callable[[], None]] = {
        "write": lambda: volume.write(0, PAGE),
        "extents": lambda: volume.write_extents([(at * 8192, PAGE) for at in range(32)], scatter, lambda: None),
        "zero": lambda: volume.zero(0, 4096, lambda: None),
    }
    writer = threading.Thread(target=bodies[kind])
    writer.start()
    assert inside.wait(60)
    volume.sync()
    go.set()
    writer.join()
    scatter.close()
    volume.sync()
    assert events[-2:] == ["written", "flushed"], f"acknowledged without a flush: {events}"
    assert not volume.unsynced


class FlushMachine(RuleBasedStateMachine):
    """Writes here and on other streams, and flushes that take a while, in any order that the receiver's threads allow.

    The device is a set of writes in its cache and one of durable ones; a flush makes durable what was complete when it
    began, and nothing that was not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.volume = StandbyVolume.__new__(StandbyVolume)
        self.volume._writes = self.volume._synced = 0
        self.volume._broken = None
        self.volume.fd = -1
        self.volume.name = "data"
        self.cached: set[int] = set()
        self.durable: set[int] = set()
        self.number = 0
        self.flush: threading.Thread | None = None
        self.let_go = threading.Event()
        self.began = threading.Event()
        self.before: set[int] = set()

    def _fdatasync(self, fd: int) -> None:
        complete = set(self.cached)
        self.began.set()
        assert self.let_go.wait(60)
        self.durable |= complete

    @rule()
    def write(self) -> None:
        """A frame is written; the receiver's own thread does one after the other."""
        self.number += 1
        self.cached.add(self.number)
        self.volume._writes += 1

    @rule()
    def elsewhere(self) -> None:
        """Another stream wrote, and a SYNC says so."""
        self.number += 1
        self.cached.add(self.number)
        self.volume.written_elsewhere()

    @precondition(lambda self: self.flush is None)
    @rule()
    def begin(self) -> None:
        """A SYNC comes: the flusher begins."""
        self.before = set(self.cached)
        self.let_go.clear()
        self.began.clear()

        def body() -> None:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(os, "fdatasync", self._fdatasync)
                self.volume.sync()
            self.began.set()

        self.flush = threading.Thread(target=body)
        self.flush.start()
        assert self.began.wait(60)

    @precondition(lambda self: self.flush is not None)
    @rule()
    def end(self) -> None:
        """The flush ends, and the SYNC is acknowledged."""
        assert self.flush is not None
        self.let_go.set()
        self.flush.join()
        self.flush = None
        assert self.before <= self.durable, f"acknowledged and not durable: {self.before - self.durable}"

    @invariant()
    def told(self) -> None:
        """What is not durable is known as such."""
        if self.flush is None and self.cached - self.durable:
            assert self.volume.unsynced

    def teardown(self) -> None:
        """Let a flush end."""
        self.let_go.set()
        if self.flush is not None:
            self.flush.join()


TestFlush = FlushMachine.TestCase
TestFlush.settings = settings(deadline=None, max_examples=60)
