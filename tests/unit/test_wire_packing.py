# SPDX-License-Identifier: GPL-3.0-or-later
"""Compressed extents: what goes in comes out, nothing else gets through, and it is used only where it pays."""

from __future__ import annotations

import dataclasses
import mmap
import random
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from bmigrate.wire import frames, packing
from bmigrate.wire.frames import Frame, FrameError, FrameReader, FrameType, FrameWriter
from bmigrate.wire.packing import Choice, Packer, Unpacker, UnpackError
from tests.unit.ship_world import GRANULE, World
from tests.unit.standby_host import MIB

SIZE = frames.MAX_PAYLOAD_BYTES
UNPACKER = Unpacker(memoryview(mmap.mmap(-1, SIZE)))


@given(st.lists(st.tuples(st.integers(0, 50), st.binary(min_size=1, max_size=2000)), min_size=1, max_size=20))
@settings(deadline=None)
def test_extents_travel_packed(parts: list[tuple[int, bytes]]) -> None:
    """Through framing and back: the same offsets and the same bytes."""
    placed, end = [], 0
    for gap, data in parts:
        placed.append((end + gap, memoryview(data)))
        end += gap + len(data)
    table = frames.encode_extents([(offset, len(data)) for offset, data in placed])
    packed = Packer().pack([*(data for _, data in placed), table])
    header, body = FrameWriter(3).encode_packed(1, len(placed), packed)
    reader = FrameReader(frames.FROM_SENDER, epoch=3)
    (frame,) = [
        frames.unpacked(item, UNPACKER.unpack(item.payload)) for item in reader.feed(bytes(header) + bytes(body))
    ]
    assert frame.type is FrameType.EXTENTS and frame.volume == 1
    assert [(offset, bytes(data)) for offset, data in frame.parts()] == [(at, bytes(data)) for at, data in placed]


def _frame(packed: bytes, count: int = 1) -> Frame:
    return Frame(FrameType.PACKED, 0, 1, 1, 0, count, memoryview(packed))


def _take(packed: bytes, count: int = 1) -> Frame:
    return frames.unpacked(_frame(packed, count), UNPACKER.unpack(memoryview(packed)))


def test_what_is_longer_than_the_buffer_is_refused() -> None:
    """A few kilobytes that would be gigabytes: no more than the buffer is ever touched."""
    bomb = zstandard.ZstdCompressor(level=1).compress(bytes(256 * MIB))
    assert len(bomb) < 64 * 1024
    with pytest.raises(UnpackError, match="more than"):
        UNPACKER.unpack(memoryview(bomb))
    fits = zstandard.ZstdCompressor(level=1).compress(bytes(SIZE))
    assert len(UNPACKER.unpack(memoryview(fits))) == SIZE


def test_a_window_that_costs_memory_is_refused() -> None:
    """The size of the window comes from the wire."""
    parameters = zstandard.ZstdCompressionParameters(window_log=27, enable_ldm=True)
    engine = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    packed = engine.compress(random.Random(1).randbytes(1000)) + engine.flush()
    with pytest.raises(UnpackError, match="not zstd"):
        UNPACKER.unpack(memoryview(packed))


@pytest.mark.parametrize("packed", [b"", b"\0", b"noise that is no zstd frame", Packer().pack([b"x" * 5000])[:-4]])
def test_noise_is_refused(packed: bytes) -> None:
    with pytest.raises(FrameError):
        _take(packed)


@pytest.mark.parametrize(
    ("content", "count"),
    [
        (b"x" * 40, 1),
        (b"x" * 512 + frames.encode_extents([(0, 513)]), 1),
        (b"x" * 512 + frames.encode_extents([(0, 512)]), 2),
        (b"x" * 512 + frames.encode_extents([(0, 0)]), 1),
    ],
)
def test_content_that_is_no_extents_is_refused(content: bytes, count: int) -> None:
    with pytest.raises(FrameError):
        _take(Packer().pack([content]), count)


# -- whether it pays ---------------------------------------------------------------------------------


