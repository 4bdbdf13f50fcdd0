# SPDX-License-Identifier: GPL-3.0-or-later
"""Claim, read, send, acknowledge, kill, in every order: breqd's real maps and leases, the shipper's real
window, and a small model of disks, pipe and receiver that does what the real ones may do.

After each step the invariant is checked: a block that differs from what the standby would have after a
power cut and the worst of what is still in pipes is dirty, claimed, or in the log. Each way to break
the rules that design.md forbids is also played, and must be caught.
"""

from __future__ import annotations

import collections
import random
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from bmigrate.breqd.leases import Leases
from bmigrate.breqd.maps import Maps
from bmigrate.common.errors import RefusedError
from bmigrate.ship.window import Claim, Window
from tests.unit.ship_world import GRANULE, _Item

BLOCKS = 12
KEY = ("wl", "data")


class Model:
    """One volume of BLOCKS blocks; a block's content is a number.

    Args:
        sabotage: the rule to break: None, or a name used below.
    """

    def __init__(self, sabotage: str | None = None) -> None:
        self.sabotage = sabotage
        self.item = _Item(*KEY, BLOCKS * GRANULE)
        self.disk = [0] * BLOCKS
        self.content = 0
        self.in_flight: list[tuple[int, int]] = []  # writes that are queued, not on the medium yet
        self.log: collections.deque[int] = collections.deque()
        self.durable = [-1] * BLOCKS  # the standby after a power cut
        self.volatile: dict[int, int] = {}  # written there, not flushed
        self.pipes: list[collections.deque[Any]] = []  # frames under way, one pipe for each receiver that lives
        self.acks: collections.deque[int] = collections.deque()
        self.epoch = 0
        self.window = Window()
        self.reading: Claim | None = None
        self.read = dict(enumerate(self.disk))
        self.pending: list[Claim] = []
        self._boot()
        self.maps.mark_all(KEY, 0.0)
        self.connect()

    def of_workload(self, _workload: str) -> list[_Item]:
        """For Leases."""
        return [self.item]

    def get(self, _key: Any) -> _Item:
        """For Leases."""
        return self.item

    def _boot(self) -> None:
        self.maps = Maps()
        self.maps.add(KEY, self.item.size, GRANULE, self.item.mirror, self.item.failed, 0.0)
        self.leases = Leases(self)  # type: ignore[arg-type]

    # -- the workload and the kernel -----------------------------------------------------------------

    def submit(self, block: int) -> None:
        """A write is queued."""
        self.content += 1
        self.in_flight.append((block, self.content))
        if self.sabotage == "record_at_queue":
            self.log.append(block)

    def complete(self, which: int) -> None:
        """A queued write reaches the medium, and then is recorded."""
        if self.in_flight:
            block, content = self.in_flight.pop(which % len(self.in_flight))
            self.disk[block] = content
            if self.sabotage != "record_at_queue":
                self.log.append(block)

    def consume(self) -> None:
        """breqd takes a record in."""
        if self.log:
            block = self.log.popleft()
            claimed = self.maps.claimed_bytes(KEY)
            if self.sabotage == "ignore_redirty" and claimed and self._is_claimed(block):
                return
            self.maps.mark_extents(KEY, [[block * GRANULE, GRANULE]], time.monotonic())

    def _is_claimed(self, block: int) -> bool:
        return bool(self.maps.claimed[block // 8] >> (block % 8) & 1)

    # -- the shipper -------------------------------------------------------------------------------------

    def connect(self) -> None:
        """A new session: old receivers are gone before breqd hears of the epoch."""
        if self.sabotage != "let_old_receiver_live":
            self.pipes.clear()
        self.acks.clear()
        self.pending.clear()
        self.window = Window()
        self.reading = None
        self.epoch += 1
        self.pipes.append(collections.deque())
        self.leases.fence("wl", self.epoch, "f")

    def claim(self, count: int, start: int) -> None:
        """Take blocks; the read comes later."""
        if self.reading is not None:
            return
        answer = self.leases.claim(KEY, self.epoch, count * GRANULE, start * GRANULE)
        if answer["claim"] is None:
            return
        extents = [(int(offset), int(length)) for offset, length in answer["extents"]]
        self.reading = Claim("data", answer["claim"], extents, answer["next_offset_bytes"])
        if self.sabotage == "clear_on_send":
            self.leases.acknowledge(KEY, answer["claim"])

    def send(self) -> None:
        """Read the claimed blocks and send them."""
        claim, self.reading = self.reading, None
        if claim is None:
            return
        for offset, length in claim.extents:
            for block in range(offset // GRANULE, (offset + length) // GRANULE):
                content = self.read[block] if self.sabotage == "read_before_claim" else self.disk[block]
                self.pipes[-1].append((block, content))
        self.window.sent(claim)
        self.read = dict(enumerate(self.disk))  # what a shipper that reads ahead of its next claim would send

    def sync(self) -> None:
        """A SYNC frame."""
        if self.reading is None:
            self.pipes[-1].append(self.window.sync())

    def acknowledge(self) -> None:
        """An ACK arrives; its claims are told to breqd one by one."""
        if self.pending:
            self.leases.acknowledge(KEY, self.pending.pop(0).key)
        elif self.acks:
            self.pending = self.window.acked(self.acks.popleft())
            if self.sabotage == "ack_covers_later_claims":
                self.pending += self.window._unsynced
                self.window._unsynced = []

    # -- the standby ---------------------------------------------------------------------------------------

    def receive(self, which: int) -> None:
        """A receiver that lives takes the next frame; an old one, if any lived, would do so now and then."""
        pipe = self.pipes[-1] if which % 16 else self.pipes[which // 16 % len(self.pipes)]
        if not pipe:
            return
        frame = pipe.popleft()
        newest = pipe is self.pipes[-1]
        if isinstance(frame, tuple):
            self.volatile[frame[0]] = frame[1]
        elif newest:
            if self.sabotage != "ack_before_fsync":
                self._flush()
            self.acks.append(frame)
        else:
            self._flush()

    def _flush(self) -> None:
        for block, content in self.volatile.items():
            self.durable[block] = content
        self.volatile.clear()

    # -- deaths ----------------------------------------------------------------------------------------------

    def kill_receiver(self) -> None:
        """What is in its pipe is gone; what it wrote may or may not have reached the medium."""
        self.connect()

    def power_cut_standby(self, keep: int) -> None:
        """Volatile blocks are kept or lost at random."""
        for number, (block, content) in enumerate(sorted(self.volatile.items())):
            if keep >> number & 1:
                self.durable[block] = content
        self.volatile.clear()
        self.connect()

    def kill_breqd(self) -> None:
        """Another incarnation; the log is handed out again, the mirror is what it was."""
        self._boot()
        self.connect()

    # -- what must hold ----------------------------------------------------------------------------------------

    def differing(self) -> set[int]:
        """Blocks that may differ: the durable content, or what frames of the past may still turn it into."""
        found = set()
        for block in range(BLOCKS):
            possible = {self.durable[block]}
            if block in self.volatile:
                possible.add(self.volatile[block])
            for pipe in self.pipes:
                possible |= {frame[1] for frame in pipe if isinstance(frame, tuple) and frame[0] == block}
            if possible != {self.disk[block]}:
                found.add(block)
        return found

    def check(self) -> None:
        """The invariant of design.md."""
        marked = set(np.flatnonzero(np.unpackbits(self.item.mirror, bitorder="little")).tolist())
        excused = marked | set(self.log) | {block for block, _ in self.in_flight}
        lost = self.differing() - excused
        assert not lost, f"blocks {sorted(lost)} differ and nobody knows"

    def settle(self) -> None:
        """Everything runs to its end without a death: both sides are equal then."""
        while self.in_flight:
            self.complete(0)
        while self.log:
            self.consume()
        for _ in range(6):
            self.send()
            for _ in range(2 * BLOCKS):
                self.claim(BLOCKS, 0)
                self.send()
            self.sync()
            for which in range(len(self.pipes)):
                while self.pipes[which]:
                    self.receive(16 * which)
            while self.acks or self.pending:
                self.acknowledge()
        assert self.durable == self.disk


class Machine(RuleBasedStateMachine):
    """The same, driven by Hypothesis, which shrinks what it finds."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Model()

    @rule(block=st.integers(0, BLOCKS - 1))
    def submit(self, block: int) -> None:
        """Queue a write."""
        self.model.submit(block)

    @rule(which=st.integers(0, 7))
    def complete(self, which: int) -> None:
        """Complete one."""
        self.model.complete(which)

    @rule()
    def consume(self) -> None:
        """Take a record in."""
        self.model.consume()

    @rule(count=st.integers(1, BLOCKS), start=st.integers(0, BLOCKS - 1))
    def claim(self, count: int, start: int) -> None:
        """Claim."""
        self.model.claim(count, start)

    @rule()
    def send(self) -> None:
        """Read and send."""
        self.model.send()

    @rule()
    def sync(self) -> None:
        """SYNC."""
        self.model.sync()

    @rule(which=st.integers(0, 63))
    def receive(self, which: int) -> None:
        """The receiver's next frame."""
        self.model.receive(which)

    @rule()
    def acknowledge(self) -> None:
        """The next acknowledgement."""
        self.model.acknowledge()

    @rule()
    def kill_receiver(self) -> None:
        """kill -9 breceive."""
        self.model.kill_receiver()

    @rule()
    def kill_breqd(self) -> None:
        """kill -9 breqd."""
        self.model.kill_breqd()

    @rule(keep=st.integers(0, (1 << BLOCKS) - 1))
    def power_cut(self, keep: int) -> None:
        """The standby loses power."""
        self.model.power_cut_standby(keep)

    @invariant()
    def holds(self) -> None:
        """After every step."""
        self.model.check()

    def teardown(self) -> None:
        """In the end all arrives."""
        self.model.settle()


TestModel = Machine.TestCase
TestModel.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)


WEIGHTS: dict[str, float] = {
    "submit": 4, "complete": 4, "consume": 4, "claim": 4, "send": 4, "sync": 3, "receive": 12, "acknowledge": 4,
    "kill_receiver": 0.4, "kill_breqd": 0.2, "power_cut_standby": 0.3,
}  # fmt: skip


ARGUMENTS: dict[str, Callable[[int], tuple[int, ...]]] = {
    "submit": lambda number: (number % BLOCKS,),
    "complete": lambda number: (number,),
    "claim": lambda number: (1 + number % BLOCKS, number % 5),
    "receive": lambda number: (number,),
    "power_cut_standby": lambda number: (number,),
}


def walk(
    model: Model,
    seed: int,
    weights: dict[str, float] = WEIGHTS,
    arguments: dict[str, Callable[[int], tuple[int, ...]]] = ARGUMENTS,
    steps: int = 400,
) -> None:
    """A random walk; raises AssertionError when the invariant breaks."""
    choose = random.Random(seed)
    for _ in range(steps):
        number = choose.randrange(1 << BLOCKS)
        name = choose.choices(list(weights), list(weights.values()))[0]
        getattr(model, name)(*arguments.get(name, lambda number: ())(number))
        model.check()
    model.settle()


def caught(walk_with: Callable[[int], None]) -> int:
    """How many of 25 random walks break the invariant."""
    count = 0
    for seed in range(25):
        try:
            walk_with(seed)
        except AssertionError:
            count += 1
    return count


def test_random_walks_keep_the_invariant() -> None:
    """The control of the controls below: the same walks without sabotage."""
    for seed in range(25):
        walk(Model(), seed)


@pytest.mark.parametrize(
    "sabotage",
    [
        "record_at_queue", "clear_on_send", "read_before_claim", "ack_before_fsync", "ack_covers_later_claims",
        "ignore_redirty", "let_old_receiver_live",
    ],
)  # fmt: skip
def test_each_forbidden_shortcut_is_caught(sabotage: str) -> None:
    """Were it not, the walks would prove nothing."""
    count = caught(lambda seed: walk(Model(sabotage), seed))
    assert count >= 3, f"{sabotage} went unnoticed in {25 - count} of 25 walks"


def test_an_epoch_is_fenced_once() -> None:
    """An old session cannot come back: its epoch is refused, and so are its claims."""
    model = Model()
    model.connect()
    with pytest.raises(RefusedError):
        model.leases.fence("wl", 1, "again")
    with pytest.raises(RefusedError):
        model.leases.claim(KEY, 1, GRANULE, 0)
