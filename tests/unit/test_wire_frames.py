# SPDX-License-Identifier: GPL-3.0-or-later
"""Framing: what goes in comes out, and anything else is refused and never handed out."""

from __future__ import annotations

import struct
import zlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bmigrate.wire import frames
from bmigrate.wire.frames import FrameError, FrameReader, FrameType, FrameWriter

Message = dict[str, Any]
SPACE = memoryview(bytearray(frames.MAX_PAYLOAD_BYTES))
unhurried = settings(deadline=None)


def reader_of(epoch: int) -> FrameReader:
    """A receiver's reader; they share one buffer, as making one costs more than a test."""
    return FrameReader(frames.FROM_SENDER, epoch=epoch, buffer=SPACE)


@st.composite
def message(draw: st.DrawFn, types: frozenset[FrameType] = frames.FROM_SENDER) -> Message:
    """One frame that a sender may send."""
    type_ = draw(st.sampled_from(sorted(types)))
    fields: Message = {"type_": type_, "volume": draw(st.integers(0, 15)), "offset": draw(st.integers(0, 1 << 60))}
    if type_ is FrameType.DATA:
        fields["payload"] = draw(st.binary(min_size=1, max_size=5000))
    elif type_ is FrameType.EXTENTS:
        gaps = draw(st.lists(st.tuples(st.integers(0, 1 << 40), st.binary(min_size=1, max_size=600)), min_size=1))
        parts, end = [], 0
        for gap, data in gaps:
            parts.append((end + gap, data))
            end += gap + len(data)
        fields.update(
            offset=0, aux=len(parts), payload=b"".join(data for _, data in parts)
            + frames.encode_extents([(offset, len(data)) for offset, data in parts]),
        )  # fmt: skip
    elif type_ is FrameType.PACKED:
        fields.update(offset=0, aux=draw(st.integers(1, 30)), payload=draw(st.binary(min_size=1, max_size=900)))
    elif type_ is FrameType.HASH:
        fields["aux"] = draw(st.integers(1, frames.MAX_HASH_BYTES))
        fields["payload"] = frames.encode_chunk(1 << draw(st.integers(12, 20)))
    elif type_ is FrameType.REREAD:
        extents = draw(st.lists(st.tuples(st.integers(0, 1 << 60), st.integers(1, 1 << 20)), min_size=1, max_size=20))
        fields["payload"] = frames.encode_extents(extents)
    elif type_ in (FrameType.HELLO, FrameType.WELCOME, FrameType.ERROR):
        fields["payload"] = b'{"v":1}'
    elif type_ is FrameType.HASHES:
        fields["payload"] = draw(st.binary(min_size=1, max_size=9)) * 16
    elif type_ is FrameType.DIGESTS:
        fields["payload"] = draw(st.binary(min_size=1, max_size=9)) * 32
    else:
        fields["aux"] = draw(st.integers(1, 1 << 60))
    return fields


def encode_all(writer: FrameWriter, messages: list[Message]) -> bytes:
    out = b""
    for fields in messages:
        header, payload = writer.encode(fields["type_"], **{k: v for k, v in fields.items() if k != "type_"})
        assert len(header) == frames.HEADER_BYTES == 56
        out += header + bytes(payload)
    return out


def seen(frame: frames.Frame) -> tuple[Any, ...]:
    return (frame.type, frame.volume, frame.offset, frame.aux, bytes(frame.payload))


def sent(fields: Message) -> tuple[Any, ...]:
    return (fields["type_"], fields["volume"], fields["offset"], fields.get("aux", 0), fields.get("payload", b""))


@unhurried
@given(st.lists(message(), max_size=8), st.data())
def test_frames_survive_any_split_of_the_stream(messages: list[Message], data: st.DataObject) -> None:
    stream = encode_all(FrameWriter(7), messages)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=10)))
    reader = reader_of(7)
    got = []
    for begin, end in zip([0, *cuts], [*cuts, len(stream)]):
        got += [seen(frame) for frame in reader.feed(stream[begin:end])]
    assert got == [sent(fields) for fields in messages]
    assert reader.filled(0) is None


