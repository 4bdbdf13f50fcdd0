# SPDX-License-Identifier: GPL-3.0-or-later
"""The loss that each forbidden shortcut brings, with all programs as processes and each race held open by hand.

A process is stopped, or a log kept back, exactly where a shortcut would do harm; then the test goes on, drains and
compares every byte. `python -m tests.mutants` runs each of these against the sabotage that it is named for, and the
quiet one against all of them. No outcome may depend on which of two threads is faster.
"""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import termios
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from bmigrate.wire.frames import HEADER_BYTES, FrameType
from tests.unit import standby_host
from tests.unit.standby_host import StandbyHost, wait
from tests.unit.test_ship_all_programs import SIZE, Both

BLOCK = 4096


@pytest.fixture
def both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Both]:
    """Source and standby, seeded and in step; a receiver that is stopped for minutes is not taken for dead."""
    monkeypatch.setattr(standby_host, "CONFIG", standby_host.CONFIG.replace("{silence}", "300"))
    made = Both(tmp_path)
    try:
        made.until("in_step")
        yield made
    finally:
        made.close()


def write(both: Both, block: int, count: int = 1) -> None:
    """New content in adjacent blocks, one request; recorded when it is complete, as by the kernel."""
    slot = both.source.slot("data")
    first = both.source.kernel.entries[slot]["start_sector"]
    fd = os.open(both.source.devices["data"], os.O_WRONLY)
    try:
        os.pwrite(fd, os.urandom(count * BLOCK), block * BLOCK)
    finally:
        os.close(fd)
    both.source.kernel.write(slot, first + block * BLOCK // 512, count * BLOCK // 512)


def recorded(both: Both) -> None:
    """Wait until every record so far is in breqd's maps."""
    kernel = both.source.kernel
    wait(lambda: not kernel.log and kernel.pending is None, "the log to be consumed", 60.0)


def sent(both: Both, block: int, count: int) -> None:
    """Write, and wait until frames and SYNC lie in the pipe of the stopped receiver: the shipper has done its part."""
    write(both, block, count)
    expected = count * BLOCK + 2 * HEADER_BYTES
    with open(f"/proc/{both.receiver()}/fd/0", "rb", buffering=0) as pipe:

        def waiting() -> int:
            answer = bytearray(4)
            fcntl.ioctl(pipe.fileno(), termios.FIONREAD, answer)
            return int.from_bytes(answer, sys.byteorder)

        wait(lambda: waiting() >= expected, "what was written to be sent", 60.0)


def stopped(pid: int) -> None:
    """Wait until a process is stopped."""
    wait(lambda: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T", "the stop", 60.0)


def stop(pid: int) -> None:
    """Stop a process."""
    os.kill(pid, signal.SIGSTOP)
    stopped(pid)


def kill_receiver(both: Both) -> None:
    """kill -9 of the receiver; what lies in its pipe is lost. Waits for the session after it."""
    old = both.receiver()
    os.kill(old, signal.SIGKILL)
    wait(lambda: both.receiver() != old, "another receiver", 60.0)
    both.until("in_step")


def receiver_with(both: Both, plan: str) -> None:
    """Replace the receiver by one with this plan of faults; those after it have none."""
    script = both.pids.parent / "bin" / "ssh"
    text = script.read_text()

    def put(content: str) -> None:
        temporary = script.with_name("ssh.new")
        temporary.write_text(content)
        temporary.chmod(0o755)
        temporary.rename(script)

    put(text.replace("exec env ", f"exec env BMIGRATE_FAULTS={plan} "))
    kill_receiver(both)
    put(text)


def nothing_is_lost(both: Both, run_id: str = "r1") -> None:
    """Drain; then every byte of the standby is the source's, and neither a full copy nor a comparison helped."""
    result = both.source.ship_call("drain", workload="wl", run_id=run_id)
    left, right = both.source.devices["data"].read_bytes(), both.replica.read_bytes()
    lost = [at for at in range(0, SIZE, BLOCK) if left[at : at + BLOCK] != right[at : at + BLOCK]]
    assert lost == [], f"the standby lost writes at {lost[:8]}, and the drain did not notice"
    assert len(result["digest"]) == 64
    tracked = both.source.volume("data")
    assert (tracked["seed_count"], tracked["resync_count"], tracked["suspect"]) == (1, 0, None)


def test_a_quiet_seed_and_drain(both: Both) -> None:
    """Nobody dies and nothing is slow: a seed, some writes, a drain, and once more on the same session's successor."""
    for number in range(2):
        for block in range(3 + number, 300, 17):
            write(both, block)
        recorded(both)
        wait(lambda: both.source.volume("data")["dirty_bytes"] == 0, "the writes to be shipped", 60.0)
        wait(lambda: both.source.volume("data")["claims_outstanding"] == 0, "their acknowledgements", 60.0)
        nothing_is_lost(both, f"r{number}")
        both.source.ship_call("unseal", workload="wl")
        both.until("in_step")


def test_what_was_only_sent_is_sent_again(both: Both) -> None:
    """Sent is not received: the frames lie in the pipe of a stopped receiver, which is then killed."""
    stop(both.receiver())
    sent(both, 10, 3)
    kill_receiver(both)
    nothing_is_lost(both)


def test_what_was_not_flushed_is_sent_again_after_a_power_cut(both: Both) -> None:
    """The standby loses power in a flush: what it wrote since the last one is gone, and the source still has it marked.

    The power cut is made by hand: the receiver is stopped in its flush, the volume gets the content of the last flush
    that was complete, and the receiver never goes on.
    """
    receiver_with(both, "receive.fdatasync=stop")
    flushed = both.replica.read_bytes()
    write(both, 20, 3)
    stopped(both.receiver())
    assert both.replica.read_bytes() != flushed, "nothing had been written when the power failed"
    with open(both.replica, "r+b") as stream:
        stream.write(flushed)
    kill_receiver(both)
    nothing_is_lost(both)


def test_a_drain_waits_for_what_is_still_in_the_kernels_log(both: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    """The log hands nothing out until somebody has asked for a barrier, and for a second more."""
    kernel = both.source.kernel
    ring, barrier = kernel.ring, kernel.do_barrier
    timers: list[threading.Timer] = []

    def release() -> None:
        with kernel.lock:
            monkeypatch.setattr(kernel, "ring", ring)
            ring()

    def asked(connection: object) -> int:
        if not timers:
            timers.append(threading.Timer(1.0, release))
            timers[0].start()
        return barrier(connection)

    recorded(both)
    with kernel.lock:
        monkeypatch.setattr(kernel, "ring", lambda: None)
        monkeypatch.setattr(kernel, "do_barrier", asked)
    write(both, 30, 3)
    assert kernel.log, "the records were handed out before the drain"
    nothing_is_lost(both)
    assert timers, "the drain asked for no barrier"


def test_a_block_that_is_written_while_it_is_claimed_is_shipped_again(both: Both) -> None:
    """Claimed, read and sent; then written again; then acknowledged: the second write must survive that."""
    receiver = both.receiver()
    stop(receiver)
    sent(both, 40, 2)
    again = both.source.volume("data")["redirtied_claimed_blocks"]
    write(both, 40, 2)
    recorded(both)
    assert both.source.volume("data")["redirtied_claimed_blocks"] == again + 2, "they were not claimed any more"
    os.kill(receiver, signal.SIGCONT)
    nothing_is_lost(both)


def test_old_bytes_never_land_on_newer_ones(tmp_path: Path) -> None:
    """A stopped receiver has frames in its pipe, the next session writes newer ones, then the old one may go on."""
    host = StandbyHost(tmp_path)
    try:
        host.start()
        old = host.session()
        old.send(FrameType.SYNC, aux=1)
        assert old.receive() is not None
        stop(old.process.pid)
        for block in range(8):
            old.send(FrameType.DATA, offset=block * BLOCK, payload=b"old!" * (BLOCK // 4))
        new = host.session(last_session=old.last_session(1))
        new.send(FrameType.DATA, offset=0, payload=b"new!" * (8 * BLOCK // 4))
        new.send(FrameType.SYNC, aux=1)
        frame = new.receive()
        assert frame is not None and (frame.type, frame.aux) == (FrameType.ACK, 1)
        old.process.send_signal(signal.SIGCONT)
        old.send(FrameType.BYE)
        old.ended()
        with open(host.device("data"), "rb") as stream:
            landed = stream.read(8 * BLOCK)
        assert b"old!" not in landed, "old bytes landed on newer ones that were acknowledged"
    finally:
        host.close()
