# SPDX-License-Identifier: GPL-3.0-or-later
"""Sessions of several streams: which SYNC may leave when, and that nothing is lost whichever stream dies or lags."""

from __future__ import annotations

import collections
import dataclasses
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from bmigrate.common.errors import RefusedError, UnreachableError
from bmigrate.ship import handshake, passes, readahead
from bmigrate.ship.engine import Engine
from bmigrate.ship.lane import Lane
from bmigrate.ship.marks import Marks
from bmigrate.ship.window import ProtocolError
from bmigrate.wire.frames import FrameType
from tests.unit import standby_host
from tests.unit.ship_world import GRANULE, TAIL, World
from tests.unit.standby_host import MIB, wait

STREAMS = 3


class MarksMachine(RuleBasedStateMachine):
    """SYNCs, MARKs and their answers in any order that streams allow, against what each SYNC has to wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.marks = Marks()
        self.number = self.left = 0
        self.owed: dict[int, list[int]] = {lane: [] for lane in range(1, 5)}
        self.volumes: dict[int, int] = {}
        self.told = 0

    @rule(lanes=st.sets(st.integers(1, 4)), volumes=st.integers(0, 15))
    def sync(self, lanes: set[int], volumes: int) -> None:
        """A SYNC is due."""
        self.number += 1
        self.volumes[self.number] = volumes
        self.marks.wait(self.number, lanes, volumes)
        for lane in lanes:
            self.owed[lane].append(self.number)

    @precondition(lambda self: any(self.owed.values()))
    @rule(data=st.data())
    def answer(self, data: Any) -> None:
        """A stream answers its oldest MARK."""
        lane = data.draw(st.sampled_from([lane for lane, owed in self.owed.items() if owed]))
        self.marks.marked(lane, self.owed[lane].pop(0))

    @rule(lane=st.integers(0, 9), number=st.integers(0, 50))
    def impossible(self, lane: int, number: int) -> None:
        """An answer that is not the next one due."""
        if self.owed.get(lane, [])[:1] != [number]:
            with pytest.raises(ProtocolError):
                self.marks.marked(lane, number)

    @rule()
    def leave(self) -> None:
        """Exactly what nobody owes an answer for any more has left, with the volumes of all that it covers."""
        free = min([number for owed in self.owed.values() for number in owed], default=self.number + 1) - 1
        ready = self.marks.ready()
        if free <= self.told:
            assert ready is None
            return
        assert ready is not None and ready.number == free
        covered = 0
        for number in range(self.told + 1, free + 1):
            covered |= self.volumes[number]
        assert ready.volumes == covered
        self.told = free


TestMarks = MarksMachine.TestCase


def _all_gone(pids: list[int]) -> None:
    wait(lambda: not any(_alive(pid) for pid in pids), "the end of all receivers")


def _epoch_after(engine: Engine, epoch: int) -> None:
    wait(lambda: (engine.record.session or {}).get("epoch", 0) > epoch, "another epoch")


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> collections.Counter[tuple[int, str]]:
    """Frames by stream and type; small claims, so that a small volume is worth several streams."""
    counts: collections.Counter[tuple[int, str]] = collections.Counter()
    monkeypatch.setattr(readahead, "CLAIM_BYTES", 256 * 1024)
    monkeypatch.setattr(passes, "LANE_BYTES", 512 * 1024)
    send, send_extents = Lane.send, Lane.send_extents

    def counted(self: Lane, type_: FrameType, **fields: Any) -> None:
        send(self, type_, **fields)
        counts[self.number, type_.name] += 1

    def counted_extents(self: Lane, volume: int, parts: list[tuple[int, memoryview]]) -> None:
        send_extents(self, volume, parts)
        counts[self.number, "EXTENTS"] += 1

    monkeypatch.setattr(Lane, "send", counted)
    monkeypatch.setattr(Lane, "send_extents", counted_extents)
    return counts


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """Source and standby of two volumes, and three streams."""
    made = World(tmp_path, monkeypatch, {"data": 12 * MIB + TAIL, "wal": 2 * MIB})
    made.config = dataclasses.replace(made.config, streams=STREAMS)
    yield made
    made.close()


def _write_much(world: World) -> None:
    """Enough for every stream, all of it different from what is there."""
    for offset in range(0, 8 * MIB, 64 * 1024):
        world.write(offset, os.urandom(64 * 1024))


def _receivers(engine: Engine) -> list[int]:
    """Process ids of the receivers of the open session, in the order of its streams."""
    wait(lambda: engine.session is not None and len(engine.session.lanes) == STREAMS, "a session")
    session: Any = engine.session
    return [lane.link.stream.pid for lane in session.lanes]


def _left(world: World) -> int:
    with world.breqd.lock:
        maps = world.breqd.maps
        return sum(maps.dirty_bytes(key) + maps.claimed_bytes(key) for key in world.breqd.items)


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def test_every_stream_carries_data_and_one_acknowledges(
    world: World, sent: collections.Counter[tuple[int, str]]
) -> None:
    """A seed and a drain under writes: equal, each stream had its part, and SYNC went over the first alone."""
    engine = world.engine()
    world.start_writer()
    world.until(engine, "in_step")
    for lane in range(STREAMS):
        assert sent[lane, "EXTENTS"] > 0, f"stream {lane} carried nothing: {sent}"
    assert len(world.receivers()) == STREAMS and sorted(world.beta.status()["receivers"]) == sorted(world.receivers())
    assert [sent[lane, "SYNC"] > 0 for lane in range(STREAMS)] == [True, False, False]
    assert [sent[lane, "MARK"] > 0 for lane in range(STREAMS)] == [False, True, True]
    world.stop_writer()
    _write_much(world)
    world.drain(engine)
    world.check_equal()
    world.no_help()


@pytest.mark.parametrize("stream", range(STREAMS))
def test_the_end_of_one_stream_ends_the_session(world: World, stream: int) -> None:
    """Whichever dies, all receivers of the epoch die, and the next session ships what was under way."""
    engine = world.engine()
    world.start_writer(0.0005)
    for _ in range(3):
        pids = _receivers(engine)
        epoch = (engine.record.session or {}).get("epoch", 0)
        os.kill(pids[stream], signal.SIGKILL)
        _all_gone(pids)
        _epoch_after(engine, epoch)
        world.stop_writer()
        world.check_invariant()
        world.start_writer(0.0005)
    world.until(engine, "in_step")
    world.stop_writer()
    world.drain(engine)
    world.check_equal()
    world.no_help()


def test_what_a_stream_has_not_written_is_not_acknowledged(
    world: World, sent: collections.Counter[tuple[int, str]]
) -> None:
    """A further receiver is stopped, with data and MARK in its pipe, and then killed: the first alone acknowledges
    nothing of that."""
    engine = world.engine()
    world.until(engine, "in_step")
    victim = _receivers(engine)[1]
    before, acks = sent[1, "MARK"], world.breqd.calls["ack"]
    os.kill(victim, signal.SIGSTOP)

    def marked() -> bool:
        # Less than a pipe holds, so that the MARK finds room behind it. Once more, should all of it take another way;
        # looked at in this order, or what was acknowledged after a MARK would be written, and so marked, again.
        nothing_left = not world.breqd.log and not _left(world)
        if sent[1, "MARK"] > before:
            return True
        if nothing_left:
            for offset in range(0, 5 * 256 * 1024, 64 * 1024):
                world.write(offset, os.urandom(64 * 1024))
        return False

    wait(marked, "a MARK to the stopped receiver")
    # What needs nothing of that stream may be acknowledged. Were a SYNC sent without waiting, its answer and what
    # follows from it would be here well within two seconds.
    threading.Event().wait(2.0)
    different = set(world.different())
    with world.breqd.lock:
        world.breqd.consume()
        item = world.breqd.items["wl", "data"]
        unmarked = [at for at in different if not item.mirror[at // GRANULE // 8] >> (at // GRANULE % 8) & 1]
    assert different, "everything has landed: nothing was tested"
    assert not unmarked, f"acknowledged and never written: {sorted(unmarked)[:8]}, after {acks} acknowledgements"
    os.kill(victim, signal.SIGKILL)
    world.until(engine, "in_step")
    world.drain(engine)
    world.check_equal()
    world.no_help()


def test_a_failed_flush_is_the_end_for_what_every_stream_wrote(world: World) -> None:
    """The kernel reports a lost write once: after it nothing of any stream may be acknowledged in this session."""
    engine = world.engine()
    world.until(engine, "in_step")
    world.receiver_faults("receive.fdatasync=error:5@1")
    engine.reconnect()
    first = (engine.record.session or {}).get("epoch", 0)
    wait(lambda: engine.session is not None and engine.session.epoch > first, "the session with the fault")
    session = engine.session
    assert session is not None
    _write_much(world)
    wait(lambda: session.failure is not None, "the end of the session")
    assert session.failure is not None and session.failure.reason == "io_error"
    world.until(engine, "in_step")
    world.drain(engine)
    world.check_equal()


def test_streams_that_take_long_to_join_do_not_end_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logins may take longer than the silence that a receiver bears: the first stream is kept alive meanwhile."""
    monkeypatch.setattr(standby_host, "CONFIG", standby_host.CONFIG.replace("{silence}", "2"))
    world = World(tmp_path, monkeypatch)
    try:
        script = world.ssh.read_text()
        slow = f"[ -s {tmp_path / 'receivers'} ] && sleep 5"
        world.ssh.write_text(script.replace("#!/bin/sh\n", f"#!/bin/sh\n{slow}\n"))
        world.config = dataclasses.replace(world.config, streams=2)
        engine = world.engine()
        world.until(engine, "in_step")
        assert engine.session is not None and (engine.session.epoch, len(engine.session.lanes)) == (1, 2)
    finally:
        world.close()


