# SPDX-License-Identifier: GPL-3.0-or-later
"""A comparison against a standby that is modelled: every block comes out once, and what differs is named exactly."""

from __future__ import annotations

import os
import random
from collections import deque
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bmigrate.common import ranges
from bmigrate.common.errors import BmigrateError, RefusedError
from bmigrate.ship import compare, handshake
from bmigrate.ship.compare import BATCH_BYTES, Comparison, Piece
from bmigrate.ship.pacer import Pacer
from bmigrate.ship.source import READ_BYTES
from bmigrate.wire import frames, hashing, hello
from bmigrate.wire.frames import FrameType
from tests.unit.ship_world import GRANULE, World
from tests.unit.standby_host import MIB, wait

SIZE = 11 * READ_BYTES + 3584


class Volume:
    """A source volume in memory, which notes its reads."""

    number = 0
    index = 3

    def __init__(self, data: bytes, granule_bytes: int) -> None:
        self.data, self.granule_bytes = data, granule_bytes
        self.reads: list[tuple[int, int]] = []
        self.broken_at: int | None = None

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill the view."""
        if self.broken_at is not None and offset <= self.broken_at < offset + len(view):
            raise RefusedError("the disk is broken", reason="read_failed")
        self.reads.append((offset, len(view)))
        view[:] = self.data[offset : offset + len(view)]


class Standby:
    """Answers HASH from its own data, in order, as a session hands it out."""

    def __init__(self, data: bytes, hash_name: str) -> None:
        self.data, self.hash = data, hash_name
        self.asked: list[tuple[int, int, int]] = []
        self.failure: BmigrateError | None = None
        self._answers: deque[bytes] = deque()

    def request(self, type_: FrameType, answer: FrameType, digests: int, **fields: Any) -> None:
        """One HASH."""
        assert (type_, answer, fields["volume"]) == (FrameType.HASH, FrameType.HASHES, Volume.index)
        offset, length = fields["offset"], fields["aux"]
        chunk = int.from_bytes(fields["payload"], "little")
        self.asked.append((offset, length, chunk))
        self._answers.append(hashing.digests(self.hash, self.data[offset : offset + length], chunk))
        assert len(self._answers[-1]) == digests * frames.HASH_DIGEST_BYTES

    def answer(self) -> bytes:
        """The oldest one."""
        return self._answers.popleft()

    def fail(self, error: BmigrateError) -> None:
        """The end of the session."""
        self.failure = error


def run(volume: Volume, standby: Standby, extents: list[tuple[int, int]]) -> tuple[list[Piece], list[tuple[int, int]]]:
    """Compare the extents; the pieces that came out, and what differs of the volume."""
    pieces: list[Piece] = []
    found: list[tuple[int, int]] = []

    def compared(piece: Piece, runs: list[tuple[int, int]]) -> None:
        assert bytes(piece.data) == volume.data[piece.offset : piece.offset + len(piece.data)]
        assert all(0 <= start and start + count <= len(piece.data) for start, count in runs)
        pieces.append(piece)
        found.extend((piece.offset + start, count) for start, count in runs)

    session: Any = standby
    source: Any = volume
    comparison = Comparison(session, Pacer(0), compared)
    try:
        for extent in extents:
            for offset, length in ranges.pieces(*extent, BATCH_BYTES):
                comparison.put(source, offset, length, "tag")
        comparison.finish()
    finally:
        comparison.close()
    return pieces, ranges.merge(found)


@given(
    st.sampled_from([4096, 65536, 1 << 20]),
    st.sampled_from(hashing.NAMES),
    st.sets(st.integers(0, SIZE - 1), max_size=12),
    st.booleans(),
    st.integers(0, 9),
)
@settings(max_examples=40, deadline=None)
def test_what_differs_is_named_to_the_granule(
    granule: int, hash_name: str, places: set[int], all_over: bool, skipped: int
) -> None:
    """Wherever it is, however much there is, and with a gap between the extents."""
    own = random.Random(7).randbytes(SIZE)
    other = bytearray(own)
    if all_over:
        places = places | set(range(5, SIZE, 3 * READ_BYTES // 2))
    for place in places:
        other[place] ^= 1
    gap = (skipped * READ_BYTES, skipped * READ_BYTES + granule)
    extents = [extent for extent in ((0, gap[0]), (gap[1], SIZE - gap[1])) if extent[1]]
    volume, standby = Volume(own, granule), Standby(bytes(other), hash_name)
    pieces, found = run(volume, standby, extents)
    wanted = ranges.merge(
        (place // granule * granule, min(granule, SIZE - place // granule * granule))
        for place in sorted(places)
        if not gap[0] <= place < gap[1]
    )
    assert found == wanted
    assert ranges.merge(sorted((piece.offset, len(piece.data)) for piece in pieces)) == extents
    assert sum(len(piece.data) for piece in pieces) == ranges.total(extents), "nothing comes out twice"
    assert all(len(piece.data) <= READ_BYTES and piece.tag == "tag" for piece in pieces)
    assert sum(length for _, length in volume.reads) == ranges.total(extents), "each block is read once"


def test_what_is_equal_costs_one_question_for_each_batch() -> None:
    own = random.Random(7).randbytes(SIZE)
    standby = Standby(own, "blake2b")
    assert run(Volume(own, 4096), standby, [(0, SIZE)])[1] == []
    assert standby.asked == [(offset, length, READ_BYTES) for offset, length in ranges.pieces(0, SIZE, BATCH_BYTES)]


def test_where_much_differs_granules_are_asked_for_at_once() -> None:
    """After a few batches no range is asked for twice."""
    own = random.Random(7).randbytes(8 * BATCH_BYTES)
    standby = Standby(bytes(8 * BATCH_BYTES), "blake2b")
    assert run(Volume(own, 65536), standby, [(0, len(own))])[1] == [(0, len(own))]
    assert [chunk for offset, _, chunk in standby.asked if offset >= 7 * BATCH_BYTES] == [65536]


def test_a_read_that_fails_ends_the_session() -> None:
    """Else the answer that was asked for would be taken for that to another question."""
    own = random.Random(7).randbytes(SIZE)
    volume, standby = Volume(own, 4096), Standby(own, "blake2b")
    volume.broken_at = 5 * READ_BYTES
    with pytest.raises(RefusedError, match="broken"):
        run(volume, standby, [(0, SIZE)])
    assert standby.failure is not None and standby.failure.reason == "read_failed"


def test_reads_are_short_while_the_foreground_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as the pacer says, with a rest after each."""
    rested: list[int] = []
    monkeypatch.setattr(Pacer, "polite", property(lambda self: True))
    monkeypatch.setattr(Pacer, "read_bytes", lambda self, number: 65536)
    monkeypatch.setattr(Pacer, "rest", lambda self, number, count, seconds: rested.append(count))
    own = random.Random(7).randbytes(SIZE)
    volume = Volume(own, 4096)
    run(volume, Standby(own, "blake2b"), [(0, SIZE)])
    assert max(length for _, length in volume.reads) == 65536
    assert rested == [length for _, length in volume.reads]


