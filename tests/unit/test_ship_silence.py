# SPDX-License-Identifier: GPL-3.0-or-later
"""How long is waited for somebody who says nothing, and what is said of a workload meanwhile."""

from __future__ import annotations

import errno
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bmigrate.common import blockdev, paths
from bmigrate.common.errors import RefusedError, UnreachableError
from bmigrate.common.state import WorkloadState
from bmigrate.receive.link import Link
from bmigrate.ship import handshake, main, session
from bmigrate.ship.engine import Engine
from bmigrate.ship.rates import ShipRate
from bmigrate.ship.session import Session
from bmigrate.ship.tracker import Snapshot, Tracked
from bmigrate.ship.window import Claim
from bmigrate.wire.frames import FrameType, FrameWriter
from tests.unit.standby_host import MIB, wait

GONE = UnreachableError("the link is cut", reason="disconnected")


def _tracked(**fields: Any) -> Tracked:
    known: dict[str, Any] = {
        "name": "data", "size_bytes": MIB, "granule_bytes": 4096, "dirty_bytes": 0, "claimed_bytes": 0, "suspect": None,
        "attached": True, "attachment_id": "a", "oldest_dirty_age_seconds": 0.0, "written_bytes": 0, "seed_count": 0,
        "highest_epoch": 1, **fields,
    }  # fmt: skip
    return Tracked(**known)


def _snapshot(**fields: Any) -> Snapshot:
    return Snapshot("i", {"data": _tracked(**fields)})


def test_nobody_is_in_step_while_breqd_or_the_session_does_not_answer(engine: Engine) -> None:
    """Also not over a suspicion that was shown a moment ago."""
    engine._state = WorkloadState("wl", "alpha", role="primary", generation={"number": 1, "id": "g"}, shipping=True)
    connected: Any = SimpleNamespace(standby_suspects={}, failure=None, epoch=1, lanes=[1])
    engine.session = connected
    engine.trend.caught_up = True
    engine.observe(_snapshot())
    assert engine.state() == ("in_step", None)
    engine.observe(_snapshot(suspect="a lapse"))
    assert engine.state()[0] == "suspect"
    engine.observe(None)
    state, reason = engine.state()
    assert state == "disconnected" and reason is not None and "breqd" in reason
    engine.observe(_snapshot())
    assert engine.state()[0] == "in_step"
    connected.failure = GONE
    state, reason = engine.state()
    assert state == "disconnected" and reason is not None and "cut" in reason


def test_a_receiver_does_not_take_its_own_delay_for_silence() -> None:
    """hold may let a receiver wait for its grant, and the sender with it, for longer than silence is borne."""
    into, out = os.pipe(), os.pipe()
    hold = os.pipe()
    link = Link(into[0], out[1], 20.0)
    try:
        link._heard -= 45.0
        link.start_session(5, hold[0], 20.0, 3)
        writer = FrameWriter()
        writer.epoch = 5
        answer = threading.Timer(0.2, os.write, (into[1], b"".join(writer.encode(FrameType.PING))))
        answer.start()
        frame = link.receive()
        answer.join()
        assert frame is not None and frame.type is FrameType.PING
        link._heard -= 45.0
        with pytest.raises(UnreachableError, match="nothing heard"):
            link.receive()
    finally:
        for fd in (*into, *out, *hold):
            os.close(fd)


@pytest.fixture
def opened(engine: Engine) -> Session:
    """A session that nobody has opened: its window and its waits."""
    return Session(engine.config, engine.record, ShipRate(), Path("breqd.sock"))


def _claim(size: int, zeroes: int = 0) -> Claim:
    return Claim("data", {}, [(0, size)], size, zero_bytes=zeroes)


def test_a_wait_begins_anew_with_each_acknowledgement(opened: Session) -> None:
    """Ten of them, each after half of what is borne without one."""
    window, answers = opened._window, 10
    for _ in range(answers):
        opened._window.sync()

    def acknowledge() -> None:
        for number in range(1, answers + 1):
            time.sleep(0.5)
            with opened._cond:
                window.acked(number)
                opened._cond.notify_all()

    thread = threading.Thread(target=acknowledge)
    thread.start()
    with opened._cond:
        opened._wait(lambda: window.last_ack == answers, 1.0, "acknowledgement")
    thread.join()
    with opened._cond, pytest.raises(UnreachableError, match="no acknowledgement within 1 s"):
        opened._wait(lambda: False, 1.0, "acknowledgement")


def test_a_slow_disk_has_time_for_the_zeroes_that_are_under_way(
    opened: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which count little in the window and may all have to be written."""
    monkeypatch.setattr(session, "SLOWEST_BYTES_PER_SECOND", 1 << 30)
    opened._window.sent(_claim(3 << 30, 3 << 30))
    began = time.monotonic()
    with opened._cond, pytest.raises(UnreachableError, match="within 3 s"):
        opened._wait(lambda: False, 0.0, "acknowledgement")
    assert time.monotonic() - began >= 3.0


def test_a_device_with_larger_blocks_than_is_told_apart_is_refused_by_name(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is dirty is told in 4 KiB, and no such block could be read."""
    (tmp_path / "disk").write_bytes(bytes(MIB))
    monkeypatch.setattr(type(engine.config), "device", lambda self, name: str(tmp_path / "disk"))
    opened = handshake.open_source(engine.config, "data", _snapshot())
    opened.close()
    monkeypatch.setattr(blockdev, "logical_block_size", lambda fd: 16384)
    with pytest.raises(RefusedError, match="16384") as caught:
        handshake.open_source(engine.config, "data", _snapshot())
    assert caught.value.reason == "logical_block_size" and caught.value.hint


def test_the_sampler_goes_on_after_an_error_of_the_system(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once too many files are open, say."""
    monkeypatch.setattr(main, "SAMPLE_SECONDS", 0.01)
    seen: list[object] = []

    def refuse() -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    daemon: Any = main.Daemon.__new__(main.Daemon)
    daemon._stopping = threading.Event()
    daemon.engines = {"wl": SimpleNamespace(observe=seen.append, refresh_state=refuse)}
    thread = threading.Thread(target=daemon._sample, daemon=True)
    thread.start()
    try:
        wait(lambda: len(seen) >= 3, "three samples")
    finally:
        daemon._stopping.set()
        thread.join()
    assert not paths.breqd_socket().exists() and set(seen) == {None}
