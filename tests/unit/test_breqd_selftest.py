# SPDX-License-Identifier: GPL-3.0-or-later
"""The self test's judgement: never blind when all is recorded, always blind when it is not."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bmigrate.breqd.selftest import RESTLESS_SECONDS, Sample, Witness
from bmigrate.breqd.tracker import Tracker
from bmigrate.common.errors import SuspectError


class World:
    """A device whose writes have a begin, a record, and a moment at which they are counted.

    Args:
        counts_at_begin: as dm and md do. loses: share of the writes that are not recorded.
    """

    def __init__(self, seed: int, counts_at_begin: bool, loses: float) -> None:
        self.random = random.Random(seed)
        self.counts_at_begin, self.loses = counts_at_begin, loses
        self.clock = 0.0
        self.writes: list[tuple[float, float, float, int, bool]] = []

    def write(self, lasts: float, gap: float) -> None:
        """One write of some sectors that begins now."""
        end = self.clock + lasts
        # Recorded a moment before the submitter is told; counted around it, or at the begin.
        counted = self.clock if self.counts_at_begin else end + gap
        self.writes.append((self.clock, end, counted, self.random.randint(1, 64), self.random.random() >= self.loses))

    def sample(self) -> Sample:
        """Read in the order that the product reads in; time goes on between the readings."""
        written = sum(size for _, _, counted, size, _ in self.writes if counted <= self.clock)
        self.clock += 0.001
        in_flight = sum(1 for begin, end, *_ in self.writes if begin <= self.clock < end)
        self.clock += 0.001
        recorded = sum(size for _, end, _, size, seen in self.writes if seen and end <= self.clock)
        return Sample(written, in_flight, recorded, self.clock)


steps = st.lists(
    st.tuples(st.integers(0, 6), st.floats(0.0, 8.0), st.floats(0.0, 0.5), st.floats(1.0, 5.0)), min_size=1, max_size=40
)


@given(st.integers(0, 2**32), st.booleans(), steps)
def test_a_tracker_that_records_all_is_never_blind_nor_doubted(seed, counts_at_begin, plan):  # type: ignore[no-untyped-def]
    world = World(seed, counts_at_begin, 0.0)
    witness = Witness(at_completion=not counts_at_begin, certain=not counts_at_begin)
    for count, lasts, gap, pause in plan:
        for _ in range(count):
            world.write(lasts, gap)
        world.clock += pause
        witness.take(world.sample())
        assert not witness.blind and not witness.doubt


@given(st.integers(0, 2**32), st.booleans(), st.floats(0.3, 1.0))
def test_a_tracker_that_loses_writes_is_called_blind(seed, counts_at_begin, loses):  # type: ignore[no-untyped-def]
    world = World(seed, counts_at_begin, loses)
    witness = Witness(at_completion=not counts_at_begin)
    for _ in range(3):
        witness.take(world.sample())
        world.clock += 1
    for _ in range(40):
        for _ in range(50):
            world.write(0.5, 0.001)
        world.clock += 1
        witness.take(world.sample())
    assert witness.state == "blind" and "not recorded" in witness.blind


def test_nothing_written_proves_nothing() -> None:
    witness = Witness(True)
    for second in range(5):
        witness.take(Sample(70, 0, 12, float(second)))
    assert witness.state == "unproven" and witness.describe(9.0)["proven_age_seconds"] is None


def test_what_all_was_recorded_is_proven() -> None:
    witness = Witness(True)
    for second, (written, recorded) in enumerate([(70, 0), (70, 0), (78, 8)]):
        witness.take(Sample(written, 0, recorded, float(second)))
    assert witness.describe(5.0) == {
        "state": "proven", "proven_sectors": 8, "proven_age_seconds": 3.0, "reason": None,
    }  # fmt: skip


def test_one_deficit_is_a_doubt_that_the_next_window_clears() -> None:
    witness = Witness(at_completion=False)
    samples = [(0, 0), (0, 0), (16, 8), (16, 8), (32, 24), (32, 24)]
    states = []
    for second, (written, recorded) in enumerate(samples):
        witness.take(Sample(written, 0, recorded, float(second)))
        states.append(witness.state)
    assert states == ["unproven", "unproven", "doubtful", "doubtful", "proven", "proven"]


def test_one_deficit_is_enough_where_nothing_else_explains_it() -> None:
    witness = Witness(at_completion=True, certain=True)
    for second, (written, recorded) in enumerate([(0, 0), (0, 0), (16, 8), (32, 24)]):
        witness.take(Sample(written, 0, recorded, float(second)))
    assert witness.state == "blind" and "8 of them were not recorded" in witness.blind


def test_a_window_with_a_command_past_the_block_layer_neither_proves_nor_accuses() -> None:
    witness = Witness(at_completion=True, certain=True)
    samples = [(0, 0, 0), (0, 0, 0), (64, 8, 1), (64, 8, 1), (64, 8, 1)]
    for second, (written, recorded, passthrough) in enumerate(samples):
        witness.take(Sample(written, 0, recorded, float(second), passthrough))
        assert witness.state == "unproven"
    witness.take(Sample(80, 0, 16, 5.0, 1))
    assert witness.state == "blind"


def test_a_doubt_is_enough_for_a_drain() -> None:
    """At that moment nothing is under way, so nothing explains it any more."""
    witness = Witness(at_completion=False)
    suspicions: list[str] = []
    item: Any = SimpleNamespace(witness=witness, lost="", key=("w", "a"), device="/dev/dm-0")
    tracker: Any = SimpleNamespace(look=lambda _: None, suspect=lambda _, reason: suspicions.append(reason))
    for second, (written, recorded) in enumerate([(0, 0), (0, 0), (16, 16)]):
        witness.take(Sample(written, 0, recorded, float(second)))
    Tracker.require_sight(tracker, item)
    witness.take(Sample(32, 0, 24, 3.0))
    with pytest.raises(SuspectError, match="lacks 8 sectors"):
        Tracker.require_sight(tracker, item)
    assert suspicions == ["the tracker may be blind: 8 sectors were not recorded"]


def test_counters_that_cannot_be_read_are_told_until_they_can() -> None:
    witness = Witness(True)
    witness.unreadable = "no such file"
    assert witness.describe(0.0)["reason"] == "the counters cannot be read: no such file"
    witness.take(Sample(0, 0, 0, 1.0))
    assert witness.state == "unproven"


def test_a_device_that_never_rests_is_blind_when_nothing_at_all_is_recorded() -> None:
    witness = Witness(at_completion=False)
    second = 0.0
    while not witness.blind and second < 10 * RESTLESS_SECONDS:
        witness.take(Sample(int(second), 3, 0, second))
        second += 1
    assert 2 * RESTLESS_SECONDS <= second <= 2 * RESTLESS_SECONDS + 5


def test_a_device_that_is_not_counted_says_so() -> None:
    witness = Witness(True)
    for second, recorded in enumerate([0, 0, 8, 8, 8]):
        witness.take(Sample(0, 0, recorded, float(second)))
    assert witness.state == "uncounted" and "does not count" in str(witness.describe(3.0)["reason"])


def test_counters_that_begin_anew_are_no_deficit() -> None:
    witness = Witness(True)
    for second, written in enumerate([500, 500, 0, 8, 8]):
        witness.take(Sample(written, 0, 0 if written != 8 else 8, float(second)))
    assert not witness.doubt and not witness.blind
