# SPDX-License-Identifier: GPL-3.0-or-later
"""Records to granules: nothing that was written is left out, nothing outside the volume is touched."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from bmigrate.breqd import records
from bmigrate.kernel import abi

VOLUMES = {3: (2048, 1000 * 4096 + 512, 4096, 0), 7: (0, 77 * 65536, 65536, 4096), 9: (63, 3584, 4096, 8192)}


def table() -> records.Slots:
    """Three attachments: a partition with a short tail, a whole disk, a volume shorter than a granule."""
    slots = records.Slots()
    for slot, (start, size, granule, base) in VOLUMES.items():
        slots.put(slot, start, size, granule, base)
    return slots


def batch(rows: list[tuple[int, int, int, int, int]]) -> np.ndarray:
    """Rows of (sector, nr_sectors, slot, op, flags) as the kernel lays them out."""
    return np.array(rows, dtype=records.RECORD)


SECTOR = st.integers(0, 12000) | st.integers(0, (1 << 64) - 1)
COUNT = st.integers(0, 4000) | st.sampled_from([abi.NR_SECTORS_BEYOND])
ROWS = st.lists(
    st.tuples(SECTOR, COUNT, st.sampled_from(sorted(VOLUMES)), st.integers(0, 5), st.integers(0, 3)), max_size=40
)


PLAIN = st.sampled_from(sorted(VOLUMES)).flatmap(
    lambda slot: st.lists(st.tuples(SECTOR, COUNT, st.just(slot), st.integers(0, 5), st.just(0)), max_size=40)
)


@given(ROWS | PLAIN)
@settings(max_examples=600, deadline=None)
def test_every_written_sector_of_the_volume_is_covered(rows: list[tuple[int, int, int, int, int]]) -> None:
    ranges = table().ranges(batch(rows))
    assert ranges.unknown == []
    failures = [False] * len(rows) if ranges.failed is None else ranges.failed
    for (sector, count, slot, _, flags), start, end, failed in zip(rows, ranges.starts, ranges.ends, failures):
        first, size, granule, base = VOLUMES[slot]
        low = max(sector - first, 0) * 512
        high = min((sector + count - first) * 512, size)
        assert failed == bool(flags & abi.FLAG_FAILED)
        if high <= low:
            assert start == end, "a record beside the volume marks nothing"
        else:
            assert (start, end) == (base + low // granule, base + -(-high // granule))
    assert ranges.records.sum() == len(rows)
    for slot, (first, size, _, _) in VOLUMES.items():
        discarded = sum(
            max(0, min(sector + count - first, -(-size // 512)) - max(sector - first, 0))
            for sector, count, owner, op, _ in rows
            if owner == slot and op in (abi.OP_DISCARD, abi.OP_SECURE_ERASE)
        )
        assert ranges.discarded_bytes[slot] == discarded * 512
        written = sum(
            max(0, min(sector + count - first, -(-size // 512)) - max(sector - first, 0))
            for sector, count, owner, _, _ in rows
            if owner == slot and sector < 1 << 62
        )
        assert ranges.written_bytes[slot] == written * 512


def test_the_operation_is_never_a_reason() -> None:
    for operation in range(256):
        ranges = table().ranges(batch([(2048, 8, 3, operation, 0)]))
        assert (ranges.starts.tolist(), ranges.ends.tolist()) == ([0], [1])


def test_a_record_of_nobody_is_reported_and_the_rest_is_kept() -> None:
    ranges = table().ranges(batch([(0, 8, 5, 1, 0), (2048, 8, 3, 1, 0), (0, 1, 60000, 1, 0)]))
    assert ranges.unknown == [5, 60000]
    assert (ranges.starts.tolist(), ranges.ends.tolist()) == ([0], [1])


def test_widened_bytes_are_counted_apart() -> None:
    ranges = table().ranges(batch([(0, 16, 7, 0, abi.FLAG_WIDENED), (64, 8, 7, 1, 0)]))
    assert ranges.written_bytes[7] == 24 * 512 and ranges.widened_bytes[7] == 16 * 512
