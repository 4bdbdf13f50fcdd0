# SPDX-License-Identifier: GPL-3.0-or-later
"""What a sender puts on the wire, and when its claims are sent, without a wire: frames and claims in a list."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bmigrate.ship import passes
from bmigrate.ship.pacer import Pacer
from bmigrate.ship.passes import Sender
from bmigrate.ship.window import Claim
from bmigrate.wire.frames import FrameType
from tests.unit.standby_host import MIB

DATA = b"\1" * 65536


class Wire:
    """A session, its only stream, and the time.

    Attributes:
        events: ("ZERO", offset, length), ("DATA", offset, length) and ("sent", claim number), in order.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        self.events: list[tuple[Any, ...]] = []
        self.volume: Any = SimpleNamespace(name="data", index=0)
        lane: Any = SimpleNamespace(number=0, packer=None, choice=None, send=self._zero, send_extents=self._data)
        session: Any = SimpleNamespace(lanes=[lane], check=lambda: None, sent=self._sent)
        monkeypatch.setattr(passes, "time", SimpleNamespace(monotonic=lambda: self.now))
        self.sender = Sender(session, Pacer(0))
        self.claims = 0

    def _zero(self, type_: FrameType, volume: int, offset: int, aux: int) -> None:
        self.events.append((type_.name, offset, aux))

    def _data(self, volume: int, parts: list[tuple[int, memoryview]]) -> None:
        self.events += [("DATA", offset, len(data)) for offset, data in parts]

    def _sent(self, claim: Claim) -> None:
        self.events.append(("sent", claim.key["n"]))

    def put(self, offset: int, data: bytes) -> int:
        """A claim of one extent that holds this; returns its number."""
        self.claims += 1
        claim = Claim("data", {"n": self.claims}, [(offset, len(data))], offset + len(data))
        self.sender.send(self.volume, claim, [(offset, memoryview(data))])
        self.sender.finished(claim)
        return self.claims


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> Wire:
    """An empty one."""
    return Wire(monkeypatch)


def test_zeroes_do_not_wait_for_the_end_of_the_data_behind_them(wire: Wire) -> None:
    """A rate limit can make that hours, and all the while their claims would count as lag."""
    zeroes = wire.put(0, bytes(MIB))
    wire.put(8 * MIB, DATA)
    assert ("sent", zeroes) not in wire.events, "they may go on: nothing is gained by many frames"
    wire.now += passes.ZERO_HOLD_SECONDS + 0.1
    wire.put(9 * MIB, DATA)
    assert wire.events[1:] == [
        ("sent", 2), ("ZERO", 0, MIB), ("sent", zeroes), ("DATA", 9 * MIB, len(DATA)), ("sent", 3)
    ]  # fmt: skip


def test_a_claim_that_is_equal_lets_old_zeroes_go(wire: Wire) -> None:
    """A resync sends nothing for an equal claim, and there may be a terabyte of them."""
    zeroes = wire.put(0, bytes(MIB))
    wire.now += passes.ZERO_HOLD_SECONDS + 0.1
    wire.put(8 * MIB, b"")
    assert wire.events == [("ZERO", 0, MIB), ("sent", zeroes), ("sent", 2)]


def test_a_run_of_zeroes_over_many_claims_is_one_frame_up_to_the_maximum(
    wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever its claims are; then the next frame goes on where it ended."""
    assert passes.MAX_ZERO_BYTES == 1 << 30, "docs/shipper.md"
    monkeypatch.setattr(passes, "MAX_ZERO_BYTES", 8 * MIB)
    for number in range(20):
        wire.put(number * MIB, bytes(MIB))
    wire.sender.flush()
    frames = [event for event in wire.events if event[0] == "ZERO"]
    assert frames == [("ZERO", 0, 8 * MIB), ("ZERO", 8 * MIB, 8 * MIB), ("ZERO", 16 * MIB, 4 * MIB)]
    assert [event[1] for event in wire.events if event[0] == "sent"] == list(range(1, 21))


STEPS = st.lists(st.tuples(st.booleans(), st.integers(0, 2), st.sampled_from([0.0, 0.3, 0.6])), max_size=30)


@given(steps=STEPS)
def test_every_claim_is_sent_once_and_behind_all_of_its_frames(steps: list[tuple[bool, int, float]]) -> None:
    """Whatever the mixture of zeroes and data, of neighbours and gaps, and of pauses."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        wire = Wire(monkeypatch)
        offset = 0
        extents: dict[int, tuple[int, int]] = {}
        for zero, gap, pause in steps:
            offset += gap * 65536
            wire.now += pause
            extents[wire.put(offset, bytes(65536) if zero else DATA)] = (offset, offset + 65536)
            offset += 65536
        wire.sender.flush()
    covered: set[int] = set()
    for event in wire.events:
        if event[0] == "sent":
            start, end = extents.pop(event[1])
            assert covered >= set(range(start, end, 4096)), "called sent before its last frame"
        else:
            blocks = set(range(event[1], event[1] + event[2], 4096))
            assert not covered & blocks, "sent twice"
            covered |= blocks
    assert not extents, "a claim was never sent"
