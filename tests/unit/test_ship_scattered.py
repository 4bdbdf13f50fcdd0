# SPDX-License-Identifier: GPL-3.0-or-later
"""Scattered blocks on slow devices: read and written several at a time, and as correct as one after the other."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bmigrate.ship.engine import Engine
from bmigrate.ship.pacer import Pacer
from bmigrate.ship.source import SourceVolume
from tests.unit.ship_world import GRANULE, World
from tests.unit.standby_host import MIB, wait

BLOCKS = range(0, 8 * MIB, 4 * GRANULE)
SLOW = "receive.write=delay:0.001"


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """Source and standby."""
    made = World(tmp_path, monkeypatch)
    yield made
    made.close()


class Readers:
    """Makes each short read of the source take a millisecond; ``most`` is how many went on at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.most = 0
        self._lock = threading.Lock()
        read_into = SourceVolume.read_into

        def slow(volume: SourceVolume, view: memoryview, offset: int) -> None:
            with self._lock:
                self.now += 1
                self.most = max(self.most, self.now)
            time.sleep(0.001)
            try:
                read_into(volume, view, offset)
            finally:
                with self._lock:
                    self.now -= 1

        monkeypatch.setattr(SourceVolume, "read_into", slow)


def _scatter(world: World) -> None:
    for offset in BLOCKS:
        world.write(offset, os.urandom(GRANULE))


def _threads(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/task"))


def test_scattered_blocks_are_moved_several_at_a_time(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """By both ends, and in the proof of a drain; they are equal afterwards."""
    world.receiver_faults(SLOW)
    engine = world.engine()
    world.until(engine, "in_step")
    readers = Readers(monkeypatch)
    (pid,) = world.receivers()
    before = _threads(pid)
    world.start_writer()
    _scatter(world)
    wait(lambda: readers.most > 1, "reads beside each other")
    wait(lambda: _threads(pid) > before, "writes beside each other")
    world.stop_writer()
    _scatter(world)
    world.drain(engine)
    world.check_equal()
    world.no_help()


def test_the_foreground_has_one_read_beside_it(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it comes first, reads of ours wait for each other, however slow they are."""
    monkeypatch.setattr(Pacer, "polite", property(lambda self: not self.urgent.is_set()))
    engine = world.engine()
    world.until(engine, "in_step")
    readers = Readers(monkeypatch)
    _scatter(world)
    world.breqd.consume()
    wait(lambda: readers.most > 0, "a read")
    wait(lambda: engine.snapshot is not None and not engine.snapshot.left_bytes, "everything to be shipped")
    assert readers.most == 1
    world.check_equal()


def _ends_a_session(world: World, plan: str) -> Engine:
    """Ship scattered blocks to a receiver with this plan, until a session after its own has begun."""
    engine = world.engine()
    world.until(engine, "in_step")
    epoch = (engine.record.session or {})["epoch"]
    world.receiver_faults(f"{SLOW},{plan}")
    engine.reconnect()
    wait(lambda: (engine.record.session or {})["epoch"] > epoch and engine.session is not None, "a session")
    _scatter(world)
    world.breqd.consume()
    wait(lambda: (engine.record.session or {})["epoch"] > epoch + 1, "the next session")
    world.check_invariant()
    return engine


@pytest.mark.parametrize("which", [2, 40, 200])
def test_a_receiver_that_dies_among_them_loses_nothing(world: World, which: int) -> None:
    """Killed in a thread that writes, others being in the middle of theirs."""
    engine = _ends_a_session(world, f"receive.write=kill@{which}")
    world.drain(engine)
    world.check_equal()
    world.no_help()


def test_a_write_that_fails_among_them_ends_the_session(world: World) -> None:
    """And what had been claimed is shipped by the next one."""
    engine = _ends_a_session(world, "receive.write=error:5@100")
    world.drain(engine)
    world.check_equal()
