# SPDX-License-Identifier: GPL-3.0-or-later
"""Hostile frames against the receiver's own code: its framing, its session, its volumes.

A stream is some frames as a sender may send them, then damaged: fields set to extremes, with checksums made
right again or not, payloads exchanged, bits turned, bytes cut out, put in or repeated. The session works on files:
beyond the bounds that HELLO announced lies a guard, and a file that no volume names lies beside them.

What must hold, and is checked: the code raises its own errors only; no byte of a guard changes; no file changes its
length; after an error the reader gives out nothing more; memory stays bounded. A run is repeated exactly by its seed.
"""

from __future__ import annotations

import mmap
import os
import random
import resource
import threading
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable

from bmigrate.common.errors import BmigrateError
from bmigrate.receive import session as sessions
from bmigrate.receive.volumes import StandbyVolume
from bmigrate.wire import frames, hashing, packing
from bmigrate.wire.frames import FrameError, FrameReader, FrameType, FrameWriter

EPOCH = 7
LIMIT_BYTES = (1 << 20) - 512
GUARD_BYTES = 1 << 20
MAX_GROWTH_BYTES = 96 << 20
"""The reader's buffer, the digests of the longest HASH, and room; a length believed from the wire would be 4 GiB."""
EXTREMES = (0, 1, 2, 511, 512, 513, 4095, 4096, 1 << 20, (1 << 22) + 1, 1 << 31, (1 << 32) - 1, 1 << 62, (1 << 64) - 1)
_WIDTHS = {"type": 8, "flags": 8, "volume": 16, "epoch": 64, "seq": 64, "offset": 64, "aux": 64, "length": 32}


class _Link:
    """In place of receive.link.Link: what is sent is dropped, but must be a frame."""

    def __init__(self) -> None:
        self._writer = FrameWriter(EPOCH)
        self._lock = threading.Lock()
        self.failure: BmigrateError | None = None

    def send(self, type_: FrameType, **fields: Any) -> None:
        with self._lock:
            self._writer.encode(type_, **fields)

    def keep_alive(self) -> None:
        return

    def fail(self, error: BmigrateError) -> None:
        self.failure = error


class _Acks:
    def note(self, number: int) -> None:
        assert number >= 0


@dataclass
class Counts:
    """What a run did."""

    streams: int = 0
    sent: int = 0
    accepted: int = 0
    refused: int = 0


