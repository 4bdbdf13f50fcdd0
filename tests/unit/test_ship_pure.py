# SPDX-License-Identifier: GPL-3.0-or-later
"""Properties of the shipper's arithmetic: zeroes, the window, the drain's ledger, pacing, rates, states."""

from __future__ import annotations

import dataclasses
import statistics
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from bmigrate.common.state import WorkloadState
from bmigrate.ship import compare, pacing, rates, verdict, wanted, zeros
from bmigrate.ship.ledger import Ledger
from bmigrate.ship.window import Claim, ProtocolError, Window
from bmigrate.wire.hashing import digests

# -- zeroes ------------------------------------------------------------------------------------------

UNITS = st.lists(st.sampled_from([b"\0" * 4096, b"\1" * 4096, b"\0" * 4095 + b"\1", b"\1" + b"\0" * 4095]), max_size=40)


@given(UNITS, st.integers(0, 7))
def test_zero_parts_cover_exactly_and_hold_zeroes_only(units: list[bytes], tail_sectors: int) -> None:
    """Whatever the mixture and the tail: parts in order, without gap, and "zero" is never said of data."""
    data = b"".join(units) + b"\0" * (512 * tail_sectors)
    at = 0
    for part in zeros.split(data):
        assert part.offset == at and part.length > 0
        assert part.offset % zeros.UNIT == 0
        if part.zero:
            assert not any(data[part.offset : part.offset + part.length])
        at += part.length
    assert at == len(data)


@given(st.integers(1, 5 << 20).map(lambda size: size // 512 * 512 + 512))
@settings(max_examples=20)
def test_all_zero_is_one_part(size: int) -> None:
    """A gibibyte of zeroes must not become many frames."""
    assert zeros.split(bytes(size)) == [zeros.Part(0, size, True)]
    assert not zeros.is_zero(bytes(size - 1) + b"\1")


def test_a_short_zero_run_inside_data_is_sent_as_data() -> None:
    """Three zero units between data: one frame; four: three frames."""
    data = b"\1" * 4096
    assert [part.zero for part in zeros.split(data + bytes(3 * 4096) + data)] == [False]
    assert [part.zero for part in zeros.split(data + bytes(4 * 4096) + data)] == [False, True, False]


# -- window ------------------------------------------------------------------------------------------


class WindowMachine(RuleBasedStateMachine):
    """Claims, syncs and acknowledgements in any order: nothing comes out that no SYNC followed."""

    def __init__(self) -> None:
        super().__init__()
        self.window = Window()
        self.number = 0
        self.sent_before: dict[int, set[int]] = {}
        self.sent: set[int] = set()
        self.out: set[int] = set()
        self.waiting: list[Claim] = []

    @rule(length=st.integers(1, 100))
    def send(self, length: int) -> None:
        """A claim's last frame is written."""
        self.number += 1
        self.window.sent(Claim("v", {"n": self.number}, [(self.number * 1000, length)], 0))
        self.sent.add(self.number)

    @rule()
    def sync(self) -> None:
        """A SYNC frame is written."""
        self.sent_before[self.window.sync()] = set(self.sent)

    @precondition(lambda self: self.window.last_ack < self.window.last_sync)
    @rule(data=st.data())
    def ack(self, data: Any) -> None:
        """An ACK arrives, possibly skipping some."""
        number = data.draw(st.integers(self.window.last_ack + 1, self.window.last_sync))
        claims = self.window.acked(number)
        names = {claim.key["n"] for claim in claims}
        assert not names & self.out, "acknowledged twice"
        assert names == self.sent_before[number] - self.out, "exactly what was sent before that SYNC"
        self.out |= names
        self.waiting += claims

    @precondition(lambda self: self.waiting)
    @rule()
    def release(self) -> None:
        """breqd took one."""
        self.window.released(self.waiting.pop())

    @rule(ahead=st.integers(1, 3))
    def impossible(self, ahead: int) -> None:
        """An ACK of a SYNC that was never sent, or again."""
        for number in (self.window.last_sync + ahead, self.window.last_ack):
            with pytest.raises(ProtocolError):
                self.window.acked(number)

    @invariant()
    def counts(self) -> None:
        """What is under way is what was sent and not released."""
        assert self.window.in_flight_claims == len(self.sent - self.out) + len(self.waiting)
        assert (self.window.in_flight_bytes == 0) == (self.window.in_flight_claims == 0)
        assert (self.window.in_flight_total_bytes == 0) == (self.window.in_flight_claims == 0)
        assert self.window.in_flight_total_bytes >= self.window.in_flight_bytes


TestWindow = WindowMachine.TestCase

# -- ledger ------------------------------------------------------------------------------------------

PIECES = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 12)), max_size=30)