def _other_logins(world: World, line: str) -> None:
    """A line of shell that comes first in each connection but a session's first."""
    script = world.ssh.read_text()
    line = f"if [ -s {world.directory / 'receivers'} ]; then {line}; fi"
    world.ssh.write_text(script.replace("#!/bin/sh\n", f"#!/bin/sh\n{line}\n", 1))


def test_a_stream_does_not_wait_for_the_login_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of two logins takes longer than receivers wait for a greeting, and than they bear silence."""
    monkeypatch.setattr(standby_host, "CONFIG", standby_host.CONFIG.replace("{silence}", "2"))
    world = World(tmp_path, monkeypatch)
    try:
        _other_logins(world, f"export EDGE_HANDSHAKE_SECONDS=2; mkdir {tmp_path / 'late'} 2>/dev/null && sleep 6")
        world.config = dataclasses.replace(world.config, streams=3)
        engine = world.engine()
        world.until(engine, "in_step")
        assert engine.session is not None and (engine.session.epoch, len(engine.session.lanes)) == (1, 3)
        assert [lane.number for lane in engine.session.lanes] == [0, 1, 2]
    finally:
        world.close()


def test_who_may_not_join_because_the_session_has_ended_tries_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """hold says so before anybody here has seen why: no refusal, which would be final for a handover that waits."""
    noted: list[Exception] = []
    note, join = Engine._note, handshake.join
    refusals = [RefusedError("the session of epoch 1 is not open here", host="beta", reason="session_over")]

    def watched(self: Engine, error: Exception) -> None:
        noted.append(error)
        note(self, error)

    def refused_once(*arguments: Any) -> Any:
        if refusals:
            raise refusals.pop()
        return join(*arguments)

    monkeypatch.setattr(Engine, "_note", watched)
    monkeypatch.setattr(handshake, "join", refused_once)
    engine = world.engine()
    world.until(engine, "in_step")
    (error,) = noted
    assert isinstance(error, UnreachableError) and error.reason == "session_over", error
    assert engine.session is not None and len(engine.session.lanes) == STREAMS


def test_an_older_standby_gets_one_stream(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A receiver that speaks version 2 knows nothing of streams, and is asked for none."""
    script = world.ssh.read_text()
    older = "from bmigrate.wire import frames, hello; frames.VERSION = hello.VERSION = 2; import runpy, sys; "
    older += "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    words = script.replace(" breceive --workload", ' "" breceive --workload').split("\n")
    start = next(number for number, line in enumerate(words) if line.startswith("exec env"))
    edge = words[start].split()[-5]
    words[start] = words[start].replace(f'{edge} "" breceive', f'-c "{older}" {edge} breceive')
    world.ssh.write_text("\n".join(words))
    engine = world.engine()
    world.until(engine, "in_step")
    assert engine.session is not None and (engine.session.version, len(engine.session.lanes)) == (2, 1)
    world.drain(engine)
    world.check_equal()
