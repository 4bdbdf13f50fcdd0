# SPDX-License-Identifier: GPL-3.0-or-later
"""Compression of extents on the wire: one zstd frame (RFC 8878) per PACKED frame, and when it is worth while.

Promises: unpacking writes only into the buffer that it is given, never asks for memory by a number from the wire
(window of at most MAX_WINDOW_BYTES), and says so when the content is longer than the buffer or damaged. The library is
python3-zstandard; a host without it neither offers nor accepts compression.

``Choice`` is pure. It compares what a byte costs both ways, in seconds of the sending thread, and goes the cheaper way.
The other way is looked at again after pauses that grow when it loses, and a look ends at once when compressing alone
takes longer than sending plainly does: on a fast link it costs next to nothing to know that it does not pay.
"""

from __future__ import annotations

from typing import Any

from bmigrate.wire.frames import Buffer, FrameError

LEVEL = 1
MAX_WINDOW_BYTES = 8 << 20
NAME = "zstd"
STRETCH_BYTES = 16 << 20
"""One way is gone for so long before it is judged: several times what pipes and sockets take in."""
LOOK_BYTES = 4 << 20
GLANCE_BYTES = 1 << 20
HOPELESS = 1.3
"""What has cost so many times more than the other way after a glance will not become cheaper: pipes take in the first
bytes for nothing, so the beginning looks better than what follows."""
WORTH = 0.9
"""Compressed must cost so much of plain at most. Where the link is the limit both cost the sending thread the same,
which waits; then compressing only takes processor time from whoever encrypts, and luck must not decide for it."""
SHORTEST_PAUSE = 4
LONGEST_PAUSE = 256


class UnpackError(FrameError):
    """What a PACKED frame carries is not what it must be."""

    reason = "bad_payload"


def available() -> bool:
    """Whether this host has the library."""
    try:
        import zstandard
    except ImportError:
        return False
    return bool(zstandard)


class Packer:
    """Compresses the buffers of an EXTENTS payload into one."""

    def __init__(self) -> None:
        import zstandard

        self._compressor: Any = zstandard.ZstdCompressor(level=LEVEL, write_content_size=False)

    def pack(self, buffers: list[Buffer]) -> bytes:
        """One zstd frame of the buffers in their order."""
        engine = self._compressor.compressobj()
        parts = [engine.compress(buffer) for buffer in buffers]
        parts.append(engine.flush())
        return b"".join(parts)


class Unpacker:
    """Takes zstd frames apart, into one buffer that is used again."""

    def __init__(self, buffer: memoryview) -> None:
        import zstandard

        self._error = zstandard.ZstdError
        self._buffer = buffer
        self._decompressor: Any = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)

    def unpack(self, payload: memoryview) -> memoryview:
        """The content, in the buffer; valid until the next call.

        Raises:
            UnpackError: damaged, not one whole frame, or longer than the buffer.
        """
        have = 0
        try:
            reader = self._decompressor.stream_reader(payload, read_across_frames=False)
            while have < len(self._buffer):
                count = reader.readinto(self._buffer[have:])
                if not count:
                    return self._buffer[:have]
                have += count
            if reader.read(1):
                raise UnpackError(f"PACKED frame with more than {len(self._buffer)} bytes of content")
        except self._error as error:
            raise UnpackError(f"PACKED frame that is not zstd: {error}") from None
        return self._buffer[:have]


class Choice:
    """Whether to compress the next extents. Bytes and seconds are passed in.

    Attributes:
        packing: the present answer.
    """

    def __init__(self) -> None:
        self.packing = False
        self._cost: dict[bool, float | None] = {False: None, True: None}
        self._bytes = 0
        self._seconds = 0.0
        self._looking = False
        self._pause = 1
        self._stretches = 0

    def spent(self, count: int, packing_seconds: float, seconds: float) -> None:
        """Extents of ``count`` bytes, before compression, went out in ``seconds``, ``packing_seconds`` among them."""
        self._bytes += count
        self._seconds += seconds
        best = self._cost[not self.packing]
        if self._looking and best is not None:
            hopeless = self._bytes >= GLANCE_BYTES and self._seconds > HOPELESS * best * self._bytes
            if hopeless or (self.packing and packing_seconds > best * count):
                self._ends(lost=True)
                return
        if self._bytes < (LOOK_BYTES if self._looking or best is None else STRETCH_BYTES):
            return
        cost = self._seconds / self._bytes
        old = self._cost[self.packing]
        self._cost[self.packing] = cost if old is None or self._looking else old + (cost - old) * 0.3
        if self._looking:
            assert best is not None
            self._ends(lost=cost >= WORTH * best if self.packing else WORTH * cost >= best)
            return
        self._bytes, self._seconds = 0, 0.0
        self._stretches += 1
        if self._stretches >= self._pause:
            self._looking, self.packing = True, not self.packing

    def _ends(self, lost: bool) -> None:
        self._bytes, self._seconds, self._stretches, self._looking = 0, 0.0, 0, False
        if lost:
            self.packing = not self.packing
            self._pause = min(LONGEST_PAUSE, max(SHORTEST_PAUSE, self._pause * 4))
        else:
            self._pause = SHORTEST_PAUSE
