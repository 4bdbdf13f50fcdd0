# SPDX-License-Identifier: GPL-3.0-or-later
"""Framing: how one message of the protocol looks on the wire, and how it is taken apart again.

It promises that a frame is either handed out whole and checked (magic, header checksum, limits,
shape, sequence, epoch, payload checksum, in this order) or that a `FrameError` says what is
wrong with it. After an error a reader hands out nothing more: a stream that was wrong once is
never resynchronised, because bytes taken for a header could then land on a device.

It must never allocate by a length that came from the wire, copy a payload, or do I/O. The CRCs
here guard frames against damage; they say nothing about equality of data (that needs 128 bits).
The format is described in docs/protocol.md.
"""

from __future__ import annotations

import enum
import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple, Union

MAGIC = 0x31474D42  # "BMG1", little-endian
VERSION = 3
"""The newest version that this host speaks; 2 has EXTENTS and PACKED frames, 3 sessions of several streams, with
MARK frames, and a choice of the hash. HELLO and WELCOME agree on one."""
MIN_VERSION = 1
HEADER = struct.Struct("<IBBHQQQQIIII")
HEADER_BYTES = 56
_HEADER_CRC = struct.Struct("<I")
_EXTENT = struct.Struct("<QQ")
_CHUNK = struct.Struct("<I")

MAX_PAYLOAD_BYTES = 4 << 20
MAX_JSON_BYTES = 64 << 10
MAX_HASH_BYTES = 64 << 20
"""Longest range of one HASH frame, and largest sum of lengths of one REREAD frame."""
MIN_HASH_CHUNK_BYTES = 4096
MAX_HASH_CHUNK_BYTES = 1 << 20
HASH_DIGEST_BYTES = 16
EXTENT_DIGEST_BYTES = 32
MAX_EXTENTS = 1022
"""Most extents of one EXTENTS frame; with header and table the frame is one writev of at most 1024 parts (IOV_MAX)."""
FIRST_SEQ = 1
_MAX_U64 = (1 << 64) - 1

Buffer = Union[bytes, bytearray, memoryview]


class FrameType(enum.IntEnum):
    """What a frame is. The direction is fixed for each, see FROM_SENDER and FROM_RECEIVER."""

    HELLO = 1
    WELCOME = 2
    DATA = 3
    ZERO = 4
    SYNC = 5
    ACK = 6
    HASH = 7
    HASHES = 8
    REREAD = 9
    DIGESTS = 10
    RESYNC_DONE = 11
    PING = 12
    PONG = 13
    BYE = 14
    ERROR = 15
    EXTENTS = 16
    PACKED = 17
    MARK = 18
    MARKED = 19


_BOTH = frozenset({FrameType.RESYNC_DONE, FrameType.PING, FrameType.PONG, FrameType.BYE, FrameType.ERROR})
FROM_SENDER = _BOTH | {
    FrameType.HELLO,
    FrameType.DATA,
    FrameType.EXTENTS,
    FrameType.PACKED,
    FrameType.ZERO,
    FrameType.SYNC,
    FrameType.HASH,
    FrameType.REREAD,
    FrameType.MARK,
}
FROM_RECEIVER = _BOTH | {
    FrameType.WELCOME,
    FrameType.ACK,
    FrameType.HASHES,
    FrameType.DIGESTS,
    FrameType.MARKED,
}

_SINCE = {FrameType.EXTENTS: 2, FrameType.PACKED: 2, FrameType.MARK: 3}


def from_sender(version: int) -> frozenset[FrameType]:
    """The types that a sender may use in a session of this version."""
    return frozenset(type_ for type_ in FROM_SENDER if _SINCE.get(type_, 1) <= version)


_JSON_TYPES = frozenset({FrameType.HELLO, FrameType.WELCOME, FrameType.ERROR})
_EMPTY_TYPES = frozenset(
    {
        FrameType.ZERO,
        FrameType.SYNC,
        FrameType.ACK,
        FrameType.RESYNC_DONE,
        FrameType.PING,
        FrameType.PONG,
        FrameType.BYE,
        FrameType.MARK,
        FrameType.MARKED,
    }
)


class FrameError(Exception):
    """The stream broke the protocol. `reason` is a short stable word, the message is for people."""

    reason = "bad_frame"


class BadMagicError(FrameError):
    """These bytes are no frame at all: another program, another version, or noise of a login shell."""

    reason = "bad_magic"