@unhurried
@given(st.lists(message(), min_size=1, max_size=4), st.data())
def test_no_damaged_frame_is_ever_handed_out(messages: list[Message], data: st.DataObject) -> None:
    stream = bytearray(encode_all(FrameWriter(7), messages))
    for _ in range(data.draw(st.integers(1, 4))):
        bit = data.draw(st.integers(0, len(stream) * 8 - 1))
        stream[bit // 8] ^= 1 << bit % 8
    original = encode_all(FrameWriter(7), messages)
    reader = reader_of(7)
    got = []
    try:
        for frame in reader.feed(stream):
            got.append(seen(frame))
        ended = reader.filled(0) is None
    except FrameError:
        ended = False
    assert got == [sent(fields) for fields in messages][: len(got)]
    if bytes(stream) != original:
        assert not ended and len(got) < len(messages)


@unhurried
@given(st.binary(max_size=4000))
def test_noise_is_refused(noise: bytes) -> None:
    reader = reader_of(0)
    with pytest.raises(FrameError):
        for frame in reader.feed(noise):
            raise AssertionError(frame)
        if not noise:
            raise FrameError("nothing was sent")
        reader.filled(0)


@unhurried
@given(st.lists(message(), min_size=1, max_size=3), st.data())
def test_a_stream_that_ends_in_a_frame_is_truncated(messages: list[Message], data: st.DataObject) -> None:
    stream = encode_all(FrameWriter(7), messages)
    ends = [len(encode_all(FrameWriter(7), messages[:count])) for count in range(len(messages) + 1)]
    cut = data.draw(st.integers(0, len(stream)))
    reader = reader_of(7)
    assert len(list(reader.feed(stream[:cut]))) == sum(1 for end in ends[1:] if end <= cut)
    if cut in ends:
        assert reader.filled(0) is None
    else:
        with pytest.raises(frames.TruncatedError):
            reader.filled(0)


def header(**changes: int) -> bytes:
    """A header of a PING with fields changed and its checksum made right again."""
    fields = {
        "magic": frames.MAGIC,
        "type": int(FrameType.PING),
        "flags": 0,
        "volume": 0,
        "epoch": 7,
        "seq": 1,
        "offset": 0,
        "aux": 0,
        "length": 0,
        "crc": 0,
        "reserved": 0,
        **changes,
    }
    raw = frames.HEADER.pack(*fields.values(), 0)[:-4]
    return raw + struct.pack("<I", zlib.crc32(raw))


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"magic": 0x32474D42}, frames.BadMagicError),
        ({"flags": 1}, frames.BadHeaderError),
        ({"reserved": 1}, frames.BadHeaderError),
        ({"type": 0}, frames.BadTypeError),
        ({"type": 99}, frames.BadTypeError),
        ({"type": int(FrameType.ACK)}, frames.BadTypeError),
        ({"type": int(FrameType.DATA), "length": frames.MAX_PAYLOAD_BYTES + 1}, frames.TooLongError),
        ({"type": int(FrameType.DATA), "length": (1 << 32) - 1}, frames.TooLongError),
        ({"type": int(FrameType.HELLO), "length": frames.MAX_JSON_BYTES + 1}, frames.TooLongError),
        ({"type": int(FrameType.DATA)}, frames.BadShapeError),
        ({"type": int(FrameType.DATA), "length": 512, "offset": (1 << 64) - 511}, frames.BadShapeError),
        ({"type": int(FrameType.ZERO), "aux": 2, "offset": (1 << 64) - 2}, frames.BadShapeError),
        ({"type": int(FrameType.ZERO)}, frames.BadShapeError),
        ({"length": 1}, frames.BadShapeError),
        ({"type": int(FrameType.HASH), "length": 4, "aux": frames.MAX_HASH_BYTES + 1}, frames.BadShapeError),
        ({"type": int(FrameType.REREAD), "length": 17}, frames.BadShapeError),
        ({"seq": 2}, frames.BadSequenceError),
        ({"seq": 0}, frames.BadSequenceError),
        ({"epoch": 6}, frames.BadEpochError),
        ({"epoch": 8}, frames.BadEpochError),
    ],
)
def test_headers_that_are_refused_before_any_payload_is_read(changes: dict[str, int], error: type[FrameError]) -> None:
    reader = reader_of(7)
    with pytest.raises(error) as caught:
        list(reader.feed(header(**changes)))
    assert str(caught.value) and caught.value.reason != "bad_frame"
    with pytest.raises(error):  # and it stays refused
        reader.space()
    with pytest.raises(error):
        reader.filled(1)


def test_a_repeated_frame_is_refused() -> None:
    stream = encode_all(FrameWriter(7), [{"type_": FrameType.SYNC, "volume": 0, "offset": 0, "aux": 1}])
    reader = reader_of(7)
    assert len(list(reader.feed(stream))) == 1
    with pytest.raises(frames.BadSequenceError):
        list(reader.feed(stream))


