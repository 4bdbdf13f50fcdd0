# SPDX-License-Identifier: GPL-3.0-or-later
"""When a standby is suspect: each rule alone, and that none of them ever clears a suspicion."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bmigrate.common.blockdev import WriteCounters
from bmigrate.hold import suspicion
from bmigrate.hold.record import Record, VolumeRecord
from bmigrate.receive.ackfile import Ack
from bmigrate.wire import hello as greeting

BOOT, NEXT_BOOT = "boot-1", "boot-2"
IDENTITY = {"size_bytes": 1 << 20, "serial": "s1"}
NONE = WriteCounters(0, 0, 0, 0, True)
SOME = WriteCounters(9, 72, 1, 8, True)
S1, S2, G1, G2 = "1" * 32, "2" * 32, "a" * 32, "b" * 32


def on_record(**changes: Any) -> VolumeRecord:
    closed = {"boot_id": BOOT, "counters": SOME.to_dict(), "superblock_digest": "digest"}
    return replace(VolumeRecord("/dev/x", dict(IDENTITY), BOOT, "h", SOME.to_dict(), None, closed), **changes)


def take(old: VolumeRecord | None, **changes: Any) -> str | None:
    facts: dict[str, Any] = {
        "boot_id": NEXT_BOOT,
        "identity": IDENTITY,
        "counters": NONE,
        "superblock_digest": lambda: "digest",
    }
    return suspicion.at_take(old, **{**facts, **changes})


def test_what_is_believed() -> None:
    assert take(None) is None
    assert take(on_record()) is None  # closed before the boot, nothing written since
    assert take(on_record(), boot_id=BOOT, counters=SOME) is None  # an orderly restart of hold
    assert take(on_record(closed={**on_record().closed, "next_boot": NEXT_BOOT})) is None  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("old", "changes", "word"),
    [
        (on_record(closed=None), {}, "crash or power cut"),
        (on_record(closed=None), {"boot_id": BOOT, "counters": SOME}, "lost its exclusive hold"),
        (on_record(), {"counters": SOME}, "since the host booted"),
        (on_record(), {"counters": WriteCounters(0, 0, 1, 8, True)}, "since the host booted"),
        (on_record(), {"counters": WriteCounters(0, 0, 0, 0, False)}, "iostats"),
        (on_record(), {"boot_id": BOOT, "counters": replace(SOME, counted=False)}, "iostats"),
        (
            on_record(),
            {"boot_id": BOOT, "counters": replace(SOME, writes=10, sectors_written=80)},
            "1 writes, 8 sectors",
        ),
        (on_record(), {"identity": {**IDENTITY, "serial": "s2"}}, "serial was s1, is s2"),
        (on_record(), {"identity": {**IDENTITY, "size_bytes": 5}}, "size_bytes"),
        (on_record(), {"superblock_digest": lambda: "other"}, "first or last MiB"),
        (on_record(suspect="before"), {}, "before"),
        (on_record(closed={**on_record().closed, "next_boot": "boot-3"}), {}, "was not held"),  # type: ignore[dict-item]
    ],
)
def test_what_is_not_believed(old: VolumeRecord, changes: dict[str, Any], word: str) -> None:
    reason = take(old, **changes)
    assert reason is not None and word in reason


def test_a_device_never_held_here_claims_nothing_so_counters_do_not_matter() -> None:
    assert take(None, counters=SOME) is None


def test_the_rule_between_sessions() -> None:
    more = replace(SOME, writes=10, sectors_written=80)
    assert suspicion.outside_session(on_record(), False, SOME) is None
    assert suspicion.outside_session(on_record(), True, more) is None
    assert "outside of a session" in str(suspicion.outside_session(on_record(), False, more))
    trimmed = replace(SOME, discards=2, sectors_discarded=16)
    assert "outside of a session" in str(suspicion.outside_session(on_record(), False, trimmed))
    assert suspicion.outside_session(on_record(), False, replace(SOME, writes=10)) is None, "a flush changes nothing"
    assert suspicion.outside_session(on_record(suspect="x"), True, SOME) == "x"


def greet(last: tuple[int, str, int] | None, generation: str = G1) -> greeting.Hello:
    return greeting.Hello(
        "wl",
        "alpha",
        greeting.Generation(1, generation),
        "b" * 32,
        "c" * 32,
        [greeting.HelloVolume("data", 1 << 20, 512, 4096)],
        None if last is None else greeting.LastSession(*last),
    )


def remembered(epoch: int, session: str = S1) -> Record:
    return Record(
        "wl",
        epoch,
        {"epoch": epoch, "session_id": session, "host": "alpha", "open": False, "generation": {"number": 1, "id": G1}},
    )


def sent(record: Record, epoch: int, generation: str = G1) -> Record:
    return replace(record, written={"epoch": epoch, "generation_id": generation})


@pytest.mark.parametrize(
    ("record", "ack", "last", "word"),
    [
        (Record("wl"), None, None, None),  # the first session ever
        (remembered(5), Ack(5, 7, S1, G1), (5, S1, 7), None),
        (remembered(5), Ack(5, 8, S1, G1), (5, S1, 7), None),  # the last ACK was lost on its way
        (remembered(5), Ack(5, 7, S1, G1), (5, S1, 0), None),
        (remembered(6, S2), Ack(5, 7, S1, G1), (5, S1, 7), None),  # a grant that the source never heard of
        (remembered(5), None, (5, S1, 0), None),
        (remembered(5), Ack(4, 3, S2, G1), (5, S1, 0), None),
        (remembered(5), Ack(3, 9, S2, G2), None, None),  # of another generation: nothing to compare
        (remembered(5), Ack(5, 6, S1, G1), (5, S1, 7), "this host went back"),
        (remembered(5), None, (5, S1, 1), "this host went back"),
        (remembered(4), Ack(4, 9, S1, G1), (5, S1, 0), "this host remembers epoch 4"),
        (Record("wl"), None, (1, S1, 0), "this host remembers epoch 0"),
        (remembered(5, S2), Ack(5, 7, S2, G1), (5, S1, 0), "differently"),
        (remembered(6, S2), Ack(6, 1, S2, G1), (5, S1, 7), "the source went back"),
        (remembered(5), Ack(5, 7, S1, G1), None, "the source went back"),
        (remembered(5), Ack(5, 7 + suspicion.MAX_SYNCS_UNHEARD, S1, G1), (5, S1, 7), None),
        (remembered(5), Ack(5, 8 + suspicion.MAX_SYNCS_UNHEARD, S1, G1), (5, S1, 7), "the source remembers 7"),
        (sent(remembered(5), 5), Ack(4, 7, S2, G1), (4, S2, 7), "sent data in epoch 5"),
        (sent(remembered(6), 5), Ack(4, 7, S2, G1), (4, S2, 7), "sent data in epoch 5"),
        (sent(remembered(5), 5), None, None, "sent data in epoch 5"),
        (sent(remembered(6), 5), None, (5, S1, 0), None),  # and a grant that the source never heard of
        (sent(remembered(5), 5, G2), None, None, None),  # of another generation
    ],
)
def test_the_handshake(record: Record, ack: Ack | None, last: tuple[int, str, int] | None, word: str | None) -> None:
    reason = suspicion.at_handshake(record, ack, greet(last))
    if word is None:
        assert reason is None
    else:
        assert reason is not None and word in reason


@settings(deadline=None)
@given(st.lists(st.sampled_from(["grant", "hear", "data", "ack", "hear_ack", "crash"]), max_size=30))
def test_two_honest_hosts_never_suspect_each_other(steps: list[str]) -> None:
    """Whatever is lost on the way or in a crash of either process, the two records stay compatible."""
    record, ack = Record("wl"), None
    source: tuple[int, str, int] | None = None
    session: tuple[int, str] | None = None
    heard = False
    number = 0
    for step in [*steps, "grant"]:
        if step == "grant":
            assert suspicion.at_handshake(record, ack, greet(source)) is None
            epoch = record.epoch + 1
            session, heard, number = (epoch, f"{epoch:032x}"), False, 0
            record = replace(remembered(epoch, session[1]), written=record.written)
        elif session is None:
            continue
        elif step == "hear":
            source, heard = (session[0], session[1], 0), True
        elif step == "data" and heard:  # the source sends only after it has noted the session
            record = sent(record, session[0])
        elif step == "ack" and heard:
            number += 1
            ack = Ack(session[0], number, session[1], G1)
        elif step == "hear_ack" and heard and ack is not None and ack.epoch == session[0]:
            source = (session[0], session[1], ack.ack)
        elif step == "crash":
            session = None