class Link:
    """A link and a processor for which time passes only here."""

    def __init__(self, link: float, packing_rate: float, share: float) -> None:
        self.link, self.packing_rate, self.share = link, packing_rate, share
        self.choice = Choice()
        self.seconds = 0.0

    def run(self, total: int, piece: int = MIB) -> None:
        """Send so many bytes."""
        for _ in range(total // piece):
            packing_seconds = piece / self.packing_rate if self.choice.packing else 0.0
            sending = piece * (self.share if self.choice.packing else 1.0) / self.link
            self.seconds += packing_seconds + sending
            self.choice.spent(piece, packing_seconds, packing_seconds + sending)


@given(
    st.floats(1e6, 2e9),
    st.floats(5e7, 2e9),
    st.floats(0.02, 1.05),
)
@settings(max_examples=150)
def test_never_slower_and_nearly_as_fast_as_the_better_way(link: float, packing_rate: float, share: float) -> None:
    """Over 8 GiB, whatever link, processor and data: some looks slower than plain at most; and where compressing is
    cheaper by more than WORTH leaves open, it is found."""
    total = 8 << 30
    simulated = Link(link, packing_rate, share)
    simulated.run(total)
    plain, packed = total / link, total / packing_rate + total * share / link
    # At the begin nothing is known: the first LOOK_BYTES go plainly; and a look costs a piece at least.
    looks = packing.LOOK_BYTES / link + 16 * MIB / packing_rate
    assert simulated.seconds <= 1.01 * plain + looks
    assert simulated.seconds <= 1.05 / packing.WORTH * min(plain, packed) + looks


def test_it_follows_the_link() -> None:
    """A link that becomes slow is compressed for, one that becomes fast again is not."""
    simulated = Link(1e9, 4e8, 0.4)
    answers = []
    simulated.run(2 << 30)
    answers.append(simulated.choice.packing)
    simulated.link = 1e7
    simulated.run(8 << 30)
    answers.append(simulated.choice.packing)
    simulated.link = 1e9
    simulated.run(8 << 30)
    assert [*answers, simulated.choice.packing] == [False, True, False]


# -- from end to end ---------------------------------------------------------------------------------


def test_a_seed_and_a_drain_travel_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With data that compresses: fewer bytes on the wire, the same on the disk, and what is random is sent plainly."""
    world = World(tmp_path, monkeypatch, {"data": 24 * MIB + 3584})
    try:
        line = b"row of a table that compresses well\n" * 40000
        world.source().write_bytes((line * 40)[: 12 * MIB] + world.random.randbytes(12 * MIB + 3584))
        monkeypatch.setattr(Choice, "spent", lambda *_: None)
        monkeypatch.setattr(Choice, "packing", True, raising=False)
        monkeypatch.setattr(Choice, "__init__", lambda self: None)
        sent = []
        encode = FrameWriter.encode_packed

        def counted(self: FrameWriter, volume: int, count: int, packed: bytes) -> tuple[bytes, memoryview]:
            sent.append(len(packed))
            return encode(self, volume, count, packed)

        monkeypatch.setattr(FrameWriter, "encode_packed", counted)
        world.config = dataclasses.replace(world.config, compression="zstd")
        engine = world.engine()
        world.until(engine, "in_step")
        assert 8 <= len(sent) <= 14 and sum(sent) < 2 * MIB
        world.write(7 * GRANULE, line[:GRANULE])
        assert world.drain(engine)["bytes_shipped"] == GRANULE
        world.check_equal()
    finally:
        world.close()


def test_a_standby_without_the_library_is_shipped_to_plainly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compression is a wish: one side without it, and the session has none."""
    monkeypatch.setattr(packing, "available", lambda: False)
    world = World(tmp_path, monkeypatch, {"data": 3 * MIB})
    try:
        world.config = dataclasses.replace(world.config, compression="zstd")
        engine = world.engine()
        world.until(engine, "in_step")
        assert engine.session is not None and engine.session.lanes[0].packer is None
        world.drain(engine)
        world.check_equal()
    finally:
        world.close()
