# SPDX-License-Identifier: GPL-3.0-or-later
"""The shipper against real receivers: what was written arrives, whatever is killed on the way."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bmigrate.common import log, rpc
from bmigrate.common.config import Limits
from bmigrate.common.errors import BmigrateError, PhaseError, RefusedError, SuspectError, UnreachableError, UsageError
from bmigrate.ship import compare, drain, handshake, passes, source, verify
from bmigrate.ship import engine as engines
from bmigrate.ship.engine import Engine
from bmigrate.ship.jobs import Job
from bmigrate.ship.lane import Lane
from bmigrate.ship.passes import PassResult
from bmigrate.ship.session import Session
from bmigrate.ship.tracker import Tracker
from bmigrate.wire.frames import FrameType
from tests.unit.ship_world import GRANULE, World
from tests.unit.standby_host import MIB, wait


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """Source and standby."""
    made = World(tmp_path, monkeypatch)
    yield made
    made.close()


def test_seeds_follows_and_drains(world: World) -> None:
    """A seed, writes while it ships, a drain: equal to the last byte of the odd tail, without a hash."""
    engine = world.engine()
    world.start_writer()
    world.until(engine, "in_step")
    assert engine.totals.zero_bytes >= MIB, "the zero quarter of the volume must not travel as data"
    world.stop_writer()
    result = world.drain(engine)
    world.check_equal()
    world.no_help()
    assert engine.totals.hashed_bytes == 0
    assert result["epoch"] == 1 and len(result["digest"]) == 64
    world.until(engine, "sealed")


def test_two_volumes_travel_in_one_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A consistency group: all volumes of the workload, one epoch."""
    world = World(tmp_path, monkeypatch, {"data": 3 * MIB, "wal": 2 * MIB + 3584})
    try:
        engine = world.engine()
        world.start_writer()
        world.until(engine, "in_step")
        world.stop_writer()
        assert world.drain(engine)["epoch"] == 1
        world.check_equal()
    finally:
        world.close()


def test_receivers_killed_at_random_frames_lose_nothing(world: World) -> None:
    """Five receivers die somewhere in the stream; each time the invariant holds, and a drain ends equal."""
    engine = world.engine()
    world.start_writer(0.0005)
    for _ in range(5):
        wait(lambda: engine.session is not None, "a session")
        epoch = engine.record.session["epoch"] if engine.record.session else 0
        world.receiver_faults(f"receive.frame=kill@{world.random.randrange(2, 60)}")
        engine.reconnect()
        _epoch_after(engine, epoch + 1)
        world.stop_writer()
        world.check_invariant()
        world.start_writer(0.0005)
    world.until(engine, "in_step")
    wait(lambda: world.redirtied() > 0, "a block to be written again while claimed")
    world.stop_writer()
    world.drain(engine)
    world.check_equal()
    world.no_help()


def _pause(world: World, engine: Any) -> None:
    """Pause, and wait until hold has seen the end of the receiver."""
    engine.pause(True)
    world.until(engine, "paused")
    wait(lambda: engine.session is None and not world.beta.status()["receivers"], "the session to end")


def _epoch_after(engine: Any, epoch: int) -> None:
    wait(lambda: _epoch(engine) > epoch, f"an epoch after {epoch}")


def _claims_after(world: World, count: int) -> None:
    wait(lambda: world.breqd.calls["claim"] > count, "claims")


def _receivers_after(world: World, engine: Any, count: int) -> None:
    wait(lambda: len(world.receivers()) > count and engine.session is not None, "a receiver")


def _epoch(engine: Any) -> int:
    return int(engine.record.session["epoch"]) if engine.record.session else 0


def test_breqd_killed_again_and_again_loses_nothing(world: World) -> None:
    """Another incarnation of breqd: the session ends, nothing is claimed before the new fence."""
    engine = world.engine()
    world.start_writer()
    for _ in range(4):
        claims = world.breqd.calls["claim"]
        _claims_after(world, claims + 3)
        world.breqd.restart()
        world.stop_writer()
        world.check_invariant()
        world.start_writer()
    world.until(engine, "in_step")
    world.stop_writer()
    world.drain(engine)
    world.check_equal()
    world.no_help()
    assert _epoch(engine) >= 5


