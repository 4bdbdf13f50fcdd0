# SPDX-License-Identifier: GPL-3.0-or-later
"""hold and breceive as real processes: who may write, when, and what survives whose death."""

from __future__ import annotations

import fcntl
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bmigrate.common import blockdev
from bmigrate.common.errors import BmigrateError, RefusedError
from bmigrate.handover import early
from bmigrate.wire import hello as greeting
from bmigrate.wire.frames import FrameType
from tests.unit.standby_host import GENERATION, MIB, Sender, StandbyHost, wait


@pytest.fixture
def host(tmp_path: Path) -> Iterator[StandbyHost]:
    standby = StandbyHost(tmp_path)
    standby.start()
    yield standby
    standby.close()


def content(host: StandbyHost, offset: int, length: int) -> bytes:
    with open(host.device("data"), "rb") as stream:
        return os.pread(stream.fileno(), length, offset)


def acknowledged(sender: Sender, number: int) -> None:
    sender.send(FrameType.SYNC, aux=number)
    frame = sender.receive()
    assert frame is not None and (frame.type, frame.aux) == (FrameType.ACK, number)


def refused(host: StandbyHost, **changes: object) -> str:
    """Reason for which a session is refused; the exit code must be the documented one."""
    sender = host.sender()
    frame = sender.hello(host, **changes)
    assert frame.type is FrameType.ERROR, bytes(frame.payload)
    error = greeting.decode_error(frame.payload)
    assert error["host"], error
    assert sender.ended() == 3
    return str(error["reason"])


