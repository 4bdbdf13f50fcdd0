# SPDX-License-Identifier: GPL-3.0-or-later
"""breceive against senders that are broken: nothing lands, the reason is told, the exit code is the documented one."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import select
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bmigrate.receive import ackfile, hasher
from bmigrate.wire import frames
from bmigrate.wire import hello as greeting
from bmigrate.wire.frames import FrameType
from tests.unit.standby_host import EDGE, GENERATION, MIB, Sender, StandbyHost, wait

SIZE = 8 * MIB


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StandbyHost]:
    standby = StandbyHost(tmp_path_factory.mktemp("standby"))
    standby.start()
    yield standby
    standby.close()


@pytest.fixture(autouse=True)
def untouched_by_bad_input(host: StandbyHost) -> Iterator[None]:
    yield
    for sender in host.senders:
        sender.close()
    host.senders.clear()


def content(host: StandbyHost) -> bytes:
    return Path(host.device("data")).read_bytes()


def ack(sender: Sender, number: int) -> None:
    sender.send(FrameType.SYNC, aux=number)
    frame = sender.receive()
    assert frame is not None and (frame.type, frame.aux) == (FrameType.ACK, number)


def ends_with(sender: Sender, reason: str, code: int = 3) -> None:
    error = sender.error()
    assert error["reason"] == reason, error
    assert error["host"] and error["message"]
    assert sender.ended() == code


def extents(*parts: tuple[int, bytes]) -> dict[str, Any]:
    """Fields of an EXTENTS frame."""
    table = frames.encode_extents([(offset, len(data)) for offset, data in parts])
    return {"aux": len(parts), "payload": b"".join(data for _, data in parts) + table}


def test_extents_land_where_they_belong_and_nowhere_else(host: StandbyHost) -> None:
    sender = host.session()
    want = bytearray(content(host))
    parts = [(4 * MIB + at * 8192, os.urandom(512 * (1 + at % 8))) for at in range(100)]
    for offset, data in parts:
        want[offset : offset + len(data)] = data
    sender.send(FrameType.EXTENTS, **extents(*parts))
    ack(sender, 1)
    assert content(host) == bytes(want)


def test_writes_go_on_while_a_flush_is_under_way(host: StandbyHost) -> None:
    host.environment["BMIGRATE_FAULTS"] = "receive.fdatasync=delay:600@1"
    try:
        sender = host.session()
    finally:
        del host.environment["BMIGRATE_FAULTS"]
    before, after = os.urandom(4096), os.urandom(4096)
    sender.send(FrameType.DATA, offset=5 * MIB, payload=before)
    sender.send(FrameType.SYNC, aux=1)
    sender.send(FrameType.DATA, offset=5 * MIB + 4096, payload=after)
    wait(lambda: content(host)[5 * MIB : 5 * MIB + 8192] == before + after, "the write after the SYNC to land")
    sender.send(FrameType.PING)
    frame = sender.receive()
    assert frame is not None and frame.type is FrameType.PONG, "nothing is acknowledged before its flush is done"


def test_data_zeroes_hashes_and_rereads(host: StandbyHost) -> None:
    sender = host.session()
    data = os.urandom(3 * MIB)
    sender.send(FrameType.DATA, offset=MIB, payload=data)
    sender.send(FrameType.ZERO, offset=2 * MIB, aux=4096)
    ack(sender, 1)
    want = bytearray(data)
    want[MIB : MIB + 4096] = bytes(4096)
    assert content(host)[MIB : 4 * MIB] == bytes(want)
    sender.send(FrameType.HASH, offset=MIB, aux=3 * MIB - 512, payload=frames.encode_chunk(65536))
    frame = sender.receive()
    assert frame is not None and (frame.type, frame.offset, frame.aux) == (FrameType.HASHES, MIB, 3 * MIB - 512)
    pieces = [want[at : min(at + 65536, 3 * MIB - 512)] for at in range(0, 3 * MIB - 512, 65536)]
    assert bytes(frame.payload) == b"".join(hashlib.blake2b(piece, digest_size=16).digest() for piece in pieces)
    sender.send(FrameType.REREAD, payload=frames.encode_extents([(MIB, 3 * MIB), (0, 512)]))
    frame = sender.receive()
    assert frame is not None and (frame.type, frame.aux) == (FrameType.DIGESTS, 2)
    assert bytes(frame.payload) == (
        hashlib.blake2b(want, digest_size=32).digest() + hashlib.blake2b(bytes(512), digest_size=32).digest()
    )
    sender.send(FrameType.BYE)
    last = sender.receive()
    assert last is not None and last.type is FrameType.BYE
    assert sender.ended() == 0


def test_the_end_of_the_stream_between_frames_is_no_error(host: StandbyHost) -> None:
    sender = host.session()
    assert sender.process.stdin is not None
    sender.process.stdin.close()
    assert sender.ended() == 0


def test_out_of_bounds_and_misaligned_frames_end_the_session(host: StandbyHost) -> None:
    before = content(host)
    for type_, fields, reason in (
        (FrameType.DATA, {"offset": SIZE, "payload": b"x" * 512}, "out_of_bounds"),
        (FrameType.DATA, {"offset": SIZE - 512, "payload": b"x" * 1024}, "out_of_bounds"),
        (FrameType.DATA, {"offset": 1 << 62, "payload": b"x" * 512}, "out_of_bounds"),
        (FrameType.DATA, {"offset": 100, "payload": b"x" * 512}, "misaligned"),
        (FrameType.DATA, {"offset": 0, "payload": b"x" * 100}, "misaligned"),
        (FrameType.EXTENTS, extents((0, b"x" * 512), (SIZE, b"x" * 512)), "out_of_bounds"),
        (FrameType.EXTENTS, extents((0, b"x" * 512), (1024, b"x" * 100)), "misaligned"),
        (FrameType.ZERO, {"offset": 0, "aux": SIZE + 512}, "out_of_bounds"),
        (FrameType.ZERO, {"offset": 0, "aux": 1}, "misaligned"),
        (FrameType.HASH, {"offset": SIZE - 512, "aux": 1024, "payload": frames.encode_chunk(4096)}, "out_of_bounds"),
        (FrameType.REREAD, {"payload": frames.encode_extents([(0, 512), (SIZE, 512)])}, "out_of_bounds"),
        (FrameType.DATA, {"volume": 1, "offset": 0, "payload": b"x" * 512}, "unknown_volume"),
        (FrameType.RESYNC_DONE, {"volume": 65535}, "unknown_volume"),
    ):
        sender = host.session()
        sender.send(type_, **fields)
        ends_with(sender, reason)
    assert content(host) == before


def test_the_bounds_are_the_sources_size_not_the_devices(host: StandbyHost) -> None:
    sender = host.session(volumes=[greeting.HelloVolume("data", MIB, 512, 4096)])
    sender.send(FrameType.DATA, offset=MIB, payload=b"x" * 512)
    ends_with(sender, "out_of_bounds")


def test_frames_out_of_place(host: StandbyHost) -> None:
    sender = host.sender()
    sender.send(FrameType.DATA, offset=0, payload=b"x" * 512)
    ends_with(sender, "bad_type")
    sender = host.session()
    sender.send(FrameType.HELLO, payload=b"{}")
    ends_with(sender, "bad_type")
    sender = host.session()
    ack(sender, 2)
    sender.send(FrameType.SYNC, aux=2)
    ends_with(sender, "bad_sequence")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"epoch": 0}, "bad_epoch"),
        ({"seq": 9}, "bad_sequence"),
        ({"seq": 1}, "bad_sequence"),
        ({"length": frames.MAX_PAYLOAD_BYTES + 512}, "too_long"),
        ({"payload_crc32": 1}, "bad_payload"),
    ],
)
def test_an_old_epoch_a_wrong_number_a_long_or_a_damaged_frame(
    host: StandbyHost, changes: dict[str, int], reason: str
) -> None:
    before = content(host)
    sender = host.session()
    data = b"evil" * 128
    fields = {"epoch": sender.writer.epoch, "seq": 2, "length": 512, "payload_crc32": zlib.crc32(data), **changes}
    sender.raw(frames.encode_header(FrameType.DATA, volume=0, offset=0, aux=0, **fields) + data)
    ends_with(sender, reason)
    assert content(host) == before


def test_a_wrong_version_is_told_apart(host: StandbyHost) -> None:
    sender = host.sender()
    hello = greeting.Hello(
        "wl", "alpha", GENERATION, "b" * 32, "c" * 32, [greeting.HelloVolume("data", SIZE, 512, 4096)],
        v=frames.VERSION + 2, v_min=frames.VERSION + 1,
    )  # fmt: skip
    sender.send(FrameType.HELLO, payload=greeting.encode(hello))
    ends_with(sender, "wrong_version")


@pytest.mark.parametrize(
    ("version", "wanted", "faster", "agreed"),
    [
        (3, "sha256", "sha256", "sha256"),
        (3, "sha256", "blake2b", "blake2b"),
        (3, "blake2b", "sha256", "blake2b"),
        (9, "of-a-later-release", "sha256", None),
        (9, "blake3", "sha256", "blake2b"),
        (2, "blake2b", "sha256", "blake2b"),
        (2, "sha256", "sha256", "blake2b"),
        (1, "blake2b", "sha256", "blake2b"),
    ],
)
def test_the_hash_is_sha256_only_where_both_ends_are_faster_with_it(
    host: StandbyHost, version: int, wanted: str, faster: str, agreed: str | None
) -> None:
    """And what is answered is of the one that was agreed on."""
    host.environment["BMIGRATE_TEST_HASH"] = faster
    try:
        sender = host.sender()
        answer = sender.hello(host, v=version, hash=wanted)
    finally:
        del host.environment["BMIGRATE_TEST_HASH"]
    if agreed is None:
        assert answer.type is FrameType.ERROR
        return
    assert sender.welcome is not None and sender.welcome.hash == agreed
    assert ("hash" in json.loads(bytes(answer.payload))) == (version >= 3), "an older sender knows no such field"
    data = content(host)[: 5 * MIB - 512]
    sender.send(FrameType.HASH, offset=0, aux=len(data), payload=frames.encode_chunk(65536))
    frame = sender.receive()
    assert frame is not None and frame.type is FrameType.HASHES
    want = [hashlib.sha256(data[at : at + 65536]).digest()[:16] for at in range(0, len(data), 65536)]
    if agreed == "blake2b":
        want = [hashlib.blake2b(data[at : at + 65536], digest_size=16).digest() for at in range(0, len(data), 65536)]
    assert bytes(frame.payload) == b"".join(want)


@pytest.mark.parametrize("highest", [1, frames.VERSION, frames.VERSION + 5])
def test_a_session_is_of_the_newest_version_that_both_speak(host: StandbyHost, highest: int) -> None:
    sender = host.session(v=highest)
    assert sender.welcome is not None and sender.welcome.v == min(highest, frames.VERSION)
    sender.send(FrameType.EXTENTS, **extents((4 * MIB, b"x" * 512)))
    if highest == 1:
        ends_with(sender, "bad_type")
    else:
        ack(sender, 1)


def test_truncated_in_a_frame(host: StandbyHost) -> None:
    before = content(host)
    sender = host.session()
    header, _ = sender.writer.encode(FrameType.DATA, payload=b"x" * 8192)
    sender.raw(header + b"x" * 8000)
    assert sender.process.stdin is not None
    sender.process.stdin.close()
    ends_with(sender, "truncated")
    assert content(host) == before


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(noise=st.binary(min_size=1, max_size=3000), in_session=st.booleans())
def test_noise_never_lands_and_is_answered(host: StandbyHost, noise: bytes, in_session: bool) -> None:
    before = content(host)
    sender = host.session() if in_session else host.sender()
    sender.raw(noise)
    assert sender.process.stdin is not None
    sender.process.stdin.close()
    error = sender.error()
    assert error["code"] == "refused" and error["reason"] in ("bad_magic", "truncated", "bad_header"), error
    assert sender.ended() == 3
    assert content(host) == before


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_flipped_bits_never_land(host: StandbyHost, data: st.DataObject) -> None:
    sender = host.session()
    sender.send(FrameType.ZERO, offset=0, aux=65536)
    ack(sender, 1)
    stream = bytearray()
    for block in range(4):
        header, payload = sender.writer.encode(FrameType.DATA, offset=block * 4096, payload=b"good" * 1024)
        stream += header + bytes(payload)
    for _ in range(data.draw(st.integers(1, 3))):
        stream[data.draw(st.integers(0, len(stream) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    sender.raw(stream)
    assert sender.process.stdin is not None
    sender.process.stdin.close()
    code = sender.ended()
    landed = content(host)[:65536]
    for block in range(16):
        assert landed[block * 4096 : (block + 1) * 4096] in (b"good" * 1024, bytes(4096))
    # Two flips may undo each other; whoever was accepted as a whole must have landed as a whole.
    assert code == 3 or landed[:16384] == b"good" * 4096


def test_arguments_are_not_negotiable(host: StandbyHost) -> None:
    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            [sys.executable, str(EDGE), "breceive", *arguments],
            stdin=subprocess.DEVNULL,
            env={**host.environment, **environment},
            capture_output=True,
            timeout=60,
            check=False,
        )

    for arguments in (
        (),
        ("--workload",),
        ("--work", "wl"),
        ("--workload", "../wl"),
        ("--workload", "wl\n"),
        ("--workload", "wl", "/dev/sda"),
        ("--workload", "wl", "--workload", "other"),
        ("--workload", "wl", "--device", "/dev/sda"),
        ("sh", "-c", "id"),
    ):
        done = run(*arguments)
        assert done.returncode == 2, (arguments, done)
        assert not done.stdout
    asked = run("--workload", "wl", SSH_ORIGINAL_COMMAND="breceive --workload other; id")
    assert asked.returncode == 4 and b"uid=" not in asked.stdout + asked.stderr
    assert b"the sender closed the connection before HELLO" in asked.stdout


def test_a_failed_flush_is_never_acknowledged_and_never_tried_again(host: StandbyHost) -> None:
    host.environment["BMIGRATE_FAULTS"] = "receive.fdatasync=error:5@2"
    try:
        sender = host.session()
    finally:
        del host.environment["BMIGRATE_FAULTS"]
    sender.send(FrameType.DATA, offset=0, payload=b"one!" * 1024)
    ack(sender, 1)
    sender.send(FrameType.DATA, offset=0, payload=b"two!" * 1024)
    sender.send(FrameType.SYNC, aux=2)
    sender.send(FrameType.SYNC, aux=3)  # the second flush would succeed; it must not be asked for
    ends_with(sender, "io_error")
    assert sender.receive() is None


def test_a_read_error_ends_a_comparison_and_nothing_is_said_of_the_range(host: StandbyHost) -> None:
    """The part that was read is not told: half an answer would be taken for a whole one, and hide the reason."""
    sender = host.session()
    os.truncate(host.device("data"), 3 * MIB + 4096)
    try:
        sender.send(FrameType.HASH, offset=0, aux=3 * MIB + 8192, payload=frames.encode_chunk(4096))
        frame = sender.receive()
        assert frame is not None and frame.type is FrameType.ERROR, frame
        assert json.loads(bytes(frame.payload))["reason"] == "io_error"
        assert sender.ended() == 3
    finally:
        os.truncate(host.device("data"), SIZE)


def test_the_note_is_on_disk_before_the_acknowledgement_leaves(tmp_path: Path) -> None:
    own = StandbyHost(tmp_path)
    try:
        own.start()
        own.environment["BMIGRATE_FAULTS"] = "receive.noted=kill@2"
        sender = own.session()
        ack(sender, 1)
        sender.send(FrameType.SYNC, aux=2)
        assert sender.receive() is None and sender.ended() == -9
        noted = ackfile.latest((tmp_path / "state" / "wl" / "receive.ack").read_bytes())
        assert noted is not None and noted.ack == 2 and noted.generation_id == GENERATION.id
        # The source never heard of 2: it is behind, which is no reason to suspect.
        again = own.session(last_session=sender.last_session(1))
        assert again.welcome is not None and again.welcome.volumes[0].suspect is None
    finally:
        own.close()


def test_memory_stays_bounded(host: StandbyHost) -> None:
    sender = host.session()
    payload = os.urandom(frames.MAX_PAYLOAD_BYTES)

    def resident() -> int:
        return int(Path(f"/proc/{sender.process.pid}/statm").read_text().split()[1]) * 4096

    sender.send(FrameType.DATA, offset=0, payload=payload)
    ack(sender, 1)
    before = resident()
    for number in range(2, 10):
        sender.send(FrameType.DATA, offset=(number % 2) * frames.MAX_PAYLOAD_BYTES, payload=payload)
        sender.send(FrameType.HASH, offset=0, aux=SIZE, payload=frames.encode_chunk(4096))
        sender.send(FrameType.SYNC, aux=number)
        # Hashed and flushed beside each other: which answer comes first is open.
        answers = [sender.receive() for _ in range(2)]
        assert {frame.type for frame in answers if frame is not None} == {FrameType.HASHES, FrameType.ACK}
    assert resident() - before < hasher.BUFFERS * hasher.BUFFER_BYTES + 8 * MIB


def test_a_sender_that_takes_no_answer_costs_no_memory(host: StandbyHost) -> None:
    """Requests without end, each answered by 4 KiB of digests that nobody reads: the receiver stops taking them."""
    sender = host.session()
    assert sender.process.stdin is not None
    fd = sender.process.stdin.fileno()
    os.set_blocking(fd, False)

    def resident() -> int:
        return int(Path(f"/proc/{sender.process.pid}/statm").read_text().split()[1]) * mmap.PAGESIZE

    ask: dict[str, Any] = {"offset": 0, "aux": MIB, "payload": frames.encode_chunk(4096)}
    before, refused, sent = resident(), 0, 0
    rest = b""
    while refused < 100 and sent < 40_000:
        rest = rest or b"".join(map(bytes, sender.writer.encode(FrameType.HASH, **ask)))
        try:
            rest = rest[os.write(fd, rest) :]
            sent, refused = sent + 1, 0
        except BlockingIOError:
            # Full: a hundred times in a row, 20 ms apart, is no pause between two requests any more.
            refused += 1
            select.select([], [], [], 0.02)
    assert refused == 100, f"{sent} requests were taken, and none of their answers was"
    assert resident() - before < 48 * MIB


def test_fault_points_corrupt_what_lands_and_a_reread_shows_it(host: StandbyHost) -> None:
    host.environment["BMIGRATE_FAULTS"] = "receive.write=corrupt@1"
    try:
        sender = host.session()
    finally:
        del host.environment["BMIGRATE_FAULTS"]
    data = os.urandom(4096)
    sender.send(FrameType.DATA, offset=0, payload=data)
    ack(sender, 1)
    sender.send(FrameType.REREAD, payload=struct.pack("<QQ", 0, 4096))
    frame = sender.receive()
    assert frame is not None and bytes(frame.payload) != hashlib.blake2b(data, digest_size=32).digest()
    wait(lambda: content(host)[:4096] != data, "the damage on the device")


def joined(host: StandbyHost, first: Sender, **changes: Any) -> Sender:
    """A further stream of an open session."""
    assert first.welcome is not None
    return host.session(join=greeting.Join(first.welcome.epoch, first.welcome.session_id), **changes)


def marked(sender: Sender, number: int) -> None:
    sender.send(FrameType.MARK, aux=number)
    frame = sender.receive()
    assert frame is not None and (frame.type, frame.aux) == (FrameType.MARKED, number)


def test_a_further_stream_writes_and_the_first_flushes_for_it(host: StandbyHost) -> None:
    """The flush is the first one's, and it is made although nothing came to the first itself: here it fails."""
    host.environment["BMIGRATE_FAULTS"] = "receive.fdatasync=error:5@2"
    try:
        first = host.session(streams=2)
    finally:
        del host.environment["BMIGRATE_FAULTS"]
    assert first.welcome is not None and first.welcome.streams == 2
    first.send(FrameType.SYNC, aux=1)  # the flush with which every session begins
    frame = first.receive()
    assert frame is not None and frame.type is FrameType.ACK
    further = joined(host, first)
    assert further.welcome is not None and further.welcome.epoch == first.welcome.epoch
    data = os.urandom(64 * 1024)
    further.send(FrameType.DATA, offset=2 * MIB, payload=data)
    marked(further, 1)
    assert content(host)[2 * MIB :][: len(data)] == data, "MARKED before it was written"
    first.send(FrameType.SYNC, aux=2)
    frame = first.receive()
    assert frame is not None and frame.type is FrameType.ACK, "volume 0 was not named: nothing to flush"
    first.send(FrameType.SYNC, aux=3, offset=1)
    ends_with(first, "io_error")
    assert further.ended() == -9, "one stream has ended, so all of them do"


