# SPDX-License-Identifier: GPL-3.0-or-later
"""Telling zeroes from data in what was read: pure, and fast enough to run on every byte.

Promises: the parts that come out cover the input exactly, in order, without overlap; a part
called zero holds zeroes only. It must never call data zero; the other way round only costs.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterator
from typing import NamedTuple, Union

UNIT = 4096
MIN_RUN_UNITS = 4
"""A shorter run of zeroes inside data is sent as data: two more frames would cost as much."""
_ZEROES = bytes(UNIT)
_HEAD = "Q4088x"
_GROUP_UNITS = 256
Buffer = Union[bytes, bytearray, memoryview]


class Part(NamedTuple):
    """A part of a buffer: offset and length in bytes, and whether it is all zeroes."""

    offset: int
    length: int
    zero: bool


def is_zero(data: Buffer) -> bool:
    """Whether the bytes are all zero."""
    return not len(data) or all(_flags(memoryview(data)))


def split(data: Buffer) -> list[Part]:
    """Cut a buffer into zero and data parts; the boundaries lie on multiples of UNIT. Nothing is copied of data."""
    if not len(data):
        return []
    flags = _flags(memoryview(data))
    if True not in flags:
        return [Part(0, len(data), False)]
    return list(_join(_runs(flags, len(data)), len(data)))


@functools.cache
def _heads(units: int) -> struct.Struct:
    return struct.Struct("<" + _HEAD * units)


def _flags(view: memoryview) -> list[bool]:
    """Of each unit, the last may be short: whether it is all zero. Only units that begin with zeroes are looked at."""
    flags: list[bool] = []
    whole = len(view) // UNIT
    for first in range(0, whole, _GROUP_UNITS):
        units = min(_GROUP_UNITS, whole - first)
        heads = _heads(units).unpack_from(view, first * UNIT)
        if 0 not in heads:
            flags += [False] * units
            continue
        for number, head in enumerate(heads, first):
            flags.append(not head and bytes(view[number * UNIT : (number + 1) * UNIT]) == _ZEROES)
    if len(view) > whole * UNIT:
        tail = bytes(view[whole * UNIT :])
        flags.append(tail == _ZEROES[: len(tail)])
    return flags


def _runs(flags: list[bool], length: int) -> Iterator[Part]:
    """Maximal runs of zero units and of other units, alternating."""
    start = 0
    for number in range(1, len(flags)):
        if flags[number] != flags[number - 1]:
            yield Part(start * UNIT, (number - start) * UNIT, flags[start])
            start = number
    yield Part(start * UNIT, length - start * UNIT, flags[start])


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
