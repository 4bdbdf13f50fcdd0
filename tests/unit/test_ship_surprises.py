# SPDX-License-Identifier: GPL-3.0-or-later
"""What the shipper does when something changes under it: a volume grows, the tracker is blind, failures repeat."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bmigrate.common.errors import RefusedError, UnreachableError
from bmigrate.ship import engine as engines
from bmigrate.ship import source
from tests.unit.ship_world import GRANULE, World
from tests.unit.standby_host import MIB, wait


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """Source and standby; the volume ends with a granule, so no frame goes beyond the old end when it grows."""
    made = World(tmp_path, monkeypatch, {"data": 8 * MIB})
    yield made
    made.close()


def test_a_volume_that_grows_during_a_session_is_compared_in_its_new_size(world: World) -> None:
    """lvextend -r: metadata is written behind the old end before breqd has attached the volume anew."""
    engine = world.engine()
    world.until(engine, "in_step")
    size = 2 * world.volumes["data"]
    os.truncate(world.replica(), size)
    os.truncate(world.source(), size)
    world.write(size * 3 // 4, world.random.randbytes(16 * GRANULE), recorded=False)
    assert world.different()
    world.breqd.attach_anew("wl", "data", size, "the device was resized")
    wait(lambda: world.breqd.items["wl", "data"].record.suspect is None, "the end of the suspicion")
    world.check_invariant()
    world.until(engine, "in_step")
    assert world.different() == []


def test_a_volume_that_grows_while_a_resync_begins(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look at the volumes and the beginning of the comparison, which is then that of the new attachment."""
    engine = world.engine()
    world.until(engine, "in_step")
    size = 2 * world.volumes["data"]
    begin = world.breqd._op_resync_begin
    grown = threading.Event()

    def begins(request: dict[str, Any]) -> dict[str, Any]:
        if not grown.is_set():
            os.truncate(world.replica(), size)
            os.truncate(world.source(), size)
            world.write(size * 3 // 4, world.random.randbytes(16 * GRANULE), recorded=False)
            world.breqd.attach_anew("wl", "data", size, "the device was resized")
            grown.set()
        return begin(request)

    monkeypatch.setattr(world.breqd, "_op_resync_begin", begins)
    world.breqd._op_suspect({"workload": "wl", "volume": "data", "reason": "the host crashed"})
    wait(lambda: grown.is_set() and world.breqd.items["wl", "data"].record.suspect is None, "the end of the suspicion")
    world.check_invariant()
    world.until(engine, "in_step")
    assert world.different() == []


def test_a_blind_volume_is_not_compared_and_what_is_known_of_it_is_shipped(world: World) -> None:
    """A comparison would prove nothing, and begin anew for ever."""
    engine = world.engine()
    world.until(engine, "in_step")
    world.breqd.blind = True
    world.breqd._op_suspect({"workload": "wl", "volume": "data", "reason": "the tracker is blind"})
    world.until(engine, "suspect")
    session = engine.session
    for _ in range(20):
        world.random_write()
    wait(lambda: world.different() == [], "what is dirty to be shipped")
    assert engine.state() == ("suspect", "data: the tracker is blind")
    assert world.breqd.calls["resync_begin"] == 0 and engine.session is session
    world.breqd.blind = False
    world.until(engine, "in_step")
    assert world.breqd.calls["resync_begin"] == 1


def test_what_fails_again_is_tried_less_and_less_often(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A session opens each time, and that alone is no success."""
    engine = world.engine()
    world.until(engine, "in_step")
    attempts: list[int] = []

    def pause(attempt: int) -> float:
        attempts.append(attempt)
        return 0.01

    def refuse(_: dict[str, Any]) -> dict[str, Any]:
        raise RefusedError("a new suspicion came up during the resync", reason="new_suspicion")

    monkeypatch.setattr(engines, "backoff", pause)
    with monkeypatch.context() as broken:
        broken.setattr(world.breqd, "_op_resync_end", refuse)
        world.breqd._op_suspect({"workload": "wl", "volume": "data", "reason": "the host crashed"})
        wait(lambda: len(attempts) >= 4, "four failed attempts")
    assert attempts[:4] == [1, 2, 3, 4]
    world.until(engine, "in_step")
    assert engine.session is not None
    engine.session.fail(UnreachableError("cut", reason="disconnected"))
    count = len(attempts)
    wait(lambda: len(attempts) > count, "the next pause")
    assert attempts[-1] == 1, "what worked since counts"


def test_the_limiter_of_what_is_over_is_not_shown(world: World) -> None:
    engine = world.engine()
    world.until(engine, "in_step")
    world.job(engine, "verify")
    assert engine.pacer.began is None


def test_a_write_that_is_slow_to_complete_is_no_difference(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the medium already, in flight for longer than a few rounds take, and recorded when it is complete."""
    engine = world.engine()
    world.until(engine, "in_step")
    world.write(MIB, world.random.randbytes(GRANULE), recorded=False)
    looks: list[int] = []

    def in_flight(_: source.SourceVolume) -> int:
        looks.append(1)
        if len(looks) == 3:
            world.breqd.log.append(("data", MIB, GRANULE))
        return int(len(looks) < 3)

    monkeypatch.setattr(source.SourceVolume, "writes_in_flight", in_flight)
    found = world.job(engine, "verify")
    assert len(looks) >= 3 and found["different_blocks"] == [] and found["complete"]


def test_a_path_that_leads_to_another_device_than_the_tracked_one_opens_no_session(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a moment only, while a session was opened: its descriptor would stay with the other device."""
    opened = source.SourceVolume.__init__
    status = world.breqd._op_status
    number = 7 << 8 | 1

    def tracked(request: dict[str, Any]) -> dict[str, Any]:
        answer = status(request)
        answer["volumes"][0]["number"] = 7 << 8
        return answer

    def init(self: source.SourceVolume, *arguments: Any) -> None:
        opened(self, *arguments)
        self.number = number

    monkeypatch.setattr(world.breqd, "_op_status", tracked)
    monkeypatch.setattr(source.SourceVolume, "__init__", init)
    engine = world.engine()
    wait(lambda: engine.last_error is not None, "the refusal")
    assert engine.last_error is not None and engine.last_error.reason == "device_changed"
    assert "7:1" in str(engine.last_error) and "7:0" in str(engine.last_error)
    number = 7 << 8
    monkeypatch.setattr(source.SourceVolume, "writes_in_flight", lambda self: 0)
    world.until(engine, "in_step")