@pytest.mark.parametrize("point", ["ship.claimed", "ship.read", "ship.sent", "ship.synced", "ship.acked"])
def test_shipper_killed_at_each_step_loses_nothing(world: World, point: str) -> None:
    """kill -9 of the daemon between any two steps of a claim; the next daemon ends equal."""
    world.start_writer()
    for _ in range(2):
        process = world.daemon(f"{point}=kill@{world.random.randrange(2, 5)}")
        assert process.wait(60) == -signal.SIGKILL, (world.directory / "ship.log").read_text()
        world.stop_writer()
        world.check_invariant()
        world.start_writer()
    world.daemon()
    socket = world.directory / "alpha" / "run" / "ship.sock"

    def in_step() -> bool:
        return bool(socket.exists()) and _state(socket) == "in_step"

    wait(in_step, "in_step", 60)
    world.stop_writer()
    result = rpc.call(socket, "drain", 60, workload="wl", run_id="r1")
    assert result["epoch"] >= 3
    world.check_equal()
    world.no_help()
    again = rpc.call(socket, "drain", 60, workload="wl", run_id="r1")
    assert again["digest"] == result["digest"], "the same run id gets the recorded result"
    with pytest.raises(PhaseError):
        rpc.call(socket, "drain", 60, workload="wl", run_id="r2")


def _state(socket: Path) -> str:
    try:
        return str(rpc.call(socket, "status", workload="wl")["workloads"][0]["state"])
    except Exception:
        return "down"


def test_ssh_killed_by_pid_starts_a_new_epoch(world: World) -> None:
    """The connection dies under load: a new session, a new epoch, nothing lost."""
    engine = world.engine()
    world.start_writer()
    for number in range(3):
        _receivers_after(world, engine, number)
        os.kill(world.receivers()[-1], signal.SIGKILL)
    world.until(engine, "in_step")
    world.stop_writer()
    world.drain(engine)
    world.check_equal()
    world.no_help()
    assert _epoch(engine) >= 4


