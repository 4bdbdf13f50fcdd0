# SPDX-License-Identifier: GPL-3.0-or-later
"""Telling zeroes from data in what was read: pure, and fast enough to run on every byte.

Promises: the parts that come out cover the input exactly, in order, without overlap; a part
called zero holds zeroes only. It must never call data zero; the other way round only costs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

UNIT = 4096
MIN_RUN_UNITS = 4
"""A shorter run of zeroes inside data is sent as data: two more frames would cost as much."""
_ZEROES = bytes(UNIT)
_MANY = bytes(1 << 20)


class Part(NamedTuple):
    """A part of a buffer: offset and length in bytes, and whether it is all zeroes."""

    offset: int
    length: int
    zero: bool


def is_zero(data: bytes) -> bool:
    """Whether the bytes are all zero."""
    for start in range(0, len(data), len(_MANY)):
        length = min(len(_MANY), len(data) - start)
        if not data.startswith(_MANY if length == len(_MANY) else _MANY[:length], start):
            return False
    return True


def split(data: bytes) -> list[Part]:
    """Cut a buffer into zero and data parts; the boundaries lie on multiples of UNIT."""
    if not data:
        return []
    if is_zero(data):
        return [Part(0, len(data), True)]
    return list(_join(_runs(data), len(data)))


def _runs(data: bytes) -> Iterator[Part]:
    """Maximal runs of zero units and of other units, alternating."""
    start, zero = 0, None
    for offset in range(0, len(data), UNIT):
        length = min(UNIT, len(data) - offset)
        this = data.startswith(_ZEROES if length == UNIT else _ZEROES[:length], offset)
        if zero is None:
            zero = this
        elif this != zero:
            yield Part(start, offset - start, zero)
            start, zero = offset, this
    yield Part(start, len(data) - start, bool(zero))


def _join(runs: Iterator[Part], total: int) -> Iterator[Part]:
    """Turn short zero runs into data (not at the very ends, where they may continue in a neighbour) and merge."""
    begin, length = 0, 0
    for run in runs:
        inside = run.offset > 0 and run.offset + run.length < total
        if run.zero and not (inside and run.length < MIN_RUN_UNITS * UNIT):
            if length:
                yield Part(begin, length, False)
                length = 0
            yield run
        else:
            if not length:
                begin = run.offset
            length += run.length
    if length:
        yield Part(begin, length, False)
