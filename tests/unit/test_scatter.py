# SPDX-License-Identifier: GPL-3.0-or-later
"""Small transfers several at a time: each item once, nothing under way afterwards, and threads only where they help."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bmigrate.common import scatter as module
from bmigrate.common.scatter import PROBES, WORKERS, Scatter

MANY = 10 * WORKERS


@pytest.fixture
def scatter() -> Iterator[Scatter]:
    """One that is closed."""
    made = Scatter("test")
    yield made
    made.close()


class Inside:
    """Counts who is in it at once; ``most`` is the largest number seen."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.now = self.most = 0

    def __enter__(self) -> Inside:
        with self.changed:
            self.now += 1
            self.most = max(self.most, self.now)
            self.changed.notify_all()
        return self

    def __exit__(self, *_: object) -> None:
        with self.changed:
            self.now -= 1
            self.changed.notify_all()


@given(st.integers(0, 3 * WORKERS), st.booleans())
def test_every_item_is_done_once(count: int, slow: bool) -> None:
    """However many there are, and however long they take."""
    scatter, done, lock = Scatter("test"), Counter[int](), threading.Lock()

    def act(item: int) -> None:
        if slow:
            time.sleep(0.001)
        with lock:
            done[item] += 1

    try:
        for _ in range(2):
            scatter.each(act, range(count))
    finally:
        scatter.close()
    assert done == Counter(dict.fromkeys(range(count), 2))


def test_a_slow_device_gets_several_at_once(scatter: Scatter) -> None:
    """Each waits until all threads are in it; one after the other, nobody would come."""
    inside, met = Inside(), threading.Event()

    def act(item: int) -> None:
        with inside:
            if item < PROBES:
                time.sleep(0.002)
                return
            with inside.changed:
                if inside.changed.wait_for(lambda: inside.now == WORKERS or met.is_set(), 60):
                    met.set()

    scatter.each(act, range(MANY))
    assert inside.most == WORKERS and inside.now == 0


def test_a_fast_device_is_served_by_the_caller(scatter: Scatter, monkeypatch: pytest.MonkeyPatch) -> None:
    """No thread is made."""
    monkeypatch.setattr(module.time, "perf_counter", lambda: 5.0)
    who: set[int] = set()
    scatter.each(lambda item: who.add(threading.get_ident()), range(MANY))
    assert who == {threading.get_ident()} and scatter._pool is None


@pytest.mark.parametrize("bad", [0, PROBES - 1, PROBES, MANY - 1])
def test_what_fails_is_raised_when_nothing_is_under_way(scatter: Scatter, bad: int) -> None:
    """And the next call works."""
    inside = Inside()

    def act(item: int) -> None:
        with inside:
            time.sleep(0.001)
            if item == bad:
                raise OSError(5, "broken")

    with pytest.raises(OSError, match="broken"):
        scatter.each(act, range(MANY))
    assert inside.now == 0
    scatter.each(act, range(bad))


def test_a_session_that_is_over_ends_the_work(scatter: Scatter, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is called beside the items raises: those not begun are left out, and it comes when the others are done."""
    monkeypatch.setattr(module, "_ALIVE_SECONDS", 0.01)
    inside, asked, done = Inside(), threading.Event(), []

    def act(item: int) -> None:
        with inside:
            if item < PROBES:
                time.sleep(0.002)
            else:
                assert asked.wait(60)
            done.append(item)

    def alive() -> None:
        if len(done) >= PROBES and inside.now:
            asked.set()
            raise ConnectionError("nobody is there")

    with pytest.raises(ConnectionError):
        scatter.each(act, range(MANY), alive)
    assert inside.now == 0 and PROBES <= len(done) < MANY


def test_each_thread_is_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before its first item."""
    prepared = threading.local()
    wrong: list[int] = []

    def prepare() -> None:
        prepared.yes = True

    def act(item: int) -> None:
        time.sleep(0.001)
        if item >= PROBES and not getattr(prepared, "yes", False):
            wrong.append(item)

    scatter = Scatter("test", prepare)
    try:
        scatter.each(act, range(MANY))
    finally:
        scatter.close()
    assert not wrong
