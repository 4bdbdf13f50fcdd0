# SPDX-License-Identifier: GPL-3.0-or-later
"""Records of the kernel's log become ranges of granules, a whole batch at a time.

Pure. The operation in a record is counted and never heeded: what to ship is decided by reading the device
(records of different CPUs are unordered, a discard and a write may arrive reversed). A range is
widened to whole granules and clipped to the volume; a record of a slot that nobody owns is
reported, never dropped silently.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from bmigrate.breqd.bits import Positions
from bmigrate.kernel import abi

SECTOR = 512
RECORD = np.dtype(abi.RECORD_FIELDS)
_FAR = np.uint64(1 << 62)
_LOW = np.uint64(0xFFFFFFFF)
_WORDS = np.dtype([("sector", "<u8"), ("meta", "<u8")])


def _is_discard(op: Any) -> Any:
    return (op == abi.OP_DISCARD) | (op == abi.OP_SECURE_ERASE)


class Ranges(NamedTuple):
    """A batch as ranges of the concatenated space, and what it adds to the statistics of each slot."""

    starts: Positions
    ends: Positions
    #: boolean array, or None when no write of the batch failed
    failed: Any
    records: Positions
    written_bytes: Positions
    widened_bytes: Positions
    discarded_bytes: Positions
    unknown: list[int]


class Slots:
    """Which attachment's records belong where: start, size and place of its volume, by slot number."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget all slots."""
        self._known: Any = np.zeros(abi.MAX_SLOTS, dtype=bool)
        self._start: Positions = np.zeros(abi.MAX_SLOTS, dtype=np.int64)
        self._sectors: Positions = np.zeros(abi.MAX_SLOTS, dtype=np.int64)
        self._shift: Positions = np.zeros(abi.MAX_SLOTS, dtype=np.int64)
        self._base: Positions = np.zeros(abi.MAX_SLOTS, dtype=np.int64)

    def put(self, slot: int, start_sector: int, size_bytes: int, granule_bytes: int, base: int) -> None:
        """Say what a slot is.

        Args:
            start_sector: of the volume on its whole disk, 512 bytes.
            size_bytes: of the volume.
            granule_bytes: a power of two, at least 512.
            base: first granule of the volume in the concatenated space.
        """
        self._known[slot] = True
        self._start[slot] = start_sector
        self._sectors[slot] = -(-size_bytes // SECTOR)
        self._shift[slot] = (granule_bytes // SECTOR).bit_length() - 1
        self._base[slot] = base

    def ranges(self, records: Any) -> Ranges:
        """Translate a batch.

        Args:
            records: structured array of RECORD.
        """
        quick = self._one_slot(records)
        if quick is not None:
            return quick
        slot = records["slot"].astype(np.int64)
        known = slot < abi.MAX_SLOTS
        known[known] = self._known[slot[known]]
        unknown: list[int] = []
        if not bool(known.all()):
            unknown = [int(number) for number in np.unique(slot[~known])]
            records, slot = records[known], slot[known]
        sectors = self._sectors[slot]
        # A position may be anything (passthrough requests): clip before any arithmetic can wrap.
        begin = np.minimum(records["sector"], _FAR).astype(np.int64) - self._start[slot]
        end = begin + records["nr_sectors"].astype(np.int64)
        begin, end = np.clip(begin, 0, sectors), np.clip(end, 0, sectors)
        shift, base = self._shift[slot], self._base[slot]
        size = np.maximum(end - begin, 0) * SECTOR
        starts = (begin >> shift) + base
        # Round the end up, or the part of a granule behind the last whole one would stay clean;
        # but an empty range must stay empty and mark nothing.
        ends = np.where(size > 0, ((end + (np.int64(1) << shift) - 1) >> shift) + base, starts)
        flags = records["flags"]
        widened = (flags & abi.FLAG_WIDENED) != 0
        discard = _is_discard(records["op"])
        count = abi.MAX_SLOTS
        return Ranges(
            starts,
            ends,
            (flags & abi.FLAG_FAILED) != 0 if bool((flags & abi.FLAG_FAILED).any()) else None,
            np.bincount(slot, minlength=count),
            np.bincount(slot, weights=size, minlength=count).astype(np.int64),
            np.bincount(slot[widened], weights=size[widened], minlength=count).astype(np.int64),
            np.bincount(slot[discard], weights=size[discard], minlength=count).astype(np.int64),
            unknown,
        )

    def _one_slot(self, records: Any) -> Ranges | None:
        """The same for a batch of one known slot, none of it failed or widened: the usual case, in whole-array steps.

        A record is read as two numbers of 64 bits; see abi.RECORD_FIELDS.
        """
        if not len(records):
            return None
        words = np.ascontiguousarray(records).view(_WORDS)
        meta = words["meta"]
        together = int(np.bitwise_or.reduce(meta))
        slot = (int(meta[0]) >> 32) & 0xFFFF
        if (
            together >> 56
            or (together >> 32) & 0xFFFF != slot
            or int(np.bitwise_and.reduce(meta)) >> 32 & 0xFFFF != slot
        ):
            return None
        if slot >= abi.MAX_SLOTS or not self._known[slot]:
            return None
        limit, shift, base = int(self._sectors[slot]), int(self._shift[slot]), int(self._base[slot])
        begin = np.minimum(words["sector"], _FAR).view(np.int64) - int(self._start[slot])
        end = begin + (meta & _LOW).view(np.int64)
        if int(begin.min()) < 0 or int(end.max()) > limit:
            np.clip(begin, 0, limit, out=begin)
            np.clip(end, 0, limit, out=end)
        sizes = end - begin
        empty = int(sizes.min()) <= 0
        if empty:
            np.maximum(sizes, 0, out=sizes)
        begin >>= shift
        begin += base
        end += (1 << shift) - 1
        end >>= shift
        end += base
        if empty:
            end = np.where(sizes > 0, end, begin)
        counts = np.zeros((4, abi.MAX_SLOTS), dtype=np.int64)
        counts[0, slot], counts[1, slot] = len(records), int(sizes.sum()) * SECTOR
        if (together >> 48) & 0xFF > abi.OP_WRITE:
            counts[3, slot] = int(sizes[_is_discard(records["op"])].sum()) * SECTOR
        return Ranges(begin, end, None, counts[0], counts[1], counts[2], counts[3], [])
