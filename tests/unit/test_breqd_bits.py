# SPDX-License-Identifier: GPL-3.0-or-later
"""Ranges to bytes and masks and back, against plain Python sets."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from bmigrate.breqd import bits

SPACE = 3 * 8 * bits.LONG_BYTES
RANGES = st.lists(
    st.tuples(st.integers(0, SPACE), st.one_of(st.integers(0, 20), st.integers(0, SPACE))).map(
        lambda pair: (pair[0], min(SPACE, pair[0] + pair[1]))
    ),
    max_size=30,
)


def members(ranges: list[tuple[int, int]]) -> set[int]:
    """The naive model: every position of every range."""
    return {position for start, end in ranges for position in range(start, end)}


def as_set(packed: np.ndarray) -> set[int]:
    """Positions set in a packed map."""
    return {int(position) for position in np.flatnonzero(np.unpackbits(packed, bitorder="little"))}


@given(RANGES)
@settings(max_examples=300, deadline=None)
def test_exploded_ranges_cover_exactly_the_positions(ranges: list[tuple[int, int]]) -> None:
    exploded = bits.explode(np.array([a for a, _ in ranges]), np.array([b for _, b in ranges]))
    packed = np.zeros(SPACE // 8 + 1, dtype=np.uint8)
    packed[exploded.index] |= exploded.mask
    for first, last in exploded.slices:
        packed[first:last] = 0xFF
    assert as_set(packed) == members(ranges)
    assert np.all(np.diff(exploded.index) > 0), "a byte that comes twice would lose one of its masks"


@given(RANGES)
@settings(max_examples=200, deadline=None)
def test_runs_are_the_maximal_ranges(ranges: list[tuple[int, int]]) -> None:
    positions = np.array(sorted(members(ranges)), dtype=np.int64)
    starts, ends = bits.runs(positions)
    assert members(list(zip(starts.tolist(), ends.tolist()))) == set(positions.tolist())
    assert np.all(starts[1:] > ends[:-1]), "adjacent runs must be one"


@given(RANGES, RANGES, st.integers(0, SPACE), st.integers(1, 400))
@settings(max_examples=200, deadline=None)
def test_first_set_takes_the_lowest(
    dirty: list[tuple[int, int]], without: list[tuple[int, int]], start: int, limit: int
) -> None:
    maps = []
    for ranges in (dirty, without):
        packed = np.zeros(SPACE // 8, dtype=np.uint8)
        for position in members(ranges):
            packed[position // 8] |= 1 << (position % 8)
        maps.append(packed)
    expected = sorted(position for position in members(dirty) - members(without) if position >= start)[:limit]
    assert bits.first_set(maps[0], maps[1], start, SPACE, limit).tolist() == expected


def test_population_counts_large_maps_in_pieces() -> None:
    packed = np.zeros((1 << 20) + 17, dtype=np.uint8)
    packed[[0, (1 << 20) - 1, 1 << 20, -1]] = [1, 0x80, 0xFF, 0x11]
    assert bits.population(packed) == 1 + 1 + 8 + 2