class Link:
    """Answers HELLO with what it is given."""

    host = "beta"

    def __init__(self, welcome: hello.Welcome) -> None:
        self._welcome = welcome
        self.epoch = 0

    def send(self, type_: FrameType, payload: bytes) -> None:
        """Take HELLO."""
        assert type_ is FrameType.HELLO and hello.decode_hello(payload)

    def receive(self, seconds: float) -> frames.Frame:
        """WELCOME."""
        return frames.Frame(FrameType.WELCOME, 0, 5, 1, 0, 0, memoryview(hello.encode(self._welcome)))

    def set_epoch(self, epoch: int) -> None:
        """The session is open."""
        self.epoch = epoch


@pytest.mark.parametrize(
    ("offered", "answered", "taken"),
    [
        ("sha256", "sha256", True),
        ("sha256", "blake2b", True),
        ("blake2b", "blake2b", True),
        ("blake2b", "sha256", False),
        ("sha256", "crc32", False),
    ],
)
def test_a_hash_that_was_not_offered_is_refused(offered: str, answered: str, taken: bool) -> None:
    greet = hello.Hello(
        "wl", "alpha", hello.Generation(3, "a" * 32), "b" * 32, "c" * 32, [hello.HelloVolume("data", SIZE, 512, 4096)],
        hash=offered,
    )  # fmt: skip
    volumes = [hello.WelcomeVolume("data", 0, SIZE, 512)]
    link: Any = Link(hello.Welcome(5, "e" * 32, "beta", "f" * 32, 20.0, volumes, hash=answered))
    if taken:
        assert handshake.shake_hands(link, greet, []).hash == answered
        return
    with pytest.raises(RefusedError, match="not offered"):
        handshake.shake_hands(link, greet, [])
    assert link.epoch == 0


@pytest.mark.parametrize("name", hashing.NAMES)
def test_a_verify_and_a_resync_by_either_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """With the real receiver: damage on the standby is found, and repaired by the resync."""
    monkeypatch.setattr(hashing, "preferred", lambda: name)
    world = World(tmp_path, monkeypatch)
    try:
        world.beta.environment["BMIGRATE_TEST_HASH"] = name
        world._write_ssh()
        engine = world.engine()
        world.until(engine, "in_step")
        assert engine.session is not None and engine.session.hash == name
        place = 5 * MIB + GRANULE
        fd = os.open(world.replica(), os.O_WRONLY)
        try:
            os.pwrite(fd, bytes(range(256)) * 16, place)
        finally:
            os.close(fd)
        found = world.job(engine, "verify")
        assert [item["offset_bytes"] for item in found["different_blocks"]] == [place]
        record = world.breqd.items["wl", "data"].record
        world.breqd._op_suspect({"workload": "wl", "volume": "data", "reason": "a test"})
        wait(lambda: record.suspect is None, "the resync")
        world.until(engine, "in_step")
        world.check_equal()
    finally:
        world.close()


def test_the_constants_fit_each_other() -> None:
    assert BATCH_BYTES % READ_BYTES == 0 and BATCH_BYTES <= frames.MAX_HASH_BYTES
    assert READ_BYTES <= frames.MAX_HASH_CHUNK_BYTES
    assert BATCH_BYTES // frames.MIN_HASH_CHUNK_BYTES * frames.HASH_DIGEST_BYTES <= frames.MAX_PAYLOAD_BYTES
    assert compare.UNDER_WAY >= 2
