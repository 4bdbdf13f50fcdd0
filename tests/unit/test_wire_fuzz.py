# SPDX-License-Identifier: GPL-3.0-or-later
"""The receiver's code under hostile frames: a short run of ``make test-fuzz``, and that such a run sees a defect."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from bmigrate.receive.volumes import StandbyVolume
from bmigrate.wire import frames
from tests.fuzz.frames import Fuzzer


@pytest.fixture
def fuzzer(tmp_path: Path) -> Iterator[Fuzzer]:
    """With a new seed each time; a failure names it."""
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}: python3 -m tests.fuzz --seed {seed}")
    made = Fuzzer(tmp_path, seed)
    yield made
    made.close()


def test_hostile_frames_are_refused_and_nothing_lands_out_of_bounds(fuzzer: Fuzzer) -> None:
    counts = fuzzer.run(20_000)
    assert counts.sent >= 20_000
    assert counts.accepted > counts.sent // 10, "a run in which nothing gets through tests only the first check"
    assert counts.refused > counts.streams // 10


def test_a_missing_check_of_bounds_is_seen(fuzzer: Fuzzer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StandbyVolume, "check", lambda self, what, offset, length: None)
    with pytest.raises((AssertionError, OSError, OverflowError)):
        fuzzer.run(20_000)


def test_a_missing_check_of_the_table_is_seen(fuzzer: Fuzzer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "_check_table", lambda frame: None)
    monkeypatch.setattr(StandbyVolume, "check_extents", lambda self, parts: None)
    monkeypatch.setattr(StandbyVolume, "check", lambda self, what, offset, length: None)
    with pytest.raises((AssertionError, OSError, OverflowError, ValueError)):
        fuzzer.run(20_000)
