# SPDX-License-Identifier: GPL-3.0-or-later
"""Which blocks a verify calls different: as if each block had its own votes, in a bounded amount of memory."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bmigrate.common import ranges
from bmigrate.ship import verify
from bmigrate.ship.pacer import Pacer

GRANULE = 4096
BLOCKS = 8
SIZE = BLOCKS * GRANULE - 512
Extent = tuple[int, int]
Blocks = set[int]


def _extents(blocks: Blocks) -> list[Extent]:
    return ranges.merge((at * GRANULE, min(GRANULE, SIZE - at * GRANULE)) for at in blocks)


def _verify(looks: list[Blocks], passes: list[Blocks], room: int) -> verify.Outcome:
    """Verify a volume that differs in these blocks each time it is looked at, and where each pass finds these dirty."""
    volume = SimpleNamespace(name="data", granule_bytes=GRANULE, size_bytes=SIZE, writes_in_flight=lambda: 0)
    session: Any = SimpleNamespace(volumes=[volume], settle=lambda: None, barrier=lambda: None)
    differing, dirty = iter(looks), iter(passes)

    def compare(*arguments: Any) -> verify._Found:
        extents, progress, room = arguments[3], arguments[5], arguments[6]
        found = verify._Found(room)
        for offset, length in ranges.intersect(_extents(next(differing)), extents):
            for start, size in ranges.pieces(offset, length, GRANULE):
                found.add(start, size)
        progress(ranges.total(extents))
        return found.finish()

    def run_pass(*_: Any, observer: Callable[[str, list[Extent]], None]) -> Any:
        observer("data", _extents(next(dirty)))
        return SimpleNamespace(complete=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "_compare", compare)
        patch.setattr(verify, "run_pass", run_pass)
        patch.setattr(verify, "MAX_EXTENTS", room)
        patch.setattr(verify, "LATE_SECONDS", 0.0)
        return verify.verify(session, Pacer(0), lambda: False, lambda count: None)


def _by_block(looks: list[Blocks], passes: list[Blocks]) -> tuple[Blocks, Blocks, int]:
    """The rule, with a vote for each block: those proved to differ, those that never stood still, and the rounds."""
    candidates, votes, rounds = looks[0], dict.fromkeys(range(BLOCKS), 0), 0
    while candidates and rounds < verify.MAX_ROUNDS:
        rounds += 1
        candidates = candidates & looks[rounds]
        for block in candidates:
            votes[block] = 0 if block in passes[rounds - 1] else votes[block] + 1
        if all(votes[block] >= verify.ROUNDS for block in candidates):
            break
    proved = {block for block in candidates if votes[block] >= verify.ROUNDS}
    return proved, candidates - proved, rounds


BLOCK = st.integers(0, BLOCKS - 1)
EQUAL = st.dictionaries(st.integers(0, 12), st.sets(BLOCK, max_size=3), max_size=3)
LOOKS = EQUAL.map(lambda equal: [set(range(BLOCKS)) - equal.get(look, set()) for look in range(13)])
"""What is equal once is no candidate any more, so most looks find all of it different."""
PASSES = st.lists(st.sets(st.integers(0, 2), min_size=1, max_size=2), min_size=12, max_size=12)
"""The same few blocks again and again, or every block has its votes before one is written."""


@settings(deadline=None)
@given(LOOKS, PASSES)
def test_extents_vote_like_blocks(looks: list[Blocks], passes: list[Blocks]) -> None:
    """Three rounds in a row without an explanation, for each block of its own."""
    outcome = _verify(looks, passes, 1000)
    proved, busy, rounds = _by_block(looks, passes)
    assert outcome.different.get("data", []) == _extents(proved)
    assert outcome.busy_bytes == ranges.total(_extents(busy))
    assert (outcome.rounds, outcome.complete, outcome.compared_bytes) == (rounds, True, SIZE)


@settings(deadline=None)
@given(LOOKS, PASSES, st.integers(1, 3))
def test_without_room_some_is_missing_and_nothing_is_invented(
    looks: list[Blocks], passes: list[Blocks], room: int
) -> None:
    """And it says so: a verify that calls itself complete has found everything."""
    outcome = _verify(looks, passes, room)
    proved, _, _ = _by_block(looks, passes)
    found = outcome.different.get("data", [])
    assert len(found) <= room
    if outcome.complete:
        assert found == _extents(proved)
    assert ranges.subtract(found, _extents(set.intersection(*looks[:4]))) == [], "reported, and equal in a round"


def test_a_wholly_different_volume_is_one_extent() -> None:
    """In whatever order its pieces come out of the comparison."""
    found = verify._Found(16)
    for number in range(1 << 14):
        found.add((number ^ 3) * GRANULE, GRANULE)
        assert len(found.extents) <= 2 * 16
    assert found.finish().extents == [(0, GRANULE << 14)] and found.complete


def test_scattered_differences_take_no_more_room_than_there_is() -> None:
    """Every other block of a terabyte would be 134 million of them."""
    found = verify._Found(16)
    for number in range(1 << 10):
        found.add(2 * number * GRANULE, GRANULE)
        if found.full():
            break
    assert number < 32, "it goes on looking for what it cannot keep"
    assert len(found.finish().extents) == 16 and not found.complete


def test_what_is_written_meanwhile_takes_no_more_room_either(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then more counts as written than was: such a block is asked for again, and never called different for it."""
    monkeypatch.setattr(verify, "MAX_EXTENTS", 16)
    written = [(2 * number * GRANULE, GRANULE) for number in range(1 << 14)]
    coarse = verify._coarse(written)
    assert len(coarse) <= 16 and ranges.subtract(written, coarse) == []