def test_an_old_receiver_is_dead_before_the_next_session_begins(host: StandbyHost) -> None:
    """Bytes of a dead connection sit in a stopped receiver's pipe; they must never land on newer ones."""
    old = host.session()
    acknowledged(old, 1)
    old.process.send_signal(signal.SIGSTOP)
    wait(lambda: Path(f"/proc/{old.process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T", "the stop")
    for block in range(8):
        old.send(FrameType.DATA, offset=block * 4096, payload=b"old!" * 1024)
    new = host.session(last_session=old.last_session(1))
    assert new.welcome is not None and old.welcome is not None and new.welcome.epoch > old.welcome.epoch
    # The grant has come: the old process must be a corpse already, not merely condemned.
    assert old.process.poll() == -signal.SIGKILL
    new.send(FrameType.DATA, offset=0, payload=b"new!" * 8192)
    acknowledged(new, 1)
    assert content(host, 0, 32768) == b"new!" * 8192
    assert host.status()["suspect"] is None


def test_no_grant_and_no_fence_while_an_old_receiver_lives(tmp_path: Path) -> None:
    """SIGKILL is not death: a receiver that is stuck in the kernel can still write."""
    host = StandbyHost(tmp_path)
    try:
        host.start(EDGE_KILLS_ARE_LOST="1")
        old = host.session()
        new = host.sender()
        new.send_hello(host, last_session=old.last_session(0))
        wait(lambda: host.status()["waiting"] == 1, "hold to wait for the old receiver")
        assert not new.readable(1.0)
        assert host.status()["receivers"] == [old.process.pid] and host.record()["epoch"] == 1
        old.process.kill()
        frame = new.receive()
        assert frame is not None and frame.type is FrameType.WELCOME and frame.epoch == 2
    finally:
        host.close()


def test_a_stopped_receiver_dies_before_a_fence_is_answered(host: StandbyHost) -> None:
    old = host.session()
    old.process.send_signal(signal.SIGSTOP)
    old.send(FrameType.DATA, offset=0, payload=b"old!" * 1024)
    with host.client() as fencer:
        answer = fencer.call("fence", workload="wl")
        assert old.process.poll() == -signal.SIGKILL
        assert answer["epoch"] == host.record()["epoch"] == 2
        assert content(host, 0, 4) == b"\0\0\0\0"
        assert refused(host) == "sealed"


def test_a_seal_ends_with_the_handover_that_wanted_it(host: StandbyHost) -> None:
    with host.client() as fencer:
        fencer.call("fence", workload="wl")
        assert refused(host) == "sealed"
        host.role("standby", handover={"phase": "prepared", "run_id": "r", "side": "target"})
    assert refused(host) == "sealed"
    host.kill_hold()
    host.start()
    assert refused(host) == "sealed"
    host.role("standby")
    host.session()


def test_a_seal_is_ended_by_nobody_else(host: StandbyHost) -> None:
    """An installation that runs again, and a change of configuration, while the target is fenced, then prepared."""
    with host.client() as fencer:
        fencer.call("fence", workload="wl")
        for op in ("hold", "reload"):
            host.call(op, **({"workload": "wl"} if op == "hold" else {}))
            assert host.status()["sealed"] and refused(host) == "sealed"
        candidate = {"number": 2, "id": "e" * 32}
        host.role("standby", candidate=candidate, handover={"phase": "prepared", "run_id": "r", "side": "target"})
    for op in ("hold", "reload"):
        host.call(op, **({"workload": "wl"} if op == "hold" else {}))
        assert host.status()["sealed"] and refused(host) == "sealed"


def test_who_is_prepared_takes_no_more_data_whatever_hold_remembers(host: StandbyHost) -> None:
    host.role("standby", candidate={"number": 2, "id": "e" * 32})
    assert refused(host) == "sealed"


def test_a_seal_ends_with_a_step_that_died_before_its_note(host: StandbyHost) -> None:
    with host.client() as fencer:
        fencer.call("fence", workload="wl")
    wait(lambda: not host.status()["sealed"], "the end of the seal")
    with host.client() as fencer:
        fencer.call("fence", workload="wl")
        host.kill_hold()
    host.start()
    sender = host.session()
    assert sender.welcome is not None and sender.welcome.epoch == 3


def test_hold_killed_keeps_the_device_and_kills_the_receivers_it_does_not_know(host: StandbyHost) -> None:
    old = host.session()
    before = host.status()
    host.count("data", 7)  # what the session wrote
    old.process.send_signal(signal.SIGSTOP)
    old.send(FrameType.DATA, offset=0, payload=b"old!" * 1024)
    host.kill_hold()
    with open(host.device("data"), "rb") as stream, pytest.raises(BlockingIOError):
        fcntl.flock(stream.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)  # still held, by the store
    host.start()
    assert old.ended() == -signal.SIGKILL
    after = wait(lambda: (lambda status: not status["receivers"] and status)(host.status()), "the old receiver's end")
    assert after["hold_id"] == before["hold_id"] and after["held"] and after["suspect"] is None
    assert content(host, 0, 4) == b"\0\0\0\0"
    new = host.session(last_session=old.last_session(0))
    assert new.welcome is not None and new.welcome.epoch == 2 and new.welcome.volumes[0].suspect is None


def test_a_receiver_ends_when_hold_dies(host: StandbyHost) -> None:
    sender = host.session()
    host.kill_hold()
    assert sender.error()["reason"] == "session_over"
    assert sender.ended() == 4


def test_a_receiver_killed_between_filing_and_grant_by_a_crash_of_hold(tmp_path: Path) -> None:
    host = StandbyHost(tmp_path)
    try:
        host.start(BMIGRATE_FAULTS="hold.admitted=kill")
        sender = host.sender()
        frame = sender.hello(host)
        assert frame.type is FrameType.ERROR and greeting.decode_error(frame.payload)["code"] == "unreachable"
        assert sender.ended() == 4
        host.manager.pump()
        host.start()
        again = host.session()
        assert again.welcome is not None and again.welcome.epoch == 1 and again.welcome.volumes[0].suspect is None
    finally:
        host.close()


def test_a_granted_epoch_is_never_granted_again(tmp_path: Path) -> None:
    host = StandbyHost(tmp_path)
    try:
        host.start(BMIGRATE_FAULTS="hold.granted=kill")
        sender = host.sender()
        sender.hello(host)
        sender.ended()
        host.manager.pump()
        host.start()
        assert host.record()["epoch"] == 1
        again = host.session()
        assert again.welcome is not None and again.welcome.epoch == 2
    finally:
        host.close()


def test_the_epoch_is_above_all_that_the_source_has_seen(host: StandbyHost) -> None:
    sender = host.session(highest_epoch=41)
    assert sender.welcome is not None and sender.welcome.epoch == 42


@pytest.mark.parametrize("seen", ["highest_epoch", "last_session"])
def test_one_hello_cannot_use_the_epochs_up(host: StandbyHost, seen: str) -> None:
    most = (1 << 63) - 1
    before = host.record()
    assert refused(host, **{seen: most if seen == "highest_epoch" else greeting.LastSession(most, "1" * 32, 0)}) == (
        "bad_epoch"
    )
    assert refused(host, highest_epoch=most + 1) == "bad_hello"
    assert host.record() == before
    host.session()


def test_writes_outside_of_a_session_make_the_volume_suspect(host: StandbyHost) -> None:
    sender = host.session()
    host.count("data", 5)
    acknowledged(sender, 1)
    sender.send(FrameType.BYE)
    assert sender.ended() == 0
    wait(lambda: not host.status()["session_open"], "the end of the session")
    host.count("data", 6)
    again = host.session(last_session=sender.last_session(1))
    assert again.welcome is not None
    assert "outside of a session: 1 writes" in (again.welcome.volumes[0].suspect or "")
    assert "outside of a session" in host.record()["volumes"]["data"]["suspect"]


def test_writes_of_a_session_are_no_suspicion(host: StandbyHost) -> None:
    sender = host.session()
    host.count("data", 500)
    sender.close()
    wait(lambda: not host.status()["session_open"], "the end of the session")
    again = host.session(last_session=sender.last_session(0))
    assert again.welcome is not None and again.welcome.volumes[0].suspect is None


def test_an_orderly_restart_keeps_the_trust_and_uses_the_closing_note_up(host: StandbyHost) -> None:
    host.stop_hold()
    assert host.record()["volumes"]["data"]["closed"]
    host.manager.forget()
    host.start()
    assert host.status()["suspect"] is None
    assert host.record()["volumes"]["data"]["closed"] is None
    host.kill_hold()
    host.manager.forget()
    host.start()
    assert "lost its exclusive hold" in host.status()["suspect"]


def test_the_closing_note_is_used_up_by_a_restart_that_kept_the_descriptor(host: StandbyHost) -> None:
    host.stop_hold()
    host.start()
    host.kill_hold()
    host.manager.forget()
    host.start()
    assert "lost its exclusive hold" in host.status()["suspect"]


def test_a_write_between_an_orderly_stop_and_the_next_start_is_noticed(host: StandbyHost) -> None:
    host.stop_hold()
    host.manager.forget()
    host.count("data", 1)
    host.start()
    assert "while nobody held it: 1 writes" in host.status()["suspect"]


@pytest.mark.parametrize("witness", ["hold", "early"])
def test_a_closing_note_is_of_no_use_after_a_boot_in_which_nobody_held_the_volume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, witness: str
) -> None:
    """Somebody had the device in between; what was written then is in no counter of the boot after it."""
    host = StandbyHost(tmp_path)
    try:
        host.start(EDGE_BOOT_ID="a")
        host.stop_hold()
        host.manager.forget()
        if witness == "hold":
            with open(host.device("data"), "rb") as other:
                fcntl.flock(other.fileno(), fcntl.LOCK_EX)
                host.start(EDGE_BOOT_ID="b")
                assert host.status()["error"]["reason"] == "device_busy"
                host.stop_hold()
        else:
            monkeypatch.setenv("BMIGRATE_STATE", host.environment["BMIGRATE_STATE"])
            monkeypatch.setenv("BMIGRATE_RUN", host.environment["BMIGRATE_RUN"])
            monkeypatch.setattr(blockdev, "boot_id", lambda: "b")
            early.retire_all()
        host.manager.forget()
        host.start(EDGE_BOOT_ID="c")
        assert "in that boot it was not held" in host.status()["suspect"]
    finally:
        host.close()


