# SPDX-License-Identifier: GPL-3.0-or-later
"""What a shipper that does not run makes of its passes: how gently it goes on, and what it tells of them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from bmigrate.common.state import WorkloadState
from bmigrate.ship.engine import Engine
from bmigrate.ship.passes import PassResult
from bmigrate.ship.session import Session
from bmigrate.ship.tracker import Snapshot, Tracked

GIB = 1 << 30


def _snapshot(left_bytes: int, discarded_bytes: int = 0, counting: str = "i1") -> Snapshot:
    tracked = Tracked(
        name="data", size_bytes=GIB, granule_bytes=4096, dirty_bytes=left_bytes, claimed_bytes=0, suspect=None,
        attached=True, attachment_id="a1", oldest_dirty_age_seconds=0.0, written_bytes=discarded_bytes, seed_count=0,
        highest_epoch=1, discarded_bytes=discarded_bytes,
    )  # fmt: skip
    return Snapshot(counting, {"data": tracked})


def _pass(engine: Engine, before: int, after: int, discarded: int = 0) -> None:
    """A complete pass that found and left so many bytes."""
    engine._passed(PassResult(), _snapshot(before), _snapshot(after, discarded))


def test_no_rest_from_the_first_pass_on_that_did_not_help(engine: Engine) -> None:
    """The second pass, which decides about losing ground, is not slowed down by us; one that helps ends the hurry."""
    _pass(engine, GIB, GIB)
    assert engine.trend.unhelpful == 1 and engine.pacer.losing, "the next pass would rest, and be called a loss"
    _pass(engine, GIB, GIB)
    assert engine.trend.unhelpful == 2 and engine.pacer.losing
    _pass(engine, GIB, GIB // 2)
    assert not engine.pacer.losing, "it helped: be polite again, at once"


def test_a_new_session_begins_politely(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was known of the session before says nothing of this one."""
    _pass(engine, GIB, GIB)
    assert engine.pacer.losing
    engine._state = WorkloadState("wl", "alpha", "primary", generation={"number": 1, "id": "g"})
    session = SimpleNamespace(epoch=2, close=lambda farewell: None)
    monkeypatch.setattr(Session, "open", lambda *_: session)
    seen: list[tuple[int, bool]] = []
    monkeypatch.setattr(engine, "_serve", lambda _: seen.append((engine.trend.unhelpful, engine.pacer.losing)))
    engine._one_session()
    assert seen == [(0, False)]