class Fuzzer:
    """One run.

    Args:
        directory: for the files. seed: of everything random.
    """

    def __init__(self, directory: Path, seed: int) -> None:
        self.random = random.Random(seed)
        self.counts = Counts()
        self._guard = self.random.randbytes(GUARD_BYTES)
        self._paths = [directory / name for name in ("first", "second", "outside")]
        for path in self._paths:
            path.write_bytes(bytes(LIMIT_BYTES) + self._guard)
        number = os.stat(self._paths[0]).st_rdev
        self._volumes = [StandbyVolume(path.stem, str(path), number, LIMIT_BYTES) for path in self._paths[:2]]
        self._buffer = memoryview(mmap.mmap(-1, frames.MAX_PAYLOAD_BYTES))
        self._packer = packing.Packer()
        self._unpacker = packing.Unpacker(memoryview(mmap.mmap(-1, frames.MAX_PAYLOAD_BYTES)))
        # Should a check be missing, the files must not fill the disk: a write beyond this fails, and is a finding.
        self._limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT_BYTES + GUARD_BYTES, self._limits[1]))
        self._peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def run(self, wanted: int, progress: Callable[[Counts], None] = lambda counts: None) -> Counts:
        """Send at least ``wanted`` frames.

        Raises:
            AssertionError: something that must hold does not; the message has the number of the stream.
        """
        while self.counts.sent < wanted:
            self._stream()
            if self.counts.streams % 1000 == 0:
                self.check()
                progress(self.counts)
        self.check()
        return self.counts

    def check(self) -> None:
        """The guards, the lengths, the memory."""
        where = f"after stream {self.counts.streams}"
        for path in self._paths:
            assert path.stat().st_size == LIMIT_BYTES + GUARD_BYTES, f"{path.name} has another length {where}"
            with open(path, "rb") as stream:
                stream.seek(LIMIT_BYTES)
                assert stream.read() == self._guard, f"{path.name} was written beyond its bounds {where}"
        assert not any(self._paths[2].read_bytes()[:LIMIT_BYTES]), f"a file of no volume was written {where}"
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - self._peak) * 1024
        assert grown <= MAX_GROWTH_BYTES, f"{grown} bytes more memory {where}"

    def close(self) -> None:
        """Close the files, and take the limit on their length back."""
        resource.setrlimit(resource.RLIMIT_FSIZE, self._limits)
        for volume in self._volumes:
            volume.close()

    # -- one stream --------------------------------------------------------------------------------

    def _stream(self) -> None:
        self.counts.streams += 1
        made = [self._frame() for _ in range(self.random.randint(1, 12))]
        self.counts.sent += len(made)
        writer = FrameWriter(EPOCH)
        raw = [b"".join(map(bytes, writer.encode(type_, **fields))) for type_, fields in made]
        for _ in range(self.random.choice((0, 1, 1, 2, 5))):
            at = self.random.randrange(len(raw))
            raw[at] = self._damaged(raw[at]) if len(raw[at]) >= frames.HEADER_BYTES else b""
        stream = b"".join(raw)
        if self.random.random() < 0.3:
            stream = self._cut(stream)
        self._take(stream)

    def _take(self, stream: bytes) -> None:
        reader = FrameReader(frames.FROM_SENDER, epoch=EPOCH, buffer=self._buffer)
        link: Any = _Link()
        acks: Any = _Acks()
        session: sessions.Writes
        if self.random.random() < 0.25:
            session = sessions.Member(link, self._volumes, self._unpacker)
        else:
            name = hashing.NAMES[self.counts.streams % len(hashing.NAMES)]
            session = sessions.Session(link, self._volumes, acks, lambda name: None, self._unpacker, name)
        session.begin()
        try:
            for frame in reader.feed(stream):
                session.handle(frame)
                self.counts.accepted += 1
            reader.filled(0)
        except FrameError:
            self.counts.refused += 1
            for _ in range(2):
                try:
                    list(reader.feed(stream))
                    raise AssertionError(f"a reader went on after an error, stream {self.counts.streams}")
                except FrameError:
                    continue
        except BmigrateError as error:
            assert error.reason != "io_error", f"a check let it through to the device: {error}, {self.counts.streams}"
            self.counts.refused += 1
        finally:
            session.end()
        assert link.failure is None, link.failure

    def _frame(self) -> tuple[FrameType, dict[str, Any]]:
        """A frame that is right, or right in shape and wrong in place."""
        pick = self.random
        type_ = pick.choice(sorted(frames.FROM_SENDER - {FrameType.HELLO, FrameType.BYE, FrameType.ERROR}))
        fields: dict[str, Any] = {
            "volume": pick.choice((0, 1, 1, 2, 65535)) if pick.random() < 0.1 else pick.randint(0, 1)
        }
        offset = pick.choice(EXTREMES[:-1]) if pick.random() < 0.1 else 512 * pick.randrange(LIMIT_BYTES // 512)
        if type_ is FrameType.DATA:
            fields.update(
                offset=offset, payload=pick.randbytes(512 * pick.choice((1, 1, 2, 8, 40)) - pick.choice((0, 0, 0, 1)))
            )
        elif type_ is FrameType.EXTENTS:
            table, end = [], 0
            for _ in range(pick.choice((1, 2, 5, 30))):
                start = end + 512 * pick.choice((0, 1, 7, 90))
                table.append((start, 512 * pick.choice((1, 2, 8))))
                end = sum(table[-1])
            data = pick.randbytes(sum(length for _, length in table))
            fields.update(aux=len(table), payload=data + frames.encode_extents(table))
        elif type_ is FrameType.PACKED:
            fields.update(self._packed())
        elif type_ is FrameType.ZERO:
            fields.update(offset=offset, aux=pick.choice((512, 4096, 65536, 1, (1 << 64) - 1 - offset)))
        elif type_ is FrameType.HASH:
            fields.update(
                offset=offset,
                aux=pick.choice((512, 4096, 1 << 16)),
                payload=frames.encode_chunk(1 << pick.randint(12, 20)),
            )
        elif type_ is FrameType.REREAD:
            fields.update(
                payload=frames.encode_extents([(offset, 512 * pick.randint(1, 8)) for _ in range(pick.randint(1, 9))])
            )
        else:
            fields.update(aux=pick.choice(EXTREMES[1:]))
        return type_, fields

    def _packed(self) -> dict[str, Any]:
        """Compressed extents: right, beyond the bounds, not extents at all, no zstd, or far longer than they look."""
        pick = self.random
        start, length = 512 * pick.randrange(2 * LIMIT_BYTES // 512), 512 * pick.choice((1, 8, 64))
        content = pick.randbytes(length // 2) + bytes(length - length // 2) + frames.encode_extents([(start, length)])
        kind = pick.random()
        if kind < 0.1:
            content = pick.randbytes(pick.randint(1, 600))
        elif kind < 0.12:
            content = bytes(frames.MAX_PAYLOAD_BYTES + pick.choice((-16, 0, 1, 1 << 20)))
        packed = self._packer.pack([content])
        if kind > 0.9:
            packed = pick.choice((packed[:-3], pick.randbytes(50), packed + packed, b"\0"))
        return {"aux": pick.choice((1, 1, 1, 2)), "payload": packed}

    def _damaged(self, raw: bytes) -> bytes:
        head = dict(
            zip(("magic", *_WIDTHS, "payload_crc32", "reserved", "header_crc32"), frames.HEADER.unpack(raw[:56]))
        )
        payload = raw[56:]
        pick = self.random
        what = pick.random()
        if what < 0.5:
            name = pick.choice(list(_WIDTHS))
            value = pick.choice(EXTREMES) if pick.random() < 0.6 else head[name] ^ (1 << pick.randrange(_WIDTHS[name]))
            head[name] = value & ((1 << _WIDTHS[name]) - 1)
        elif what < 0.8:
            payload = self._cut(payload) if payload else pick.randbytes(pick.choice((1, 512)))
            head["length"] = len(payload)
        elif what < 0.9:
            return self._cut(raw)
        else:
            at = pick.randrange(len(raw) * 8)
            broken = bytearray(raw)
            broken[at // 8] ^= 1 << at % 8
            return bytes(broken)
        if pick.random() < 0.9:
            head["payload_crc32"] = zlib.crc32(payload)
        packed = frames.HEADER.pack(*head.values())[:-4]
        right = pick.random() < 0.95
        return packed + (zlib.crc32(packed) ^ (not right)).to_bytes(4, "little") + payload

    def _cut(self, raw: bytes) -> bytes:
        """Bytes turned, lost, put in or repeated."""
        pick = self.random
        low, high = sorted((pick.randrange(len(raw) + 1), pick.randrange(len(raw) + 1)))
        high = min(high, low + 4096)
        return pick.choice(
            (
                raw[:low] + raw[high:],
                raw[:low],
                raw[:high] + raw[low:],
                raw[:low] + pick.randbytes(pick.choice((1, 16, 56, 512))) + raw[low:],
                raw[:low] + pick.randbytes(high - low) + raw[high:],
            )
        )
