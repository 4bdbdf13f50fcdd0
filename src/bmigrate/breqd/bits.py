# SPDX-License-Identifier: GPL-3.0-or-later
"""Packed bits, little bit order: arrays of ranges become bytes and masks, and back.

Pure and vectorised: no loop over records. A batch of many single-block writes costs a sort; a
range of gigabytes costs one slice. Positions are granules (bits), half-open, int64. Nothing here
knows what a bit means.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

Bits = Any  #: uint8 array, eight granules in a byte, the lowest granule in the lowest bit
Positions = Any  #: int64 array

#: A range with at least that many whole bytes inside is handled as a slice, not byte by byte.
LONG_BYTES = 256

_POPULATION = np.array([bin(value).count("1") for value in range(256)], dtype=np.uint8)
_PIECE = 1 << 20


class Exploded(NamedTuple):
    """Ranges as bytes: ``index`` ascending and unique with a ``mask`` each, and whole-byte slices.

    The two may overlap: apply one after the other.
    """

    index: Positions
    mask: Bits
    slices: list[tuple[int, int]]


def population(values: Bits) -> int:
    """Number of bits set; in pieces, so that a large map needs no large temporary."""
    return sum(
        int(_POPULATION[values[start : start + _PIECE]].sum(dtype=np.int64)) for start in range(0, len(values), _PIECE)
    )


def population_of_each(values: Bits) -> Bits:
    """Number of bits set in each byte, as bytes."""
    return _POPULATION[values]


def population_each(values: Bits) -> Positions:
    """Number of bits set in each byte."""
    return _POPULATION[values].astype(np.int64)


def join(index: Positions, mask: Bits) -> tuple[Positions, Bits]:
    """Sort by byte and OR the masks of equal bytes."""
    if len(index) < 2:
        return index, mask
    if not bool((index[1:] > index[:-1]).all()):
        order = np.argsort(index, kind="stable")
        index, mask = index[order], mask[order]
        first = np.flatnonzero(np.concatenate(([True], index[1:] != index[:-1])))
        if len(first) != len(index):
            mask = np.bitwise_or.reduceat(mask, first)
            index = index[first]
    return index, mask


def _merge_slices(first: Positions, last: Positions) -> list[tuple[int, int]]:
    """Sorted disjoint (first, last) byte slices covering the same bytes."""
    order = np.argsort(first, kind="stable")
    first, reach = first[order], np.maximum.accumulate(last[order])
    starts = np.flatnonzero(np.concatenate(([True], first[1:] > reach[:-1])))
    ends = np.concatenate((starts[1:] - 1, [len(first) - 1]))
    return [(int(a), int(b)) for a, b in zip(first[starts], reach[ends])]


def explode(starts: Positions, ends: Positions) -> Exploded:
    """Turn ranges into bytes with masks.

    Args:
        starts, ends: half-open ranges in granules, in any order, overlapping or not; empty ones
            (end <= start) are ignored.
    """
    starts = np.asarray(starts, dtype=np.int64)
    ends = np.asarray(ends, dtype=np.int64)
    keep = ends > starts
    if not bool(keep.all()):
        starts, ends = starts[keep], ends[keep]
    if not len(starts):
        return Exploded(starts, np.zeros(0, dtype=np.uint8), [])
    first, last = starts >> 3, (ends - 1) >> 3
    head = ((0xFF << (starts & 7)) & 0xFF).astype(np.uint8)
    tail = (0xFF >> (7 - ((ends - 1) & 7))).astype(np.uint8)
    several = last > first
    if not bool(several.any()):
        return Exploded(*join(first, head & tail), [])
    index = [first, last[several]]
    mask = [np.where(several, head, head & tail), tail[several]]
    inner = last - first - 1
    slices: list[tuple[int, int]] = []
    is_long = inner >= LONG_BYTES
    if bool(is_long.any()):
        slices = _merge_slices(first[is_long] + 1, last[is_long])
    short = (inner > 0) & ~is_long
    if bool(short.any()):
        counts = inner[short]
        begin = np.cumsum(counts) - counts
        index.append(np.repeat(first[short] + 1 - begin, counts) + np.arange(int(counts.sum()), dtype=np.int64))
        mask.append(np.full(len(index[-1]), 0xFF, dtype=np.uint8))
    return Exploded(*join(np.concatenate(index), np.concatenate(mask)), slices)


def runs(positions: Positions) -> tuple[Positions, Positions]:
    """Ascending unique positions as maximal half-open ranges (starts, ends)."""
    if not len(positions):
        return positions, positions
    breaks = np.flatnonzero(np.diff(positions) != 1)
    starts = positions[np.concatenate(([0], breaks + 1))]
    ends = positions[np.concatenate((breaks, [len(positions) - 1]))] + 1
    return starts, ends


def first_set(dirty: Bits, without: Bits, start: int, stop: int, limit: int) -> Positions:
    """The first ``limit`` positions in [start, stop) set in ``dirty`` and not in ``without``, ascending.

    Looks at growing pieces, so that both a full and an empty map of a large volume are cheap.
    """
    found: list[Positions] = []
    have, piece = 0, 4096
    byte, last = start >> 3, (stop + 7) >> 3
    while byte < last and have < limit:
        end = min(byte + piece, last)
        available = dirty[byte:end] & ~without[byte:end]
        where = np.flatnonzero(available)[: limit - have + 1]
        if len(where):
            expanded = np.unpackbits(available[where].reshape(-1, 1), axis=1, bitorder="little")
            row, bit = np.nonzero(expanded)
            positions = (byte + where[row]) * 8 + bit
            positions = positions[(positions >= start) & (positions < stop)][: limit - have]
            found.append(positions)
            have += len(positions)
        byte, piece = end, min(piece * 2, _PIECE)
    return np.concatenate(found).astype(np.int64) if found else np.zeros(0, dtype=np.int64)