@given(PIECES)
def test_ledger_keeps_the_last_digest_of_every_range_or_returns_it(pieces: list[tuple[int, int]]) -> None:
    """For each block: either the newest piece over it is kept whole, or the block was returned to be sent again."""
    ledger = Ledger()
    newest: dict[int, int] = {}
    returned: set[int] = set()
    for number, (offset, length) in enumerate(pieces):
        for block in range(offset, offset + length):
            newest[block] = number
            returned.discard(block)
        for orphan_offset, orphan_length in ledger.add("v", offset, length, str(number).encode()):
            returned |= set(range(orphan_offset, orphan_offset + orphan_length))
    covered: set[int] = set()
    for offset, length, digest in ledger.pieces("v"):
        blocks = set(range(offset, offset + length))
        assert not blocks & covered, "pieces overlap"
        covered |= blocks
        assert all(newest[block] == int(digest) for block in blocks), "a stale digest was kept"
    assert covered | returned == set(newest)
    assert not covered & returned
    assert ledger.total_bytes() == len(covered)
    flat = [piece for batch in ledger.batches("v", 12, 3) for piece in batch]
    assert flat == ledger.pieces("v")


def test_ledger_digest_depends_on_everything() -> None:
    """Volume, offset, length and content of each piece; not on the order of sending."""

    def digest(*pieces: tuple[str, int, int, bytes]) -> str:
        ledger = Ledger()
        for piece in pieces:
            ledger.add(*piece)
        return ledger.digest()

    one, two = ("a", 0, 4, b"x" * 32), ("b", 4, 4, b"y" * 32)
    assert digest(one, two) == digest(two, one)
    variants = [digest(one, two), digest(one), digest(("b", 0, 4, b"x" * 32), two), digest(("a", 8, 4, b"x" * 32), two)]
    variants += [digest(("a", 0, 2, b"x" * 32), two), digest(("a", 0, 4, b"z" * 32), two), Ledger().digest()]
    assert len(set(variants)) == len(variants)


# -- digests of a comparison -------------------------------------------------------------------------


