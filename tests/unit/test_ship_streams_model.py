# SPDX-License-Identifier: GPL-3.0-or-later
"""The model of test_ship_model.py with three streams a session: breqd's real maps and leases, the shipper's real window
and marks, the receiver's real count of what is not flushed, and a device whose flush takes time and may fail once.

After each step the invariant is checked. Each way to break the rules of sessions of several streams is also played, and
must be caught.
"""

from __future__ import annotations

import collections
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, rule

from bmigrate.receive.volumes import StandbyVolume
from bmigrate.ship.marks import Marks
from tests.unit.test_ship_model import ARGUMENTS, BLOCKS, GRANULE, WEIGHTS, Machine, Model, caught, walk

STREAMS = 3


@dataclass(frozen=True)
class Mark:
    """A MARK frame."""

    number: int


@dataclass(frozen=True)
class Sync:
    """A SYNC frame: its number, and whether other streams wrote the volume."""

    number: int
    elsewhere: bool


class Streams(Model):
    """The last three of ``pipes`` are those of the open session; only the first of them takes SYNC.

    Attributes:
        flush: while one is under way: the number of its SYNC, what it makes durable, and the count of writes.
        failing: the device has lost what it had not flushed, and will say so once.
    """

    def __init__(self, sabotage: str | None = None) -> None:
        self.failing = False
        super().__init__(sabotage)

    def connect(self) -> None:
        """A new session: every receiver of the old one is dead."""
        survivors = [pipe for number, pipe in enumerate(self.pipes) if number % STREAMS]
        super().connect()
        if self.sabotage == "fence_the_first_only":
            # The pipes of the first streams are gone; whose receivers live keep theirs, three to a session.
            self.pipes[:0] = [pipe for pair in zip(*[iter(survivors)] * 2) for pipe in (collections.deque(), *pair)]
        self.pipes += [collections.deque() for _ in range(STREAMS - 1)]
        self.marks = Marks()
        self.flush: tuple[int, dict[int, int], int] | None = None
        self.volume = StandbyVolume.__new__(StandbyVolume)
        self.volume._writes = self.volume._synced = 0

    def send(self, lane: int = 0) -> None:
        """Read the claimed blocks and send them, all on one stream."""
        claim, self.reading = self.reading, None
        if claim is None:
            return
        for offset, length in claim.extents:
            for block in range(offset // GRANULE, (offset + length) // GRANULE):
                self._lane(lane).append((block, self.disk[block]))
        claim.lane = lane % STREAMS
        self.window.sent(claim)

    def _lane(self, number: int) -> collections.deque[Any]:
        return self.pipes[len(self.pipes) - STREAMS + number % STREAMS]

    def sync(self) -> None:
        """MARKs on the streams that carried something, and a SYNC when all of them are answered."""
        number = self.window.sync()
        lanes = {claim.lane for claim in self.window.last_batch if claim.lane}
        self.marks.wait(number, lanes, bool(lanes))
        for lane in lanes:
            self._lane(lane).append(Mark(number))
        if self.sabotage in ("sync_before_marked", "each_stream_flushes"):
            for item in self.marks._waiting:
                item.lanes.clear()
        self._leave()

    def _leave(self) -> None:
        ready = self.marks.ready()
        if ready is not None:
            self._lane(0).append(Sync(ready.number, bool(ready.volumes)))

    def receive(self, which: int) -> None:
        """A receiver takes the next frame of its stream; an old one, if any lived, would do so now and then."""
        first = len(self.pipes) - STREAMS
        at = first + which % STREAMS if which % 8 else which // 8 % len(self.pipes)
        pipe, lane, newest = self.pipes[at], at - first, at >= first
        if not pipe or (isinstance(pipe[0], Sync) and newest and self.flush is not None):
            return
        frame = pipe.popleft()
        if isinstance(frame, Sync):
            if newest:
                self._begin(frame)
        elif isinstance(frame, Mark):
            if newest:
                self._answer(lane, frame)
        else:
            self.volatile[frame[0]] = frame[1]
            if newest and not lane:
                self.volume._writes += 1

    def _answer(self, lane: int, frame: Mark) -> None:
        if self.sabotage == "each_stream_flushes":
            if self._fails():
                # Its receiver ends, and the session will, a moment later: until then the first stream goes on.
                self.marks._asked[lane].remove(frame.number)
                return
            self.durable_now(dict(self.volatile))
        self.marks.marked(lane, frame.number)
        self._leave()

    def _begin(self, frame: Sync) -> None:
        if frame.elsewhere and self.sabotage != "flush_only_its_own":
            self.volume.written_elsewhere()
        if self.volume.unsynced:
            self.flush = (frame.number, dict(self.volatile), self.volume._writes)
        else:
            self.acks.append(frame.number)

    def end_flush(self) -> None:
        """The flush that is under way ends: what was complete when it began is durable, or an error is told."""
        if self.flush is None:
            return
        (number, covered, writes), self.flush = self.flush, None
        if self._fails():
            self.connect()
            return
        self.durable_now(covered)
        self.volume._synced = writes
        self.acks.append(number)

    def durable_now(self, covered: dict[int, int]) -> None:
        """These contents reach the medium; newer ones stay in the cache."""
        for block, content in covered.items():
            self.durable[block] = content
            if self.volatile.get(block) == content:
                del self.volatile[block]

    def _fails(self) -> bool:
        failing, self.failing = self.failing, False
        return failing

    def lose(self) -> None:
        """The device loses what is in its cache, and will say so to whoever flushes next."""
        if self.volatile:
            self.volatile.clear()
            self.failing = True
            if self.flush is not None:
                self.flush = (self.flush[0], {}, self.flush[2])

    def power_cut_standby(self, keep: int) -> None:
        """As before; after a power cut the device has nothing to tell."""
        self.failing = False
        super().power_cut_standby(keep)

    def settle(self) -> None:
        """Everything runs to its end without a death: both sides are equal then."""
        while self.in_flight:
            self.complete(0)
        while self.log:
            self.consume()
        for _ in range(8):
            for turn in range(2 * BLOCKS):
                self.send(turn)
                self.claim(BLOCKS, 0)
            self.send()
            self.sync()
            for _ in range(6 * BLOCKS):
                for lane in range(STREAMS):
                    self.receive(_NUMBER[lane])
                self.end_flush()
            while self.acks or self.pending:
                self.acknowledge()
        assert self.durable == self.disk


_NUMBER = {number % STREAMS: number for number in (1, 2, 3)}
"""Numbers for ``receive`` that mean a stream of the open session."""


class StreamsMachine(Machine):
    """The same, driven by Hypothesis, which shrinks what it finds."""

    def __init__(self) -> None:
        super().__init__()
        self.streams = Streams()
        self.model = self.streams

    @rule(lane=st.integers(0, STREAMS - 1))
    def send_on(self, lane: int) -> None:
        """Read and send on one of the streams."""
        self.streams.send(lane)

    @rule()
    def end_flush(self) -> None:
        """A flush ends."""
        self.streams.end_flush()

    @rule()
    def lose(self) -> None:
        """A flush will fail."""
        self.streams.lose()

    @invariant()
    def no_more_than_three(self) -> None:
        """Nothing of an older session is left."""
        assert len(self.streams.pipes) == STREAMS


TestStreams = StreamsMachine.TestCase
TestStreams.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)


WEIGHTS_HERE = {**WEIGHTS, "end_flush": 6, "lose": 0.5}
ARGUMENTS_HERE = {**ARGUMENTS, "send": lambda number: (number,), "claim": lambda number: (1 + number % 4, number % 5)}


def test_random_walks_keep_the_invariant() -> None:
    """The control of the controls below: the same walks without sabotage."""
    for seed in range(25):
        walk(Streams(), seed, WEIGHTS_HERE, ARGUMENTS_HERE)


@pytest.mark.parametrize(
    "sabotage", ["sync_before_marked", "each_stream_flushes", "flush_only_its_own", "fence_the_first_only"]
)
def test_each_forbidden_shortcut_is_caught(sabotage: str) -> None:
    """Were it not, the walks would prove nothing."""
    count = caught(lambda seed: walk(Streams(sabotage), seed, WEIGHTS_HERE, ARGUMENTS_HERE))
    assert count >= 3, f"{sabotage} went unnoticed in {25 - count} of 25 walks"