def test_a_device_that_comes_late_in_a_boot_is_believed(tmp_path: Path) -> None:
    host = StandbyHost(tmp_path)
    try:
        host.start(EDGE_BOOT_ID="a")
        host.stop_hold()
        host.manager.forget()
        with open(host.device("data"), "rb") as other:
            fcntl.flock(other.fileno(), fcntl.LOCK_EX)
            host.start(EDGE_BOOT_ID="b")
            assert not host.status()["held"]
        wait(lambda: host.status()["held"], "the device to be held")
        assert host.status()["suspect"] is None
    finally:
        host.close()


def test_a_device_that_cannot_be_judged_is_not_kept_from_the_next_try(tmp_path: Path) -> None:
    host = StandbyHost(tmp_path)
    bad = tmp_path / "bad"
    try:
        host.start(EDGE_BOOT_ID="a")
        host.stop_hold()
        host.manager.forget()
        bad.touch()
        host.start(EDGE_BOOT_ID="b", EDGE_UNREADABLE=str(bad))
        assert host.status()["error"]["reason"] == "io_error" and not host.status()["held"]
        with pytest.raises(BmigrateError):
            host.call("hold", workload="wl")
        with open(host.device("data"), "rb") as free:
            fcntl.flock(free.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        bad.unlink()
        wait(lambda: host.status()["held"], "the device to be held")
        assert host.status()["suspect"] is None
    finally:
        host.close()


def test_a_volume_that_was_taken_out_of_the_configuration_is_not_forgotten(tmp_path: Path) -> None:
    host = StandbyHost(tmp_path, {"data": 8 * MIB, "extra": MIB})
    try:
        host.start()
        first = host.session()
        acknowledged(first, 1)
        both = host.config_file.read_text()
        host.configure("".join(line for line in both.splitlines(True) if "extra" not in line))
        host.call("reload")
        wait(lambda: [item["volume"] for item in host.call("status")["volumes"]] == ["data"], "the other volume's end")

        def is_free() -> bool:
            with open(host.device("extra"), "rb") as free:
                try:
                    fcntl.flock(free.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    return False
            return True

        wait(is_free, "the device to be let go")
        host.configure(both)
        host.call("reload")
        wait(lambda: host.status("extra")["held"], "the device to be held again")
        again = host.session(last_session=first.last_session(1))
        assert again.welcome is not None
        suspect = {item.name: item.suspect for item in again.welcome.volumes}
        assert suspect["data"] is None and "did not name it" in (suspect["extra"] or "")
    finally:
        host.close()


def test_nor_is_one_that_was_taken_out_while_hold_was_stopped(tmp_path: Path) -> None:
    """The stop was orderly, and its closing note would be believed after the next boot."""
    host = StandbyHost(tmp_path, {"data": 8 * MIB, "extra": MIB})
    try:
        host.start(EDGE_BOOT_ID="a")
        both = host.config_file.read_text()
        host.stop_hold()
        assert host.record()["volumes"]["extra"]["closed"]
        host.configure("".join(line for line in both.splitlines(True) if "extra" not in line))
        host.start(EDGE_BOOT_ID="a")
        host.stop_hold()
        host.manager.forget()
        host.configure(both)
        host.start(EDGE_BOOT_ID="b")
        assert host.status("data")["suspect"] is None and "did not name it" in host.status("extra")["suspect"]
    finally:
        host.close()


def test_a_full_disk_at_boot_keeps_nothing_from_being_held(tmp_path: Path) -> None:
    host = StandbyHost(tmp_path, {"one": MIB, "two": MIB})
    try:
        host.start(EDGE_BOOT_ID="a")
        host.stop_hold()
        host.manager.forget()
        host.start(EDGE_BOOT_ID="b", BMIGRATE_FAULTS="hold.save=error:28@1,hold.save=error:28@2")
        assert host.status("one")["held"] and host.status("two")["held"]
    finally:
        host.close()


def test_a_fence_that_cannot_be_noted_ends_no_daemon(tmp_path: Path) -> None:
    """Neither when it is asked for nor when who asked goes away; and nothing is sealed by it."""
    host = StandbyHost(tmp_path)
    try:
        # The first save is that of the volume being taken.
        host.start(BMIGRATE_FAULTS="hold.save=error:28@2,hold.save=error:28@3")
        with host.client() as fencer, pytest.raises(BmigrateError):
            fencer.call("fence", workload="wl")
        assert not host.status()["sealed"]
        with pytest.raises(BmigrateError):  # the disk is full still
            host.call("hold", workload="wl")
        host.session()
    finally:
        host.close()


def test_a_seal_whose_end_cannot_be_noted_ends_later(tmp_path: Path) -> None:
    host = StandbyHost(tmp_path)
    try:
        host.start(BMIGRATE_FAULTS="hold.save=error:28@3")
        with host.client() as fencer:
            fencer.call("fence", workload="wl")
        wait(lambda: not host.status()["sealed"], "the end of the seal")
        host.session()
    finally:
        host.close()


def test_a_grant_that_failed_lets_nobody_write(host: StandbyHost) -> None:
    """No receiver could be put on file: what is written from then on is nobody's of ours."""
    first = host.session()
    acknowledged(first, 1)
    first.close()
    wait(lambda: not host.status()["session_open"], "the end of the session")
    file = host.directory / "run" / "hold"
    file.rename(file.with_name("aside"))
    file.touch()
    assert refused(host, last_session=first.last_session(1)) == "os_error"
    assert not host.status()["session_open"]
    file.unlink()
    file.with_name("aside").rename(file)
    host.count("data", 99)
    again = host.session(last_session=first.last_session(1))
    assert again.welcome is not None and "outside of a session" in (again.welcome.volumes[0].suspect or "")


def test_the_end_of_a_receiver_that_cannot_be_put_on_file_is_an_end(host: StandbyHost) -> None:
    first = host.session()
    acknowledged(first, 1)
    file = host.directory / "run" / "hold"
    file.rename(file.with_name("aside"))
    file.touch()
    first.close()
    wait(lambda: not host.status()["session_open"], "the end of the session")
    file.unlink()
    file.with_name("aside").rename(file)
    again = host.session(last_session=first.last_session(1))
    assert again.welcome is not None and again.welcome.volumes[0].suspect is None


def test_only_one_watches_the_receivers_after_a_start_that_failed(tmp_path: Path) -> None:
    host = StandbyHost(tmp_path)
    try:
        host.start()
        old = host.session()
        old.process.send_signal(signal.SIGSTOP)
        host.kill_hold()
        host.start(EDGE_KILLS_ARE_LOST="1", BMIGRATE_FAULTS="hold.save=error:28@1")
        assert host.call("status")["volumes"] == [], "it was taken up, although nothing could be noted"
        (status,) = host.call("status", workload="wl")["volumes"]
        assert status["receivers"] == [old.process.pid] and status["held"]
        assert host.hold is not None
        links = [os.readlink(path) for path in Path(f"/proc/{host.hold.pid}/fd").iterdir() if path.is_symlink()]
        assert links.count("anon_inode:[pidfd]") == 1, links
        old.process.kill()
        again = host.session(last_session=old.last_session(0))
        assert again.welcome is not None and again.welcome.epoch == 2 == host.record()["epoch"]
        assert host.status()["receivers"] == [again.process.pid]
    finally:
        host.close()


def test_a_suspicion_survives_restarts_until_a_resync_ends_it(host: StandbyHost) -> None:
    host.stop_hold()
    host.manager.forget()
    host.count("data", 1)
    host.start()
    for _ in range(2):
        host.stop_hold()
        host.start()
        assert host.status()["suspect"]
    sender = host.session()
    with pytest.raises(RefusedError) as caught:
        host.call("clear_suspect", workload="wl", volume="data")
    assert caught.value.reason == "not_registered"
    acknowledged(sender, 1)
    sender.send(FrameType.RESYNC_DONE, volume=0)
    frame = sender.receive()
    assert frame is not None and frame.type is FrameType.RESYNC_DONE
    assert host.record()["volumes"]["data"]["suspect"] is None


def test_resync_done_before_its_sync_is_refused(host: StandbyHost) -> None:
    sender = host.session()
    sender.send(FrameType.ZERO, offset=0, aux=4096)
    sender.send(FrameType.RESYNC_DONE, volume=0)
    assert sender.error()["reason"] == "bad_sequence"
    assert sender.ended() == 3


def test_a_standby_that_went_back_is_suspect(host: StandbyHost) -> None:
    sender = host.session()
    acknowledged(sender, 1)
    acknowledged(sender, 2)
    again = host.session(last_session=sender.last_session(3))
    assert again.welcome is not None and "went back" in (again.welcome.volumes[0].suspect or "")


def test_a_source_that_went_back_is_noticed(host: StandbyHost) -> None:
    first = host.session()
    acknowledged(first, 1)
    second = host.session(last_session=first.last_session(1))
    acknowledged(second, 1)
    third = host.session(last_session=first.last_session(1))
    assert third.welcome is not None and "the source went back" in (third.welcome.volumes[0].suspect or "")


@pytest.mark.parametrize("frame", [FrameType.DATA, FrameType.ZERO])
def test_a_source_that_went_back_behind_what_it_sent_is_noticed(host: StandbyHost, frame: FrameType) -> None:
    """Nothing of that session was acknowledged, and its data may have landed all the same."""
    first = host.session()
    acknowledged(first, 1)
    second = host.session(last_session=first.last_session(1))
    if frame is FrameType.DATA:
        second.send(frame, offset=0, payload=b"new!" * 1024)
    else:
        second.send(frame, offset=0, aux=4096)
    second.send(FrameType.PING, aux=7)
    answer = second.receive()
    assert answer is not None and answer.type is FrameType.PONG
    host.session(last_session=second.last_session(0))  # it remembers: no suspicion, and one more grant
    assert host.status()["suspect"] is None
    again = host.session(last_session=first.last_session(1))
    assert again.welcome is not None and "the source went back" in (again.welcome.volumes[0].suspect or "")


def test_a_further_stream_that_writes_is_noted_too(host: StandbyHost) -> None:
    first = host.session(streams=2)
    assert first.welcome is not None
    member = host.session(streams=2, join=greeting.Join(first.welcome.epoch, first.welcome.session_id))
    member.send(FrameType.DATA, offset=0, payload=b"new!" * 1024)
    member.send(FrameType.MARK, aux=1)
    answer = member.receive()
    assert answer is not None and answer.type is FrameType.MARKED
    again = host.session()
    assert again.welcome is not None and "the source went back" in (again.welcome.volumes[0].suspect or "")


def test_nobody_but_a_receiver_says_that_it_writes(host: StandbyHost) -> None:
    host.session()
    with pytest.raises(RefusedError) as caught:
        host.call("writing", workload="wl")
    assert caught.value.reason == "not_registered"


def test_a_session_without_an_acknowledgement_may_be_forgotten_by_the_source(host: StandbyHost) -> None:
    first = host.session()
    acknowledged(first, 1)
    host.session(last_session=first.last_session(1))
    third = host.session(last_session=first.last_session(1))
    assert third.welcome is not None and third.welcome.volumes[0].suspect is None


def test_who_may_not_have_a_session(host: StandbyHost) -> None:
    good = host.session()
    volume = greeting.HelloVolume("data", 8 * MIB, 512, 4096)
    assert refused(host, generation=greeting.Generation(2, "d" * 32)) == "wrong_generation"
    assert refused(host, generation=greeting.Generation(1, "d" * 32)) == "wrong_generation"
    assert refused(host, volumes=[greeting.HelloVolume("other", 8 * MIB, 512, 4096)]) == "unknown_volume"
    assert refused(host, volumes=[volume, greeting.HelloVolume("more", MIB, 512, 4096)]) == "unknown_volume"
    assert refused(host, volumes=[greeting.HelloVolume("data", 8 * MIB + 512, 512, 4096)]) == "too_small"
    assert refused(host, workload="other") == "wrong_workload"
    host.sysfs("data", "queue/logical_block_size", "4096")
    assert refused(host) == "block_size"
    host.sysfs("data", "queue/logical_block_size", "512")
    # None of them may have cost the good one its session.
    acknowledged(good, 1)
    host.role("primary")
    assert refused(host) == "wrong_role"


def test_a_busy_device_is_refused_and_held_as_soon_as_it_is_free(tmp_path: Path) -> None:
    host = StandbyHost(tmp_path)
    try:
        with open(host.device("data"), "rb") as other:
            fcntl.flock(other.fileno(), fcntl.LOCK_EX)
            host.start()
            status = host.status()
            assert not status["held"] and status["error"]["reason"] == "device_busy"
            assert refused(host) == "not_held"
            with pytest.raises(RefusedError) as caught:
                host.call("hold", workload="wl")
            assert caught.value.reason == "device_busy" and caught.value.volume == "data"
        wait(lambda: host.status()["held"], "the device to be held")
        host.session()
    finally:
        host.close()


def test_hold_takes_all_volumes_or_none(tmp_path: Path) -> None:
    host = StandbyHost(tmp_path, {"one": MIB, "two": MIB})
    try:
        host.role("primary")
        host.start()
        with open(host.device("two"), "rb") as other:
            fcntl.flock(other.fileno(), fcntl.LOCK_EX)
            with pytest.raises(RefusedError):
                host.call("hold", workload="wl")
            assert not host.status("one")["held"]
            with open(host.device("one"), "rb") as free:
                fcntl.flock(free.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        host.call("hold", workload="wl")
        assert host.status("one")["held"] and host.status("two")["held"]
        host.manager.remove_delay_seconds = 0.3
        host.call("release", workload="wl")
        for name in host.volumes:  # free for everybody at the moment of the answer, not some time later
            with open(host.device(name), "rb") as free:
                fcntl.flock(free.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert not host.status("one")["held"] and not host.stored()
    finally:
        host.close()


def test_a_demoted_source_keeps_the_same_hold_and_a_standby_never_lets_go(host: StandbyHost, tmp_path: Path) -> None:
    handover = {"phase": "quiesced", "run_id": "r", "side": "source"}
    host.role("primary")
    host.call("release", workload="wl")
    host.role("primary", handover=handover)
    taken = host.call("hold", workload="wl")["volumes"][0]["hold_id"]
    host.kill_hold()
    host.start()
    host.role("standby")
    host.call("reload")
    assert host.status()["hold_id"] == taken and host.status()["suspect"] is None
    with pytest.raises(RefusedError) as caught:
        host.call("release", workload="wl")
    assert caught.value.reason == "wrong_role"
    host.session()


def test_a_foreign_write_while_a_demoted_source_waits_is_noticed(host: StandbyHost) -> None:
    host.role("primary")
    host.call("release", workload="wl")
    host.call("hold", workload="wl")
    host.role("standby")
    host.count("data", 1)
    sender = host.session()
    assert sender.welcome is not None and sender.welcome.volumes[0].suspect


def test_a_release_that_cannot_be_noted_lets_nothing_go(tmp_path: Path) -> None:
    """On a full disk: what is held stays held and known, and the same call succeeds later."""
    host = StandbyHost(tmp_path)
    try:
        host.role("primary")
        host.start(BMIGRATE_FAULTS="hold.save=error:28@2")
        host.call("hold", workload="wl")
        with pytest.raises(BmigrateError):
            host.call("release", workload="wl")
        assert host.status()["held"] and list(host.record()["volumes"]) == ["data"]
        assert host.call("fence", workload="wl")["volumes"]["data"]["held"]
        host.call("release", workload="wl")
        assert not host.status()["held"]
    finally:
        host.close()


def test_a_stored_descriptor_that_no_role_needs_is_let_go(host: StandbyHost) -> None:
    host.kill_hold()
    host.role("primary")
    host.start()
    assert not host.status()["held"]
    host.manager.pump()
    with open(host.device("data"), "rb") as free:
        fcntl.flock(free.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_broken_configuration_lets_no_device_go(host: StandbyHost) -> None:
    host.kill_hold()
    path = host.directory / "etc" / "wl.yml"
    good = path.read_text()
    path.write_text("workload: [")
    host.start()
    with open(host.device("data"), "rb") as stream, pytest.raises(BlockingIOError):
        fcntl.flock(stream.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    path.write_text(good)
    host.call("reload")
    assert host.status()["held"] and host.status()["suspect"] is None


def test_another_device_in_the_configuration_is_taken_and_suspect(host: StandbyHost) -> None:
    sender = host.session()
    host.move("data", "elsewhere")
    host.call("reload")
    sender.ended()
    status = wait(lambda: (lambda now: now["held"] and now)(host.status()), "the other device to be held")
    assert status["device"] == host.device("elsewhere") and "another device" in status["suspect"]
    with open(host.device("data"), "rb") as free:
        fcntl.flock(free.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_damaged_state_stops_nothing_that_is_held(host: StandbyHost) -> None:
    path = host.directory / "state" / "wl" / "state.json"
    path.write_text("{")
    with pytest.raises(BmigrateError) as caught:
        host.call("release", workload="wl")
    assert caught.value.exit_code == 70 and "state.json" in str(caught.value)
    host.kill_hold()
    host.start()
    with open(host.device("data"), "rb") as stream, pytest.raises(BlockingIOError):
        fcntl.flock(stream.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    host.role("standby")
    host.call("reload")
    assert host.status()["held"] and host.status()["suspect"] is None


def test_refresh_passes_on_a_quiet_device(host: StandbyHost) -> None:
    host.call("refresh", workload="wl")


def test_silence_ends_the_receiver(tmp_path: Path) -> None:
    host = StandbyHost(tmp_path, silence_seconds=1.0)
    try:
        host.start()
        sender = host.session()
        began = time.monotonic()
        pings = 0
        while True:
            frame = sender.receive(skip_pings=False)
            assert frame is not None
            if frame.type is FrameType.ERROR:
                break
            assert frame.type is FrameType.PING
            pings += 1
        assert greeting.decode_error(frame.payload)["reason"] == "silence"
        assert sender.ended() == 4
        assert time.monotonic() - began < 5 and pings >= 2
        wait(lambda: not host.status()["session_open"], "hold to notice")
    finally:
        host.close()


def test_a_talking_sender_is_not_silent(tmp_path: Path) -> None:
    host = StandbyHost(tmp_path, silence_seconds=1.0)
    try:
        host.start()
        sender = host.session()
        for number in range(1, 9):
            sender.send(FrameType.PING, aux=number)
            frame = sender.receive()
            assert frame is not None and (frame.type, frame.aux) == (FrameType.PONG, number)
            time.sleep(0.3)
        acknowledged(sender, 1)
    finally:
        host.close()


def test_unknown_operations_and_workloads_are_refused_by_name(host: StandbyHost) -> None:
    for op, fields in (("nonsense", {}), ("fence", {"workload": "nobody"}), ("fence", {})):
        with pytest.raises(BmigrateError) as caught:
            host.call(op, **fields)
        assert caught.value.exit_code == 2
    assert GENERATION.number == 1


# -- sessions of several streams ---------------------------------------------------------------------


def join(first: Sender) -> greeting.Join:
    assert first.welcome is not None
    return greeting.Join(first.welcome.epoch, first.welcome.session_id)


def stopped(sender: Sender) -> None:
    sender.process.send_signal(signal.SIGSTOP)
    stat = Path(f"/proc/{sender.process.pid}/stat")
    wait(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T", "the stop")


def test_who_may_not_join_a_session(host: StandbyHost) -> None:
    """Another id, another epoch, an ended session; and nobody is killed for having been asked."""
    first = host.session(streams=3)
    further = host.session(join=join(first))
    right = join(first)
    for wrong in (greeting.Join(right.epoch, "9" * 32), greeting.Join(right.epoch + 1, right.session_id)):
        assert refused(host, join=wrong) == "session_over"
    assert sorted(host.status()["receivers"]) == sorted([first.process.pid, further.process.pid])
    acknowledged(first, 1)
    newer = host.session(last_session=first.last_session(1))
    assert refused(host, join=right) == "session_over"
    acknowledged(newer, 1)
    newer.send(FrameType.BYE)
    assert newer.ended() == 0
    wait(lambda: not host.status()["receivers"], "the end of the session")
    assert refused(host, join=join(newer)) == "session_over"


def test_a_session_has_a_bounded_number_of_streams(host: StandbyHost) -> None:
    first = host.session(streams=greeting.MAX_STREAMS)
    for _ in range(greeting.MAX_STREAMS - 1):
        host.session(join=join(first))
    assert refused(host, join=join(first)) == "too_many_streams"
    acknowledged(first, 1)


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_the_end_of_one_receiver_is_the_end_of_its_session(host: StandbyHost, victim: int) -> None:
    first = host.session(streams=3)
    all_three = [first, host.session(join=join(first)), host.session(join=join(first))]
    all_three[victim].process.kill()
    for sender in all_three:
        assert sender.ended() == -signal.SIGKILL
    wait(lambda: not host.status()["session_open"], "the note of the end")
    again = host.session(last_session=first.last_session(0))
    assert again.welcome is not None and again.welcome.volumes[0].suspect is None


@pytest.mark.parametrize("how", ["session", "fence", "hold"])
def test_an_old_further_stream_is_dead_before_anything_newer_begins(host: StandbyHost, how: str) -> None:
    """Its pipe holds bytes: they must not land after a newer session's, after a fence, or after a crash of hold."""
    first = host.session(streams=2)
    acknowledged(first, 1)
    further = host.session(join=join(first))
    stopped(further)
    for block in range(8):
        further.send(FrameType.DATA, offset=block * 4096, payload=b"old!" * 1024)
    if how == "fence":
        with host.client() as fencer:
            fencer.call("fence", workload="wl")
            assert further.process.poll() == -signal.SIGKILL
            assert refused(host, join=join(first)) == "sealed"
    else:
        if how == "hold":
            host.kill_hold()
            host.start()
        new = host.session(last_session=first.last_session(1))
        assert further.process.poll() == -signal.SIGKILL
        new.send(FrameType.DATA, offset=0, payload=b"new!" * 8192)
        acknowledged(new, 1)
        assert content(host, 0, 32768) == b"new!" * 8192
    assert b"old!" not in content(host, 0, 32768)


def test_a_receiver_that_joined_and_was_not_told_is_killed_by_the_next_hold(tmp_path: Path) -> None:
    """hold dies between the file entry and the answer."""
    host = StandbyHost(tmp_path)
    try:
        host.start(BMIGRATE_FAULTS="hold.joined=kill")
        first = host.session(streams=2)
        further = host.sender()
        frame = further.hello(host, join=join(first))
        assert frame.type is FrameType.ERROR and greeting.decode_error(frame.payload)["code"] == "unreachable"
        host.manager.pump()
        host.start()
        again = host.session(last_session=first.last_session(0))
        assert again.welcome is not None and again.welcome.epoch == 2
        assert first.ended() in (4, -signal.SIGKILL)
    finally:
        host.close()
