# SPDX-License-Identifier: GPL-3.0-or-later
"""What was sent in a drain, with a digest of each piece: pure bookkeeping, for any thread.

Promises: the pieces kept never overlap, and each holds the digest of the bytes that were sent
*last* for all of its range. Where a newer piece covers only part of an older one, the older is
dropped and what it alone covered is returned, so that the caller ships it again: a digest cannot
be cut in two, and a range that is simply forgotten would go unproved.
"""

from __future__ import annotations

import bisect
import hashlib
import threading
from collections.abc import Iterator

Extent = tuple[int, int]
DIGEST_BYTES = 32


def piece_digest(data: bytes | memoryview) -> bytes:
    """BLAKE2b-256 of one piece."""
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()


class Ledger:
    """The pieces of one drain, by volume."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._starts: dict[str, list[int]] = {}
        self._pieces: dict[str, dict[int, tuple[int, bytes]]] = {}

    def add(self, volume: str, offset: int, length: int, digest: bytes) -> list[Extent]:
        """Note a piece that was sent.

        Returns: (offset, length) ranges of older pieces that lost their digest and must be sent again.
        """
        with self._lock:
            return self._add(volume, offset, length, digest)

    def _add(self, volume: str, offset: int, length: int, digest: bytes) -> list[Extent]:
        starts = self._starts.setdefault(volume, [])
        pieces = self._pieces.setdefault(volume, {})
        end = offset + length
        orphans: list[Extent] = []
        index = bisect.bisect_left(starts, offset)
        if index and starts[index - 1] + pieces[starts[index - 1]][0] > offset:
            index -= 1
        while index < len(starts) and starts[index] < end:
            old_offset = starts.pop(index)
            old_end = old_offset + pieces.pop(old_offset)[0]
            if old_offset < offset:
                orphans.append((old_offset, offset - old_offset))
            if old_end > end:
                orphans.append((end, old_end - end))
        bisect.insort(starts, offset)
        pieces[offset] = (length, digest)
        return orphans

    def pieces(self, volume: str) -> list[tuple[int, int, bytes]]:
        """(offset, length, digest) of a volume, ascending."""
        return [(start, *self._pieces[volume][start]) for start in self._starts.get(volume, [])]

    def volumes(self) -> list[str]:
        """Names of the volumes that have pieces, sorted."""
        return sorted(name for name, starts in self._starts.items() if starts)

    def batches(self, volume: str, max_bytes: int, max_pieces: int) -> Iterator[list[tuple[int, int, bytes]]]:
        """The pieces in groups of bounded size; one piece may not be larger than ``max_bytes``."""
        group: list[tuple[int, int, bytes]] = []
        size = 0
        for piece in self.pieces(volume):
            if group and (size + piece[1] > max_bytes or len(group) >= max_pieces):
                yield group
                group, size = [], 0
            group.append(piece)
            size += piece[1]
        if group:
            yield group

    def total_bytes(self) -> int:
        """Distinct bytes covered."""
        return sum(length for pieces in self._pieces.values() for length, _ in pieces.values())

    def digest(self) -> str:
        """One digest over (volume, offset, length, digest) of all pieces, sorted; hexadecimal."""
        whole = hashlib.blake2b(digest_size=DIGEST_BYTES)
        for volume in self.volumes():
            name = volume.encode()
            for offset, length, digest in self.pieces(volume):
                whole.update(len(name).to_bytes(1, "little") + name)
                whole.update(offset.to_bytes(8, "little") + length.to_bytes(8, "little") + digest)
        return whole.hexdigest()
