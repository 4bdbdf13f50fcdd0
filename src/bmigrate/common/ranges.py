# SPDX-License-Identifier: GPL-3.0-or-later
"""Pure arithmetic on byte ranges, given as (offset, length) pairs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

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