def test_resync_ships_only_what_differs(world: World) -> None:
    """Writes that nobody recorded: suspect, never in step before every block was compared, then equal."""
    engine = world.engine()
    world.until(engine, "in_step")
    _pause(world, engine)
    shipped = engine.totals.shipped_bytes
    blocks = world.random.sample(range(1, world.volumes["data"] // GRANULE), 100)
    for block in blocks:
        world.write(block * GRANULE, world.random.randbytes(GRANULE), recorded=False)
    differing = len(world.different()) * GRANULE
    key = ("wl", "data")
    world.breqd._op_suspect({"workload": "wl", "volume": "data", "reason": "the host crashed"})
    seen: set[str] = set()
    engine.pause(False)

    def resynced() -> bool:
        name = engine.state()[0]
        if world.breqd.items[key].record.suspect is None:
            return True
        seen.add(name)
        return False

    wait(resynced, "the end of the resync")
    world.until(engine, "in_step")
    assert "resyncing" in seen and "in_step" not in seen
    assert engine.totals.hashed_bytes == world.volumes["data"]
    assert differing <= engine.totals.shipped_bytes - shipped <= 1.2 * differing
    world.drain(engine)
    world.check_equal()


@pytest.mark.parametrize("point", ["ship.resync_compared", "ship.resync_done"])
def test_a_shipper_that_dies_at_the_end_of_a_resync_leaves_it_to_be_done(world: World, point: str) -> None:
    """Between the standby's note and breqd's: one of them still says suspect, and the next shipper compares."""
    first = world.daemon()
    wait(lambda: not world.breqd.maps.dirty_bytes(("wl", "data")), "the seed")
    first.kill()
    first.wait()
    process = world.daemon(f"{point}=kill")
    world.write(9 * GRANULE, world.random.randbytes(GRANULE), recorded=False)
    record = world.breqd.items["wl", "data"].record
    world.breqd._op_suspect({"workload": "wl", "volume": "data", "reason": "the host crashed"})
    assert process.wait(60) == -9
    assert record.suspect is not None and record.resyncs == 0
    world.daemon()
    wait(lambda: record.suspect is None, "the next resync")
    assert record.resyncs == 1
    wait(lambda: not world.different(), "what differs to be shipped")


@pytest.fixture
def wide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """A volume of many claims. Few ranges are compared at once, so that much is left when a part was compared."""
    monkeypatch.setattr(compare, "UNDER_WAY", 2)
    made = World(tmp_path, monkeypatch, {"data": 32 * MIB + 3584})
    yield made
    made.close()


def _missed_writes(world: World) -> None:
    for _ in range(300):
        at = world.random.randrange(world.volumes["data"] // 512) * 512
        world.write(at, world.random.randbytes(512), recorded=False)
    world.breqd._op_suspect({"workload": "wl", "volume": "data", "reason": "the host crashed"})


def test_resync_under_writes_that_is_killed_goes_on(wide: World) -> None:
    """A receiver dies in the middle: still suspect, what was acknowledged is not compared again, equal in the end."""
    engine = wide.engine()
    wide.until(engine, "in_step")
    wide.start_writer()
    wide.receiver_faults("receive.write=kill@120")
    _missed_writes(wide)
    engine.reconnect()
    wait(lambda: _epoch(engine) >= 3, "the session after the killed one")
    assert wide.breqd.items["wl", "data"].record.suspect is not None
    wait(lambda: wide.breqd.items["wl", "data"].record.suspect is None, "the end of the resync")
    size = wide.volumes["data"]
    assert wide.breqd.calls["resync_begin"] == 2
    assert size <= engine.totals.hashed_bytes < 2 * size - 8 * MIB, engine.totals
    wide.until(engine, "in_step")
    wide.stop_writer()
    wide.drain(engine)
    wide.check_equal()


def test_resync_is_done_once_more_when_others_may_have_written(wide: World) -> None:
    """The standby is written to while the resync is interrupted, where it had been compared: all is compared again."""
    wide.receiver_faults("receive.frame=delay:0.03")
    engine = wide.engine()
    wide.until(engine, "in_step")
    _missed_writes(wide)
    wait(lambda: (engine.progress or {}).get("done_bytes", 0) > 4 * MIB, "a part of the resync")
    _pause(wide, engine)
    hashed = engine.totals.hashed_bytes
    with open(wide.replica(), "r+b") as stream:
        stream.seek(3 * GRANULE)
        stream.write(b"foreign")
    wide.beta.count("data", 7)
    engine.pause(False)
    wait(lambda: wide.breqd.items["wl", "data"].record.suspect is None, "the end of the resync")
    assert engine.totals.hashed_bytes >= hashed + wide.volumes["data"], "a part was believed to be proved"
    wide.until(engine, "in_step")
    wide.drain(engine)
    wide.check_equal()


def test_resync_begins_anew_with_another_breqd(wide: World) -> None:
    """What another incarnation had proved is not believed."""
    wide.receiver_faults("receive.frame=delay:0.03")
    engine = wide.engine()
    wide.until(engine, "in_step")
    _missed_writes(wide)
    wait(lambda: (engine.progress or {}).get("done_bytes", 0) > 12 * MIB, "a part of the resync")
    hashed = engine.totals.hashed_bytes
    wide.breqd.restart()
    wait(lambda: wide.breqd.items["wl", "data"].record.suspect is None, "the end of the resync")
    assert engine.totals.hashed_bytes >= hashed + wide.volumes["data"]
    wide.until(engine, "in_step")
    wide.drain(engine)
    wide.check_equal()


def test_a_resync_that_ended_before_its_mark_proved_nothing(wide: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The session dies when breqd has given an id and nothing is dirty yet: what is clean then is no proof."""
    engine = wide.engine()
    wide.until(engine, "in_step")
    mark, died = Session.mark, threading.Event()

    def dying(self: Session, volume: str, extents: Any, reason: str) -> None:
        if reason == "resync" and not died.is_set():
            died.set()
            self.fail(UnreachableError("the link died", reason="link"))
        mark(self, volume, extents, reason)

    monkeypatch.setattr(Session, "mark", dying)
    hashed = engine.totals.hashed_bytes
    _missed_writes(wide)
    wait(lambda: wide.breqd.items["wl", "data"].record.suspect is None, "the end of the resync")
    assert died.is_set()
    assert engine.totals.hashed_bytes >= hashed + wide.volumes["data"], "a block was believed that nobody compared"
    wide.until(engine, "in_step")
    wide.drain(engine)
    wide.check_equal()


@pytest.mark.parametrize("anew", [False, True])
def test_a_resync_goes_on_after_a_kill_of_the_shipper(wide: World, anew: bool) -> None:
    """kill -9 in the middle: the next daemon goes on where it was, unless breqd was started again as well."""
    wide.receiver_faults("receive.frame=delay:0.03")
    first = wide.daemon()
    socket = wide.directory / "alpha" / "run" / "ship.sock"
    wait(lambda: _state(socket) == "in_step", "the seed", 60)
    _missed_writes(wide)
    size, record = wide.volumes["data"], wide.breqd.items["wl", "data"].record

    def left() -> int:
        """Bytes that are not proved."""
        return wide.breqd.maps.dirty_bytes(("wl", "data")) + wide.breqd.maps.claimed_bytes(("wl", "data"))

    wait(lambda: size // 2 < left(), "the mark of everything", 60)
    wait(lambda: left() <= size - 8 * MIB, "a part of the resync to be durable", 60)
    first.kill()
    first.wait()
    kept = left()
    assert record.suspect is not None and record.resyncs == 0 and kept > GRANULE
    if anew:
        wide.breqd.restart()
    wide.daemon()
    wait(lambda: record.suspect is None, "the end of the resync", 60)
    wait(lambda: _state(socket) == "in_step", "in step", 60)
    hashed = int(rpc.call(socket, "status", workload="wl")["workloads"][0]["hashed_bytes_total"])
    if anew:
        assert hashed == size, "what another breqd had cleared was believed"
    else:
        assert hashed <= kept + GRANULE, "what was proved is compared again"
    assert "resyncs" not in json.loads((wide.directory / "alpha" / "state" / "wl" / "ship.json").read_text())
    rpc.call(socket, "drain", 60, workload="wl", run_id="r1")
    wide.check_equal()


def test_foreign_write_on_the_standby_is_found_and_repaired(world: World) -> None:
    """hold saw the write counter move outside a session: both sides distrust the copy until it was compared."""
    engine = world.engine()
    world.until(engine, "in_step")
    _pause(world, engine)
    with open(world.replica(), "r+b") as stream:
        stream.seek(5 * GRANULE)
        stream.write(b"foreign")
    world.beta.count("data", 7)
    engine.pause(False)
    wait(lambda: world.breqd.items["wl", "data"].record.resyncs == 1, "a resync")
    world.until(engine, "in_step")
    assert world.beta.status()["suspect"] is None
    world.check_equal()


def test_a_drain_interrupts_a_verify_and_is_not_given_its_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was asked for is taken before the session goes on: the drain's proof is its own."""
    world = World(tmp_path, monkeypatch, {"data": 40 * MIB})
    try:
        _drain_during_a_verify(world)
    finally:
        world.close()


def _drain_during_a_verify(world: World) -> None:
    world.receiver_faults("receive.frame=delay:0.1")
    engine = world.engine()
    world.until(engine, "in_step")
    refused: list[BmigrateError] = []

    def verify() -> None:
        try:
            world.job(engine, "verify")
        except BmigrateError as error:
            refused.append(error)

    thread = threading.Thread(target=verify)
    thread.start()
    wait(lambda: (engine.progress or {}).get("done_bytes", 0) > 0, "the verify to compare")
    world.write(3 * GRANULE, world.random.randbytes(5 * GRANULE))
    epoch = _epoch(engine)
    assert len(world.drain(engine)["digest"]) == 64
    thread.join(60)
    assert [error.reason for error in refused] == ["interrupted"]
    assert _epoch(engine) == epoch, "the drain needed another session"
    world.check_equal()


def test_verify_is_quiet_under_writes_and_finds_damage(world: World) -> None:
    """A busy volume is no damage; one flipped byte on the standby is, at its very offset; --mark repairs it."""
    engine = world.engine()
    world.until(engine, "in_step")
    world.start_writer(0.001)
    quiet = world.job(engine, "verify")
    assert quiet["different_bytes"] == 0 and quiet["compared_bytes"] == world.volumes["data"]
    at = 700 * GRANULE
    with open(world.replica(), "r+b") as stream:
        stream.seek(at + 17)
        before = stream.read(1)
        stream.seek(at + 17)
        stream.write(bytes([before[0] ^ 1]))
    world.stop_writer()
    found = world.job(engine, "verify", mark=True)
    assert found["different_blocks"] == [{"volume": "data", "offset_bytes": at, "length_bytes": GRANULE}]
    assert found["marked"]
    world.drain(engine)
    world.check_equal()
    world.no_help()


@pytest.mark.parametrize("step", [1, 2])
def test_verify_of_a_replica_that_differs_nearly_everywhere(
    wide: World, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """All of it is one extent; every other block is too much to list, and it says that there is more."""
    monkeypatch.setattr(verify, "MAX_EXTENTS", 8)
    engine = wide.engine()
    wide.until(engine, "in_step")
    size = wide.volumes["data"]
    blocks = range(0, size // GRANULE, step)
    with open(wide.replica(), "r+b") as stream:
        for block in blocks:
            stream.seek(block * GRANULE)
            stream.write(b"\x5a" * GRANULE)
    found = wide.job(engine, "verify")
    if step == 1:
        whole = {"volume": "data", "offset_bytes": 0, "length_bytes": len(blocks) * GRANULE}
        assert (found["complete"], found["compared_bytes"], found["different_blocks"]) == (True, size, [whole])
    else:
        assert not found["complete"] and GRANULE <= found["different_bytes"] <= 8 * GRANULE
        assert found["compared_bytes"] < size, "it goes on reading what it cannot keep"
        assert {item["offset_bytes"] // GRANULE for item in found["different_blocks"]} <= set(blocks)


def test_drain_proves_what_the_standby_has(world: World) -> None:
    """A standby that stores something else than it was sent: refused by digest, and suspect before anybody is told."""
    engine = world.engine()
    world.until(engine, "in_step")
    _pause(world, engine)
    world.write(8 * GRANULE, world.random.randbytes(GRANULE))
    world.receiver_faults("receive.write=corrupt")
    wait(lambda: not world.breqd.log, "the log to be consumed")
    engine.record.paused = False
    engine.wake()
    with pytest.raises(RefusedError) as caught:
        world.drain(engine)
        # the engine may have shipped the block before the drain began; then this one is in it for sure
        engine.unseal()
        world.write(9 * GRANULE, world.random.randbytes(GRANULE))
        world.drain(engine, "run-2")
    assert caught.value.reason == "digest_mismatch"
    assert world.breqd.items["wl", "data"].record.suspicions == 1
    assert engine.wanted().what == "ship", "a failed drain does not seal"


def test_drain_waits_for_the_log(world: World) -> None:
    """Writes that are only in the kernel's log when the drain begins are shipped by it."""
    engine = world.engine()
    world.until(engine, "in_step")
    world.breqd.hold_log.set()
    for _ in range(20):
        world.random_write()
    result = world.drain(engine)
    assert result["bytes_shipped"] > 0
    assert result["bytes_left_at_start"] > 0, "what was in the log counts as left"
    world.check_equal()


def test_drain_is_refused_while_something_writes(world: World) -> None:
    """A file system that is still alive somewhere: new records between the barriers."""
    engine = world.engine()
    world.until(engine, "in_step")
    world.breqd.before_barrier = world.random_write
    with pytest.raises(RefusedError) as caught:
        world.drain(engine)
    assert caught.value.reason == "still_written"
    assert engine.wanted().what == "ship", "a failed drain does not seal"
    world.until(engine, "in_step")


def test_drain_of_a_suspect_volume_is_refused(world: World) -> None:
    """Suspect means unknown; nothing that is unknown is handed over."""
    engine = world.engine()
    world.until(engine, "in_step")
    world.breqd._op_suspect({"workload": "wl", "volume": "data", "reason": "module was reloaded"})
    with pytest.raises(SuspectError):
        world.drain(engine)


def test_unseal_ships_again(world: World) -> None:
    """The source resumes after a drain: a new epoch, and new writes travel."""
    engine = world.engine()
    world.until(engine, "in_step")
    world.drain(engine)
    world.until(engine, "sealed")
    world.write(0, world.random.randbytes(GRANULE))
    assert engine.unseal()
    world.until(engine, "in_step")
    wait(lambda: not world.different(), "the new write to arrive")
    assert _epoch(engine) == 2


def test_unseal_gives_up_a_drain_that_is_under_way(world: World) -> None:
    """The source was told to resume: a drain that ends later must not seal it behind its back."""
    engine = world.engine()
    world.until(engine, "in_step")
    world.receiver_faults("receive.fdatasync=delay:2")
    engine.reconnect()
    world.until(engine, "in_step")
    world.write(0, world.random.randbytes(GRANULE))
    answers: list[Any] = []
    engine.post(Job("drain", {"run_id": "r1"}, lambda value, error: answers.append((value, error)), 60))
    wait(lambda: engine.activity == "draining", "the drain to begin")
    assert engine.unseal()
    wait(lambda: answers, "an answer")
    assert answers[0][0] is None and answers[0][1].reason == "cancelled"
    assert engine.wanted().what == "ship"
    world.until(engine, "in_step")
    assert world.drain(engine)["epoch"] >= 2


def test_seal_survives_a_restart_by_the_phase_on_disk(world: World) -> None:
    """Killed after the drain: the next daemon reads the phase and ships nothing."""
    engine = world.engine()
    world.until(engine, "in_step")
    engine.stop()
    engine.join(30)
    world.role("primary", handover={"run_id": "r1", "side": "source", "phase": "drained"})
    second = world.engine()
    world.until(second, "sealed")
    with pytest.raises(PhaseError):
        world.drain(second, "r2")
    world.role("primary", handover=None)
    second.reload()
    world.until(second, "in_step")


def test_converge_answers_with_the_prediction_or_the_reason(world: World) -> None:
    """Reached: bytes and seconds. Not reached in time: a refusal that names state and numbers."""
    engine = world.engine()
    world.start_writer()
    answer = world.job(engine, "converge", run_id="r", max_drain_seconds=5.0)
    assert answer["predicted_drain_seconds"] <= 5.0 and answer["bytes_left"] >= 0
    with pytest.raises(RefusedError) as caught:
        world.job(engine, "converge", limit_seconds=1.0, run_id="r", max_drain_seconds=1e-9)
    assert caught.value.reason == "not_converging" and "predicted drain" in caught.value.message


def test_an_idle_workload_converges_after_a_stall(world: World) -> None:
    """Slow acknowledgements of before rule no prediction for ever: while nothing is written the link is measured."""
    engine = world.engine()
    world.until(engine, "in_step")
    for _ in range(5):
        engine.ship_rate.round_trip(70.0)
    assert (engine.predicted(engine.snapshot) or 0) >= 70.0
    answer = world.job(engine, "converge", run_id="r", max_drain_seconds=5.0)
    assert answer["predicted_drain_seconds"] <= 5.0


def test_bandwidth_limit_holds_and_a_drain_ignores_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """2 MiB/s for the seed; the drain, with the workload down, does not wait for it."""
    limits = Limits(bandwidth_bytes_per_second=2 * MIB)
    world = World(tmp_path, monkeypatch, {"data": 48 * MIB}, limits)
    try:
        engine = world.engine()
        world.until(engine, "seeding")
        wait(lambda: engine.totals.shipped_bytes > MIB, "some progress")
        assert engine.state()[0] == "seeding"
        assert engine.totals.shipped_bytes < 12 * MIB
        wait(lambda: engine.report()["limiter"] == "bandwidth_limit", "the limit to be named")
        result = world.drain(engine)
        assert result["bytes_shipped"] > 8 * MIB and result["seconds"] < 6
        world.check_equal()
    finally:
        world.close()


def test_a_standby_of_another_generation_is_named(world: World) -> None:
    """The refusal of the other side reaches the operator word for word, with its reason."""
    world.beta.role("standby", generation={"number": 2, "id": "f" * 32})
    engine = world.engine()
    world.until(engine, "disconnected")
    wait(lambda: engine.last_error is not None, "an error")
    assert engine.last_error is not None and engine.last_error.reason == "wrong_generation"
    assert "wrong" not in str(engine.snapshot)
    with pytest.raises(RefusedError):
        world.drain(engine)


def test_a_reverted_standby_is_compared(world: World) -> None:
    """A snapshot of the standby is restored, its notes included: what was acknowledged since is missing there."""
    engine = world.engine()
    world.until(engine, "in_step")
    state = world.directory / "beta" / "state" / "wl"
    kept = {path: path.read_bytes() for path in (world.replica(), state / "receive.ack", state / "hold.json")}
    for _ in range(10):
        world.random_write(hot=False)
    wait(lambda: not world.different(), "the writes to arrive")
    _pause(world, engine)
    world.beta.stop_hold()
    for path, content in kept.items():
        path.write_bytes(content)
    assert world.different()
    world.beta.start()
    engine.pause(False)
    wait(lambda: world.breqd.items["wl", "data"].record.resyncs >= 1, "a resync")
    world.until(engine, "in_step")
    world.check_equal()


def test_a_long_run_of_zeroes_is_one_frame(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sparse volume of many claims and one stream: its hole travels in one frame, and lands."""
    monkeypatch.setattr(passes, "ZERO_HOLD_SECONDS", 600.0)  # however slow this machine reads
    zeroes: list[tuple[int, int]] = []
    send = Lane.send

    def counted(self: Lane, type_: FrameType, **fields: Any) -> None:
        if type_ is FrameType.ZERO:
            zeroes.append((fields["offset"], fields["aux"]))
        send(self, type_, **fields)

    monkeypatch.setattr(Lane, "send", counted)
    world = World(tmp_path, monkeypatch, {"data": 256 * MIB})
    try:
        os.truncate(world.source(), 0)
        os.truncate(world.source(), 256 * MIB)
        world.write(0, os.urandom(MIB), recorded=False)
        world.write(255 * MIB, os.urandom(MIB), recorded=False)
        with open(world.replica(), "r+b") as stream:
            stream.seek(100 * MIB)
            stream.write(os.urandom(MIB))
        world.config = dataclasses.replace(world.config, streams=1)
        engine = world.engine()
        world.until(engine, "in_step")
        assert zeroes == [(MIB, 254 * MIB)]
        assert engine.totals.zero_bytes == 254 * MIB and engine.totals.shipped_bytes == 2 * MIB
        world.drain(engine)
        world.check_equal()
    finally:
        world.close()


def test_a_trim_while_it_ships_is_one_event_and_never_losing_ground(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """fstrim of nearly the whole volume goes on during three passes in a row, each of which leaves what it found."""
    caplog.set_level(logging.INFO)
    world = World(tmp_path, monkeypatch, limits=Limits(max_drain_seconds=1e-6))
    trimmed = 7 * MIB
    states: list[str] = []
    run_pass, passed = engines.run_pass, Engine._passed
    left = 3

    def trimming(*arguments: Any, **keywords: Any) -> PassResult:
        nonlocal left
        result = run_pass(*arguments, **keywords)
        if left:
            left -= 1
            world.discard(0, trimmed)
            world.breqd.consume()
        return result

    def watched(self: Engine, *arguments: Any) -> None:
        passed(self, *arguments)
        states.append(self.state()[0])

    def trims() -> list[Any]:
        return [entry.__dict__ for entry in caplog.records if getattr(entry, "BMIGRATE_EVENT", "") == "trim"]

    monkeypatch.setattr(engines, "run_pass", trimming)
    monkeypatch.setattr(Engine, "_passed", watched)
    try:
        engine = world.engine()
        world.until(engine, "in_step")
        assert len(states) >= 4 and "losing_ground" not in states, states
        (event,) = trims()
        assert (event["BMIGRATE_WORKLOAD"], event["BMIGRATE_DISCARDED_BYTES"]) == ("wl", str(trimmed))
        assert event["MESSAGE_ID"] == log.message_id("trim")
        left = 1
        world.write(0, os.urandom(GRANULE))
        wait(lambda: len(trims()) == 2, "the event of the next trim")
        world.until(engine, "in_step")
        world.discard(0, trimmed)
        world.breqd.consume()
        wait(lambda: len(trims()) == 3, "the event of a trim that was over before a pass began")
        world.until(engine, "in_step")
        assert "losing_ground" not in states, states
        world.drain(engine)
        world.check_equal()
    finally:
        world.close()


def test_an_older_standby_gets_frames_that_it_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A session of version 1: every extent travels in a frame of its own, and nothing else differs."""
    greeting = handshake.greeting
    monkeypatch.setattr(handshake, "greeting", lambda *given: dataclasses.replace(greeting(*given), v=1))
    world = World(tmp_path, monkeypatch)
    try:
        engine = world.engine()
        world.until(engine, "in_step")
        for number in range(40):
            world.write(number * 16384, os.urandom(4096))
        world.drain(engine)
        world.check_equal()
    finally:
        world.close()


def test_the_limit_changes_while_it_ships_and_survives_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """128 KiB/s would take minutes: without a limit the seed ends at once, in the same session."""
    world = World(tmp_path, monkeypatch, {"data": 48 * MIB}, Limits(bandwidth_bytes_per_second=128 * 1024))
    try:
        engine = world.engine()
        world.until(engine, "seeding")
        entry = engine.report()
        assert (entry["bandwidth_bytes_per_second"], entry["bandwidth_source"]) == (128 * 1024, "config")
        assert engine.limit(0) and not engine.limit(0)
        world.until(engine, "in_step")
        after = engine.report()
        assert (after["bandwidth_bytes_per_second"], after["bandwidth_source"]) == (0, "operator")
        assert after["epoch"] == entry["epoch"], "a new limit needs no new session"
        assert Engine(world.config, engine.transport).bandwidth == 0, "it is durable"
        assert engine.limit(None) and engine.report()["bandwidth_bytes_per_second"] == 128 * 1024
        for wrong in (-1, "5", True, 1.5):
            with pytest.raises(UsageError):
                engine.limit(wrong)
    finally:
        world.close()


def _poke(path: Path, offset: int) -> None:
    """Something else in a block of a file, behind everybody's back."""
    fd = os.open(path, os.O_WRONLY)
    try:
        os.pwrite(fd, os.urandom(GRANULE), offset)
    finally:
        os.close(fd)


def _damaged_before_the_proof(world: World, monkeypatch: pytest.MonkeyPatch, offset: int) -> None:
    """The standby's disk has something else there when the drain's proof begins."""
    prove = drain._prove

    def damaged(*arguments: Any) -> None:
        _poke(world.replica(), offset)
        prove(*arguments)

    monkeypatch.setattr(drain, "_prove", damaged)


@pytest.mark.parametrize("breqd", ["answers", "is gone"])
def test_a_mismatch_is_never_forgotten(world: World, monkeypatch: pytest.MonkeyPatch, breqd: str) -> None:
    """The session ends in the moment in which the proof sees that the standby has something else."""
    engine = world.engine()
    world.until(engine, "in_step")
    answer, suspect = Session.answer, Tracker.suspect
    gone = breqd == "is gone"

    def cut(self: Session) -> bytes:
        payload = answer(self)
        self.fail(UnreachableError("the link is cut", reason="disconnected"))
        return payload

    def silent(self: Tracker, *arguments: str) -> None:
        if gone:
            raise UnreachableError("breqd is gone", reason="breqd_unreachable")
        suspect(self, *arguments)

    monkeypatch.setattr(Tracker, "suspect", silent)
    _damaged_before_the_proof(world, monkeypatch, 0)
    world.write(0, os.urandom(GRANULE))
    with monkeypatch.context() as during, pytest.raises(BmigrateError) as caught:
        during.setattr(Session, "answer", cut)
        world.drain(engine)
    assert caught.value.reason == "digest_mismatch"
    gone = False
    wait(lambda: world.breqd.items["wl", "data"].record.resyncs == 1, "a comparison of everything")
    world.until(engine, "in_step")
    world.check_equal()


def test_answers_that_have_come_are_judged_whatever_ends_the_proof(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The link is cut after all of them have come, and before the one that tells of the damage is looked at."""
    monkeypatch.setattr(drain, "REREAD_PIECES", 1)
    world = World(tmp_path, monkeypatch)
    try:
        engine = world.engine()
        world.until(engine, "in_step")
        answer = Session.answer
        looked = 0

        def late(self: Session) -> bytes:
            nonlocal looked
            looked += 1
            if looked == 1:
                wait(lambda: not self._expected, "all answers")
                answer(self)
                self.fail(UnreachableError("the link is cut", reason="disconnected"))
                raise self._failure or AssertionError
            return answer(self)

        _damaged_before_the_proof(world, monkeypatch, 3 * 64 * GRANULE)
        for number in range(6):
            world.write(number * 64 * GRANULE, os.urandom(GRANULE))
        with monkeypatch.context() as during, pytest.raises(BmigrateError) as caught:
            during.setattr(Session, "answer", late)
            world.drain(engine)
        assert caught.value.reason == "digest_mismatch"
        wait(lambda: world.breqd.items["wl", "data"].record.resyncs == 1, "a comparison of everything")
        world.until(engine, "in_step")
        world.check_equal()
    finally:
        world.close()


def test_what_a_failed_proof_left_unanswered_is_no_answer_to_the_resync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A drain whose proof fails early leaves answers on their way; the resync that follows must not take them for its
    own, or a damaged block is called equal and every suspicion is taken back."""
    monkeypatch.setattr(drain, "REREAD_PIECES", 1)
    world = World(tmp_path, monkeypatch, {"data": 24 * MIB})
    try:
        engine = world.engine()
        world.until(engine, "in_step")
        epoch = (engine.record.session or {})["epoch"]
        prove = drain._prove

        def damaged(*arguments: Any) -> None:
            _poke(world.replica(), 0)
            _poke(world.replica(), 17 * MIB + 8 * GRANULE)
            prove(*arguments)

        monkeypatch.setattr(drain, "_prove", damaged)
        for number in range(6):
            world.write(number * 64 * GRANULE, os.urandom(GRANULE))
        with pytest.raises(RefusedError) as caught:
            world.drain(engine)
        assert caught.value.reason == "digest_mismatch"
        wait(lambda: world.breqd.items["wl", "data"].record.resyncs == 1, "the resync")
        world.until(engine, "in_step")
        assert (engine.record.session or {})["epoch"] > epoch, "the session went on with answers that nobody waits for"
        world.check_equal()
    finally:
        world.close()


def test_a_verify_that_failed_leaves_no_answer_to_the_next(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read error in the middle of a comparison; the next one finds the damage, and nothing but the damage."""
    engine = world.engine()
    world.until(engine, "in_step")
    read_into = source.SourceVolume.read_into
    failed: list[int] = []

    def failing(self: source.SourceVolume, view: memoryview, offset: int) -> None:
        if offset <= 6 * MIB < offset + len(view) and not failed:
            failed.append(offset)
            raise RefusedError("reading failed", reason="read_failed")
        read_into(self, view, offset)

    monkeypatch.setattr(source.SourceVolume, "read_into", failing)
    with pytest.raises(RefusedError, match="reading failed"):
        world.job(engine, "verify")
    world.until(engine, "in_step")
    _poke(world.replica(), 5 * MIB + 8 * GRANULE)
    found = world.job(engine, "verify")
    assert found["different_bytes"] == GRANULE, found