@pytest.mark.parametrize(
    "payload",
    [frames.encode_chunk(0), frames.encode_chunk(4095), frames.encode_chunk(12288), frames.encode_chunk(8 << 20)],
)
def test_a_hash_with_a_bad_chunk_is_refused_on_both_sides(payload: bytes) -> None:
    writer = FrameWriter(7)
    with pytest.raises(frames.BadShapeError):
        writer.encode(FrameType.HASH, aux=4096, payload=payload)
    assert writer.next_seq == frames.FIRST_SEQ
    raw = frames.encode_header(
        FrameType.HASH, volume=0, epoch=7, seq=1, offset=0, aux=4096, length=4, payload_crc32=zlib.crc32(payload)
    )
    with pytest.raises(frames.BadShapeError):
        list(reader_of(7).feed(raw + payload))


@pytest.mark.parametrize("extents", [[(0, 0)], [((1 << 64) - 1, 1)], [(0, frames.MAX_HASH_BYTES), (0, 1)]])
def test_a_reread_without_bounds_is_refused(extents: list[tuple[int, int]]) -> None:
    with pytest.raises(frames.BadShapeError):
        FrameWriter(7).encode(FrameType.REREAD, payload=frames.encode_extents(extents))


def test_payloads_are_not_copied_and_land_at_the_start_of_the_buffer() -> None:
    data = bytearray(b"x" * 4096)
    writer = FrameWriter(7)
    head, view = writer.encode(FrameType.DATA, payload=data)
    assert view.obj is data
    buffer = memoryview(bytearray(frames.MAX_PAYLOAD_BYTES))
    reader = FrameReader(frames.FROM_SENDER, epoch=7, buffer=buffer)
    reader.space()[:] = head
    assert reader.filled(len(head)) is None
    assert len(reader.space()) == 4096  # never more than this frame: the next one's header must not follow into it
    reader.space()[:] = view
    frame = reader.filled(4096)
    assert frame is not None and frame.payload.obj is buffer.obj and bytes(buffer[:4096]) == data


def test_too_much_payload_is_refused_by_the_writer() -> None:
    with pytest.raises(frames.TooLongError):
        FrameWriter(7).encode(FrameType.DATA, payload=bytes(frames.MAX_PAYLOAD_BYTES + 1))


@unhurried
@given(st.lists(st.tuples(st.integers(0, 1 << 40), st.binary(min_size=1, max_size=600)), min_size=1, max_size=40))
def test_extents_come_out_as_they_went_in(gaps: list[tuple[int, bytes]]) -> None:
    parts, end = [], 0
    for gap, data in gaps:
        parts.append((end + gap, memoryview(data)))
        end += gap + len(data)
    writer = FrameWriter(7)
    (frame,) = reader_of(7).feed(b"".join(bytes(buffer) for buffer in writer.encode_extents(3, parts)))
    assert (frame.type, frame.volume, frame.aux, writer.next_seq) == (FrameType.EXTENTS, 3, len(parts), 2)
    assert [(offset, bytes(data)) for offset, data in frame.parts()] == [(at, bytes(data)) for at, data in parts]


@pytest.mark.parametrize(
    "table, data_bytes",
    [
        ([(0, 512), (511, 512)], 1024),
        ([(512, 512), (0, 512)], 1024),
        ([(0, 512), (512, 0)], 512),
        ([(0, 512)], 1024),
        ([(0, 1024)], 512),
        ([((1 << 64) - 512, 1024)], 1024),
    ],
    ids=["overlap", "descending", "empty", "data left over", "data missing", "beyond 2^64"],
)
def test_extents_that_do_not_fit_their_data_are_refused(table: list[tuple[int, int]], data_bytes: int) -> None:
    payload = bytes(data_bytes) + frames.encode_extents(table)
    header = frames.encode_header(
        FrameType.EXTENTS, volume=0, epoch=7, seq=1, offset=0, aux=len(table), length=len(payload),
        payload_crc32=zlib.crc32(payload),
    )  # fmt: skip
    with pytest.raises(frames.BadShapeError):
        list(reader_of(7).feed(header + payload))
    with pytest.raises(frames.BadShapeError):
        FrameWriter(7).encode(FrameType.EXTENTS, aux=len(table), payload=payload)


@pytest.mark.parametrize("count", [0, frames.MAX_EXTENTS + 1])
def test_the_number_of_extents_is_bounded(count: int) -> None:
    parts = [(1024 * number, memoryview(bytes(512))) for number in range(count)]
    with pytest.raises(frames.BadShapeError):
        FrameWriter(7).encode_extents(0, parts)