class BadHeaderError(FrameError):
    """The header was damaged, or has a reserved field in use."""

    reason = "bad_header"


class BadTypeError(FrameError):
    """An unknown type, or one that this direction never carries."""

    reason = "bad_type"


class BadShapeError(FrameError):
    """The fields or the length do not belong to this type."""

    reason = "bad_shape"


class TooLongError(FrameError):
    """The announced length is beyond the limit."""

    reason = "too_long"


class BadSequenceError(FrameError):
    """A frame was lost, repeated or put in another order."""

    reason = "bad_sequence"


class BadEpochError(FrameError):
    """The frame belongs to another session."""

    reason = "bad_epoch"


class BadPayloadError(FrameError):
    """The payload does not match its checksum."""

    reason = "bad_payload"


class TruncatedError(FrameError):
    """The stream ended in the middle of a frame."""

    reason = "truncated"


class Frame(NamedTuple):
    """One whole, checked frame. `payload` is valid only until the reader is asked for space again."""

    type: FrameType
    volume: int
    epoch: int
    seq: int
    offset: int
    aux: int
    payload: memoryview

    def extents(self) -> list[tuple[int, int]]:
        """The (offset, length) pairs in bytes of a REREAD frame."""
        return list(_EXTENT.iter_unpack(self.payload))

    def parts(self) -> list[tuple[int, memoryview]]:
        """The (offset in bytes, data) pairs of an EXTENTS frame, ascending; the data is not copied."""
        table_at = len(self.payload) - self.aux * _EXTENT.size
        result, at = [], 0
        for offset, length in _EXTENT.iter_unpack(self.payload[table_at:]):
            result.append((offset, self.payload[at : at + length]))
            at += length
        return result

    def chunk_bytes(self) -> int:
        """The chunk size in bytes of a HASH frame."""
        value: int = _CHUNK.unpack(self.payload)[0]
        return value


class _Header(NamedTuple):
    type: FrameType
    volume: int
    epoch: int
    seq: int
    offset: int
    aux: int
    length: int
    payload_crc32: int


def encode_extents(extents: list[tuple[int, int]]) -> bytes:
    """Payload of a REREAD frame. `extents` are (offset, length) in bytes, relative to the volume."""
    return b"".join(_EXTENT.pack(offset, length) for offset, length in extents)


def encode_chunk(chunk_bytes: int) -> bytes:
    """Payload of a HASH frame."""
    return _CHUNK.pack(chunk_bytes)


