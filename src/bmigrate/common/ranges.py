# SPDX-License-Identifier: GPL-3.0-or-later
"""Pure arithmetic on byte ranges, given as (offset, length) pairs."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence

Range = tuple[int, int]


def merge(ranges: Iterable[Range]) -> list[Range]:
    """Sorted ranges without overlap or adjacency that cover the same bytes."""
    result: list[Range] = []
    for offset, length in sorted(ranges):
        if length <= 0:
            continue
        if result and offset <= result[-1][0] + result[-1][1]:
            last_offset, last_length = result[-1]
            result[-1] = (last_offset, max(last_length, offset + length - last_offset))
        else:
            result.append((offset, length))
    return result


def intersect(ranges: Iterable[Range], others: Sequence[Range]) -> list[Range]:
    """What of each range lies in the others.

    Args:
        others: merged. The cost is that of looking up each range in them.
    """
    result = []
    for offset, length in ranges:
        end = offset + length
        at = bisect_left(others, (offset,))
        if at and others[at - 1][0] + others[at - 1][1] > offset:
            at -= 1
        while at < len(others) and others[at][0] < end:
            start, stop = max(offset, others[at][0]), min(end, others[at][0] + others[at][1])
            if start < stop:
                result.append((start, stop - start))
            at += 1
    return result


def subtract(ranges: Iterable[Range], others: Sequence[Range]) -> list[Range]:
    """What of each range lies in none of the others, which are merged."""
    result = []
    for offset, length in ranges:
        at = offset
        for start, size in intersect([(offset, length)], others):
            if start > at:
                result.append((at, start - at))
            at = start + size
        if at < offset + length:
            result.append((at, offset + length - at))
    return result


def widen(ranges: Iterable[Range], unit: int) -> list[Range]:
    """Merged ranges of whole units that cover these."""
    return merge(
        (offset // unit * unit, -(-(offset + length) // unit) * unit - offset // unit * unit)
        for offset, length in ranges
        if length > 0
    )


def pieces(offset: int, length: int, largest: int) -> Iterator[Range]:
    """Cut one range into pieces of at most ``largest`` bytes."""
    end = offset + length
    while offset < end:
        step = min(largest, end - offset)
        yield offset, step
        offset += step


def total(ranges: Iterable[Range]) -> int:
    """Sum of the lengths in bytes (ranges must not overlap to mean distinct bytes)."""
    return sum(length for _, length in ranges)