@given(st.lists(st.booleans(), min_size=1, max_size=60), st.integers(1, 8))
def test_differing_names_exactly_the_chunks_that_differ(flips: list[bool], tail: int) -> None:
    """Runs are merged, the last chunk may be short."""
    chunk = 8
    length = (len(flips) - 1) * chunk + tail
    own = bytes(length)
    other = bytearray(own)
    for number, flip in enumerate(flips):
        if flip:
            other[number * chunk] = 1
    runs = compare.differing(digests("blake2b", own, chunk), digests("blake2b", bytes(other), chunk), length, chunk)
    found = {at // chunk for start, size in runs for at in range(start, start + size)}
    assert found == {number for number, flip in enumerate(flips) if flip}
    assert all(start + size <= length for start, size in runs)


# -- pacing ------------------------------------------------------------------------------------------


@given(
    st.integers(1, 1_000_000),
    st.integers(1, 100_000),
    st.lists(st.tuples(st.floats(0, 2), st.integers(1, 300_000)), max_size=60),
)
def test_bucket_never_lets_more_pass_than_burst_and_rate(rate: int, burst: int, asks: list[tuple[float, int]]) -> None:
    """Any sequence of asks: what passed in any prefix is bounded (a long frame may leave a debt of itself)."""
    now = 0.0
    bucket = pacing.TokenBucket(rate, burst, now)
    passed = 0
    for pause, count in asks:
        now += pause
        wait = bucket.take(count, now)
        assert wait >= 0
        if wait == 0.0:
            assert passed <= burst + rate * now + 1, "more than the limit had passed before this frame"
            passed += count


@given(st.integers(1, 10_000_000), st.integers(1, 1_000_000), st.integers(1, 5_000_000))
def test_bucket_always_lets_go_in_the_end(rate: int, burst: int, count: int) -> None:
    """Waiting for as long as it says is enough, also after a debt."""
    bucket = pacing.TokenBucket(rate, burst, 0.0)
    now = 0.0
    for _ in range(3):
        for _ in range(4):
            wait = bucket.take(count, now)
            if not wait:
                break
            now += wait * 1.0001
        assert not wait
    assert pacing.TokenBucket(0, 1, 0.0).take(10**12, 0.0) == 0.0


def test_backoff_doubles_and_is_bounded() -> None:
    """No storm of connections, and no wait for ever."""
    waits = [pacing.backoff(attempt) for attempt in range(1, 40)]
    assert waits[0] == 0.5 and waits[1] == 1.0 and waits == sorted(waits) and waits[-1] == 15.0


# -- rates -------------------------------------------------------------------------------------------


def test_ship_rate_is_measured_from_busy_time_only() -> None:
    """1 MiB in half a second, then an hour of nothing: still 2 MiB/s."""
    rate = rates.ShipRate()
    assert rate.bytes_per_second is None
    for start in (0.0, 3600.0):
        rate.sent(start)
        rate.durable(1 << 20, start + 0.5, idle=True)
    assert rate.bytes_per_second == pytest.approx(2 << 20)
    rate.sent(7200.0)
    rate.durable(4096, 7200.1, idle=True)
    assert rate.bytes_per_second == pytest.approx(2 << 20), "a small batch says something about latency only"
    assert rate.latency_seconds == pytest.approx(0.1)


def test_what_was_compared_by_checksum_says_nothing_about_a_drain() -> None:
    """A minute of hashing with one small block sent is no latency of a minute."""
    rate = rates.ShipRate()
    rate.sent(0.0)
    rate.durable(4096, 0.1, idle=True)
    rate.sent(1.0)
    rate.void()
    rate.durable(4096, 61.0, idle=True)
    assert rate.latency_seconds == pytest.approx(0.1)
    assert rate.bytes_per_second == pytest.approx(40960)


@given(st.lists(st.floats(0.001, 0.01), min_size=3, max_size=3), st.lists(st.floats(1, 1e4), min_size=2, max_size=2))
def test_two_stalls_among_five_do_not_rule_the_latency(quick: list[float], stalls: list[float]) -> None:
    """In whatever order they came."""
    for at in (0, 1, 3):
        rate = rates.ShipRate()
        for seconds in [*quick[:at], *stalls, *quick[at:]]:
            rate.round_trip(seconds)
        assert rate.latency_seconds == statistics.median([*quick, *stalls]) <= 0.01


def test_dirty_rate_begins_anew_with_another_attachment() -> None:
    """A total that was reset is no negative rate, and no huge one."""
    rate = rates.DirtyRate()
    rate.sample(0.0, 1000, "a")
    rate.sample(1.0, 3000, "a")
    assert rate.bytes_per_second == pytest.approx(2000)
    rate.sample(2.0, 10, "b")
    rate.sample(3.0, 2010, "b")
    assert rate.bytes_per_second == pytest.approx(2000)


def test_prediction_is_unknown_rather_than_guessed() -> None:
    """Nothing measured and bytes left: None. Nothing left: the latency."""
    assert rates.predicted_drain_seconds(4096, None, None) is None
    assert rates.predicted_drain_seconds(0, None, 0.2) == 0.2
    assert rates.predicted_drain_seconds(10 << 20, float(5 << 20), 0.5) == pytest.approx(2.5)


# -- states ------------------------------------------------------------------------------------------

FACTS = st.builds(
    verdict.Facts,
    wanted=st.sampled_from(["ship", "idle", "paused"]),
    connected=st.booleans(),
    activity=st.sampled_from([None, "resyncing", "draining"]),
    sealed=st.booleans(),
    suspect=st.sampled_from([None, "crash"]),
    seeding=st.booleans(),
    left_bytes=st.integers(0, 10**9),
    dirty_rate=st.one_of(st.none(), st.floats(0, 1e9)),
)


@given(FACTS, st.builds(verdict.Trend, st.integers(0, 3), st.integers(0, 9), st.booleans()))
def test_in_step_is_never_said_lightly(facts: verdict.Facts, trend: verdict.Trend) -> None:
    """Not while suspect, seeding, resyncing, paused, sealed or without a session; and only after a pass caught up."""
    state, _ = verdict.judge(facts, trend)
    assert state in verdict.STATES
    if state == "in_step":
        assert facts.connected and not facts.suspect and not facts.seeding and trend.caught_up
        assert facts.wanted == "ship" and not facts.sealed and facts.activity is None


def test_a_burst_since_the_last_pass_is_not_in_step() -> None:
    """The next pass may take hours, and what the last one said is no answer to who asks meanwhile."""
    trend = verdict.Trend()
    trend.finished(10, 0, 0.1, 2.0, 0)
    facts = verdict.Facts(connected=True, left_bytes=100 << 30, ship_rate=float(100 << 20), limit_seconds=2.0)
    state, reason = verdict.judge(facts, trend)
    assert state == "catching_up" and reason is not None and "100" in reason
    small = dataclasses.replace(facts, left_bytes=200 << 20, predicted_seconds=9.0)
    assert verdict.judge(small, trend) == ("in_step", None), "the rest of the prediction is the link's"


def test_losing_ground_needs_two_passes_and_gives_a_reason() -> None:
    """One bad pass is noise; a pass that helped begins anew."""
    trend = verdict.Trend()
    facts = verdict.Facts(connected=True, dirty_rate=5e6, ship_rate=3e6, limiter="link", left_bytes=10**8)
    trend.finished(10**8, 10**8, 30.0, 2.0)
    assert verdict.judge(facts, trend)[0] == "catching_up"
    trend.finished(10**8, 10**8, 30.0, 2.0)
    state, reason = verdict.judge(facts, trend)
    assert state == "losing_ground" and reason is not None and "4.8 MiB/s" in reason and "link" in reason
    trend.finished(10**8, 10**7, 5.0, 2.0)
    assert verdict.judge(facts, trend)[0] == "catching_up"
    trend.finished(10**7, 10**6, 0.5, 2.0)
    assert verdict.judge(dataclasses.replace(facts, left_bytes=10**6), trend)[0] == "in_step"


def test_a_trim_is_an_event_and_not_losing_ground() -> None:
    """Passes in which the workload discarded most of what is left count for nothing, and the reason names the trim."""
    trend = verdict.Trend()
    facts = verdict.Facts(connected=True, dirty_rate=5e6, ship_rate=3e6, limiter="link", left_bytes=10**8)
    for _ in range(3):
        trend.finished(10**6, 10**8, 30.0, 2.0, discarded_bytes=9 * 10**7)
        state, reason = verdict.judge(facts, trend)
        assert state == "catching_up" and reason is not None and "discarded" in reason and "fstrim" in reason
    for _ in range(2):
        trend.finished(10**8, 10**8, 30.0, 2.0, discarded_bytes=10**6)
    assert verdict.judge(facts, trend)[0] == "losing_ground", "a few discards must not hide that passes do not help"
    trend.finished(10**7, 0, 0.1, 2.0)
    assert trend.trimmed_bytes == 0
    assert verdict.judge(dataclasses.replace(facts, left_bytes=0), trend) == ("in_step", None)


def test_a_trim_between_two_passes_is_an_event_too() -> None:
    """What the coming pass finds is not what the last one left: no longer in step, and the reason says why."""
    trend = verdict.Trend()
    facts = verdict.Facts(connected=True)
    trend.finished(10**6, 0, 0.1, 2.0)
    assert not trend.between(0, 10**8, 30.0, 2.0) and not trend.between(10**6, 10**8, 30.0, 2.0)
    assert not trend.between(10**8, 10**8, 1.0, 2.0) and not trend.between(10**8, 10**8, None, 2.0)
    assert verdict.judge(facts, trend) == ("in_step", None), "few bytes, or soon shipped"
    assert trend.between(9 * 10**7, 10**8, 30.0, 2.0)
    state, reason = verdict.judge(facts, trend)
    assert state == "catching_up" and reason is not None and "fstrim" in reason
    assert not trend.finished(10**8, 10**8, 30.0, 2.0, discarded_bytes=9 * 10**7), "the same trim"
    trend.finished(10**8, 0, 0.1, 2.0)
    assert trend.trimmed_bytes == 0 and verdict.judge(facts, trend) == ("in_step", None)


# -- what is wanted ----------------------------------------------------------------------------------

PHASES = st.sampled_from(["begun", "quiesced", "drained", "committed"])
HANDOVER = st.one_of(
    st.none(),
    st.fixed_dictionaries(
        {"run_id": st.sampled_from(["r1", "r2"]), "phase": PHASES, "side": st.sampled_from(["source", "target"])}
    ),
)


@given(
    st.sampled_from(["none", "primary", "standby"]),
    st.booleans(),
    HANDOVER,
    st.booleans(),
    st.sampled_from([None, "r1", "r2"]),
)
def test_nothing_is_shipped_but_by_a_primary_that_may(
    role: str, shipping: bool, handover: dict[str, str] | None, paused: bool, sealed_by: str | None
) -> None:
    """Role, permission, pause and seal all have a veto."""
    item = WorkloadState(
        "w",
        "h",
        role,
        {"number": 1, "id": "a"},
        handover=handover,
        shipping=shipping,
    )
    decision = wanted.decide(item, paused, sealed_by, frozenset())
    source_sealed = handover is not None and handover["side"] == "source" and handover["phase"] in wanted.SEALED_PHASES
    if decision.what == "ship":
        assert role == "primary" and shipping and not paused and sealed_by is None and not source_sealed
    elif role == "primary" and shipping and not paused:
        assert decision.what == "sealed" and (sealed_by is not None or source_sealed)