def chunk_count(length: int, chunk_bytes: int) -> int:
    """How many digests answer a HASH over `length` bytes; the last chunk may be shorter."""
    return -(-length // chunk_bytes)


def encode_header(
    type_: FrameType, *, volume: int, epoch: int, seq: int, offset: int, aux: int, length: int, payload_crc32: int
) -> bytes:
    """Pack one header of 56 bytes, its own checksum included."""
    head = HEADER.pack(MAGIC, int(type_), 0, volume, epoch, seq, offset, aux, length, payload_crc32, 0, 0)
    return head[:-4] + _HEADER_CRC.pack(zlib.crc32(head[:-4]))


def _decode_header(raw: Buffer) -> _Header:
    (magic, type_, flags, volume, epoch, seq, offset, aux, length, payload_crc32, reserved, header_crc32) = (
        HEADER.unpack(raw)
    )
    if magic != MAGIC:
        raise BadMagicError(
            f"expected a frame (magic BMG1), got the bytes {bytes(raw[:16])!r}; is something else "
            "printing into this stream, or is the peer of another version?"
        )
    if zlib.crc32(memoryview(raw)[: HEADER_BYTES - 4]) != header_crc32:
        raise BadHeaderError("the header's checksum is wrong")
    if flags or reserved:
        raise BadHeaderError(f"flags {flags:#x}, reserved field {reserved:#x}: this version knows none")
    try:
        known = FrameType(type_)
    except ValueError:
        raise BadTypeError(f"frame type {type_} is unknown to protocol version {VERSION}") from None
    if length > MAX_PAYLOAD_BYTES:
        raise TooLongError(f"{known.name} frame announces {length} bytes of payload, the limit is {MAX_PAYLOAD_BYTES}")
    return _Header(known, volume, epoch, seq, offset, aux, length, payload_crc32)


def _check_shape(head: _Header) -> None:
    """Refuse what can be refused before the payload is read."""
    name, length = head.type.name, head.length
    if head.type in _JSON_TYPES:
        if length > MAX_JSON_BYTES:
            raise TooLongError(f"{name} frame announces {length} bytes, the limit is {MAX_JSON_BYTES}")
        if length == 0:
            raise BadShapeError(f"{name} frame without a payload")
    elif head.type in _EMPTY_TYPES:
        if length:
            raise BadShapeError(f"{name} frame carries {length} bytes, expected none")
        if head.type is FrameType.ZERO and head.aux == 0:
            raise BadShapeError("ZERO frame over 0 bytes")
    elif head.type is FrameType.DATA:
        if length == 0:
            raise BadShapeError("DATA frame without data")
        if head.aux:
            raise BadShapeError(f"DATA frame with aux={head.aux}, expected 0")
    elif head.type is FrameType.EXTENTS:
        if not 1 <= head.aux <= MAX_EXTENTS or head.offset:
            raise BadShapeError(
                f"EXTENTS frame of {head.aux} extents at offset {head.offset}: expected 1 to {MAX_EXTENTS}, and 0"
            )
        if length <= head.aux * _EXTENT.size:
            raise BadShapeError(f"EXTENTS frame of {length} bytes has no room for data and {head.aux} extents")
    elif head.type is FrameType.PACKED:
        if not 1 <= head.aux <= MAX_EXTENTS or head.offset or not length:
            raise BadShapeError(
                f"PACKED frame of {head.aux} extents and {length} bytes at offset {head.offset}: expected 1 to "
                f"{MAX_EXTENTS}, some, and 0"
            )
    elif head.type is FrameType.HASH:
        if length != _CHUNK.size or not 0 < head.aux <= MAX_HASH_BYTES:
            raise BadShapeError(
                f"HASH frame over {head.aux} bytes with a payload of {length}: expected 1 to "
                f"{MAX_HASH_BYTES} bytes and {_CHUNK.size}"
            )
    elif head.type is FrameType.REREAD:
        if length == 0 or length % _EXTENT.size:
            raise BadShapeError(f"REREAD frame of {length} bytes: expected whole extents of {_EXTENT.size}")
    elif head.type is FrameType.HASHES:
        if length == 0 or length % HASH_DIGEST_BYTES:
            raise BadShapeError(f"HASHES frame of {length} bytes: expected whole digests of {HASH_DIGEST_BYTES}")
    elif length == 0 or length % EXTENT_DIGEST_BYTES:
        raise BadShapeError(f"DIGESTS frame of {length} bytes: expected whole digests of {EXTENT_DIGEST_BYTES}")
    if head.offset + (head.aux if head.type in (FrameType.ZERO, FrameType.HASH) else length) > _MAX_U64:
        raise BadShapeError(f"{name} frame at offset {head.offset} ends beyond 2^64")


def unpacked(frame: Frame, content: memoryview) -> Frame:
    """The EXTENTS frame that a PACKED frame carried, checked like one.

    Raises:
        FrameError: it is not one.
    """
    head = _Header(FrameType.EXTENTS, frame.volume, frame.epoch, frame.seq, 0, frame.aux, len(content), 0)
    _check_shape(head)
    made = Frame(FrameType.EXTENTS, frame.volume, frame.epoch, frame.seq, 0, frame.aux, content)
    _check_payload(made)
    return made


def _check_payload(frame: Frame) -> None:
    """Refuse what only the payload shows: a chunk size or a list of extents that would cost without bound."""
    if frame.type is FrameType.HASH:
        chunk = frame.chunk_bytes()
        if not MIN_HASH_CHUNK_BYTES <= chunk <= MAX_HASH_CHUNK_BYTES or chunk & (chunk - 1):
            raise BadShapeError(
                f"HASH frame with chunks of {chunk} bytes: expected a power of two from "
                f"{MIN_HASH_CHUNK_BYTES} to {MAX_HASH_CHUNK_BYTES}"
            )
    elif frame.type is FrameType.EXTENTS:
        _check_table(frame)
    elif frame.type is FrameType.REREAD:
        total = 0
        for offset, length in frame.extents():
            total += length
            if length == 0 or offset + length > _MAX_U64 or total > MAX_HASH_BYTES:
                raise BadShapeError(
                    f"REREAD frame with the extent ({offset}, {length}): lengths must be above 0 "
                    f"and at most {MAX_HASH_BYTES} bytes together"
                )


def _check_table(frame: Frame) -> None:
    """The extents must ascend without overlap and cover the data exactly: no byte lands twice, none is left over."""
    data_bytes = len(frame.payload) - frame.aux * _EXTENT.size
    end = total = 0
    for offset, length in _EXTENT.iter_unpack(frame.payload[data_bytes:]):
        if length == 0 or offset < end or offset + length > _MAX_U64:
            raise BadShapeError(f"EXTENTS frame with the extent ({offset}, {length}) after byte {end}")
        end = offset + length
        total += length
    if total != data_bytes:
        raise BadShapeError(f"EXTENTS frame with {data_bytes} bytes of data for extents of {total} bytes")


class FrameWriter:
    """Numbers and encodes the frames of one direction of one session.

    `epoch` is 0 until the session has one; set it when WELCOME is sent or received.
    """

    def __init__(self, epoch: int = 0) -> None:
        self.epoch = epoch
        self.next_seq = FIRST_SEQ

    def encode(
        self, type_: FrameType, *, volume: int = 0, offset: int = 0, aux: int = 0, payload: Buffer = b""
    ) -> tuple[bytes, memoryview]:
        """Encode one frame.

        Args:
            volume: index of the volume in WELCOME.
            offset, aux: bytes, or what the type says; see docs/protocol.md.
            payload: not copied; must not change before it is sent.

        Returns: the header, and a view of the payload; send both, in this order (os.writev).
        Raises: TooLongError, BadShapeError for a frame that no reader would accept; no number is used up then.
        """
        view = memoryview(payload).cast("B")
        if len(view) > MAX_PAYLOAD_BYTES:
            raise TooLongError(
                f"{type_.name} frame with {len(view)} bytes of payload, the limit is {MAX_PAYLOAD_BYTES}"
            )
        head = _Header(type_, volume, self.epoch, self.next_seq, offset, aux, len(view), zlib.crc32(view))
        _check_shape(head)
        _check_payload(Frame(type_, volume, self.epoch, head.seq, offset, aux, view))
        raw = encode_header(
            type_,
            volume=volume,
            epoch=self.epoch,
            seq=head.seq,
            offset=offset,
            aux=aux,
            length=head.length,
            payload_crc32=head.payload_crc32,
        )
        self.next_seq += 1
        return raw, view

    def encode_packed(self, volume: int, count: int, packed: bytes) -> tuple[bytes, memoryview]:
        """Encode one PACKED frame: ``count`` extents, their EXTENTS payload compressed.

        Raises: TooLongError for a frame that no reader would accept; no number is used up then.
        """
        return self.encode(FrameType.PACKED, volume=volume, aux=count, payload=packed)

    def encode_extents(self, volume: int, parts: list[tuple[int, memoryview]]) -> list[Buffer]:
        """Encode one EXTENTS frame without copying data.

        Args:
            volume: index of the volume in WELCOME.
            parts: (offset in bytes, data), ascending and without overlap; must not change before they are sent.

        Returns: the buffers to send, in this order, in one writev.
        Raises: TooLongError, BadShapeError for a frame that no reader would accept; no number is used up then.
        """
        end = 0
        for offset, data in parts:
            if offset < end or not len(data) or offset + len(data) > _MAX_U64:
                raise BadShapeError(f"EXTENTS frame with the extent ({offset}, {len(data)}) after byte {end}")
            end = offset + len(data)
        table = encode_extents([(offset, len(data)) for offset, data in parts])
        crc, length = 0, len(table)
        for _, data in parts:
            crc = zlib.crc32(data, crc)
            length += len(data)
        if length > MAX_PAYLOAD_BYTES:
            raise TooLongError(f"EXTENTS frame with {length} bytes of payload, the limit is {MAX_PAYLOAD_BYTES}")
        head = _Header(
            FrameType.EXTENTS, volume, self.epoch, self.next_seq, 0, len(parts), length, zlib.crc32(table, crc)
        )
        _check_shape(head)
        raw = encode_header(
            FrameType.EXTENTS,
            volume=volume,
            epoch=self.epoch,
            seq=head.seq,
            offset=0,
            aux=head.aux,
            length=length,
            payload_crc32=head.payload_crc32,
        )
        self.next_seq += 1
        return [raw, *(data for _, data in parts), table]


class FrameReader:
    """Takes one direction of a stream apart, without copying payloads.

    Use: `n = fd.readinto(reader.space())`, then `frame = reader.filled(n)`; None means "read on".
    `space()` never asks for more than the rest of the present header or payload, so that a payload
    always begins at the start of `buffer` (which the caller may have aligned for O_DIRECT).
    A frame's payload is a view of `buffer` and is valid until `space()` is called again.

    `epoch`: the epoch that every frame must carry, or None while it is not known yet (the sender's
    side before WELCOME). The receiver begins with 0 and sets it when hold has granted one.
    `allowed`: the types of this direction, FROM_SENDER or FROM_RECEIVER; fewer once an older version was agreed on.
    """

    def __init__(
        self, allowed: frozenset[FrameType], *, epoch: int | None = None, buffer: memoryview | None = None
    ) -> None:
        self.epoch = epoch
        self.last_seq = FIRST_SEQ - 1
        self.allowed = allowed
        self._buffer = (memoryview(bytearray(MAX_PAYLOAD_BYTES)) if buffer is None else buffer).cast("B")
        if len(self._buffer) < MAX_PAYLOAD_BYTES or self._buffer.readonly:
            raise ValueError(f"the buffer must be writable and hold {MAX_PAYLOAD_BYTES} bytes")
        self._head_raw = memoryview(bytearray(HEADER_BYTES))
        self._head: _Header | None = None
        self._have = 0
        self._error: FrameError | None = None

    @property
    def in_frame(self) -> bool:
        """Whether a frame has begun and is not complete."""
        return self._have > 0 or self._head is not None

    def space(self) -> memoryview:
        """Where the next bytes of the stream go; never empty."""
        if self._error is not None:
            raise self._error
        if self._head is None:
            return self._head_raw[self._have :]
        return self._buffer[self._have : self._head.length]

    def filled(self, count: int) -> Frame | None:
        """Say that `count` bytes were put at the start of `space()`. Returns a frame once it is whole.

        Raises: FrameError; every later call raises it again. `count` 0 means the end of the stream:
        TruncatedError in the middle of a frame, None between frames.
        """
        if self._error is not None:
            raise self._error
        try:
            return self._advance(count)
        except FrameError as error:
            self._error = error
            raise

    def feed(self, data: Buffer) -> Iterator[Frame]:
        """Copying form of space() and filled(): yields each frame that `data` completes, before the next is begun."""
        rest = memoryview(data).cast("B")
        while len(rest):
            space = self.space()
            count = min(len(space), len(rest))
            space[:count] = rest[:count]
            rest = rest[count:]
            frame = self.filled(count)
            if frame is not None:
                yield frame

    def _advance(self, count: int) -> Frame | None:
        if count == 0:
            if self.in_frame:
                wanted = HEADER_BYTES if self._head is None else self._head.length
                raise TruncatedError(
                    f"the stream ended after {self._have} of {wanted} bytes of a frame's "
                    f"{'header' if self._head is None else 'payload'}"
                )
            return None
        self._have += count
        if self._head is None:
            if self._have < HEADER_BYTES:
                return None
            self._head = self._accept_header()
            self._have = 0
        if self._have < self._head.length:
            return None
        head, self._head, self._have = self._head, None, 0
        payload = self._buffer[: head.length]
        if zlib.crc32(payload) != head.payload_crc32:
            raise BadPayloadError(
                f"{head.type.name} frame {head.seq}: the checksum of its {head.length} bytes is wrong"
            )
        frame = Frame(head.type, head.volume, head.epoch, head.seq, head.offset, head.aux, payload)
        _check_payload(frame)
        self.last_seq = head.seq
        return frame

    def _accept_header(self) -> _Header:
        head = _decode_header(self._head_raw)
        if head.type not in self.allowed:
            raise BadTypeError(f"{head.type.name} frame in a direction that never carries it")
        _check_shape(head)
        if head.seq != self.last_seq + 1:
            raise BadSequenceError(f"{head.type.name} frame has number {head.seq}, expected {self.last_seq + 1}")
        if self.epoch is not None and head.epoch != self.epoch:
            raise BadEpochError(f"{head.type.name} frame of epoch {head.epoch} in a session of epoch {self.epoch}")
        return head