@pytest.mark.parametrize(
    ("type_", "fields"),
    [
        (FrameType.SYNC, {"aux": 1}),
        (FrameType.HASH, {"aux": 4096, "payload": frames.encode_chunk(4096)}),
        (FrameType.REREAD, {"payload": frames.encode_extents([(0, 512)])}),
        (FrameType.RESYNC_DONE, {}),
    ],
)
def test_a_further_stream_takes_nothing_but_writes(host: StandbyHost, type_: FrameType, fields: dict[str, Any]) -> None:
    """What flushes, acknowledges or answers belongs to the first stream, in its order."""
    further = joined(host, host.session(streams=2))
    further.send(type_, **fields)
    ends_with(further, "bad_type")


def test_marks_ascend_and_are_for_further_streams(host: StandbyHost) -> None:
    first = host.session(streams=2)
    further = joined(host, first)
    marked(further, 3)
    marked(further, 7)
    further.send(FrameType.MARK, aux=7)
    ends_with(further, "bad_sequence")
    alone = host.session(last_session=first.last_session(0))
    alone.send(FrameType.MARK, aux=1)
    ends_with(alone, "bad_type")


def test_a_sync_for_volumes_that_are_not_there(host: StandbyHost) -> None:
    sender = host.session()
    sender.send(FrameType.SYNC, aux=1, offset=2)
    ends_with(sender, "unknown_volume")
