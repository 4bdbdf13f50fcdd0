# SPDX-License-Identifier: GPL-3.0-or-later
"""receive.ack: the last whole note is found whatever a power cut left behind."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bmigrate.receive import ackfile
from bmigrate.receive.ackfile import SLOT_BYTES, Ack, AckFile

SESSION, GENERATION = "d" * 32, "a" * 32


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BMIGRATE_STATE", str(tmp_path))
    (tmp_path / "wl").mkdir()
    return tmp_path / "wl" / "receive.ack"


def test_no_file_is_no_note(state: Path) -> None:
    assert ackfile.read("wl") is None
    AckFile("wl", 1, SESSION, GENERATION).close()
    assert ackfile.read("wl") is None  # opened, nothing acknowledged


def test_notes_are_read_back_across_sessions(state: Path) -> None:
    for epoch in (1, 2, 3):
        acks = AckFile("wl", epoch, SESSION, GENERATION)
        for number in range(1, 4):
            acks.note(number)
            assert ackfile.read("wl") == Ack(epoch, number, SESSION, GENERATION)
            slots = [ackfile.decode(state.read_bytes()[at:][:SLOT_BYTES]) for at in (0, SLOT_BYTES)]
            if number > 1:  # what was acknowledged before stays whole while the next note is written
                assert {slot.ack for slot in slots if slot is not None} == {number - 1, number}
        acks.close()
    assert len(state.read_bytes()) == 2 * SLOT_BYTES


@settings(deadline=None)
@given(torn=st.integers(0, SLOT_BYTES), notes=st.integers(1, 5), junk=st.binary(min_size=1, max_size=1))
def test_a_torn_note_leaves_the_one_before(torn: int, notes: int, junk: bytes) -> None:
    """Power is cut in the middle of writing note N+1: note N (or N+1, when all of it arrived) is what is read."""
    slots = [b"\0" * SLOT_BYTES, b"\0" * SLOT_BYTES]
    for number in range(1, notes + 1):
        slots[number % 2] = ackfile.encode(Ack(7, number, SESSION, GENERATION))
    fresh = ackfile.encode(Ack(7, notes + 1, SESSION, GENERATION))
    at = (notes + 1) % 2
    slots[at] = fresh[:torn] + (junk * SLOT_BYTES)[torn:]
    found = ackfile.latest(b"".join(slots))
    assert found is not None and found.ack in (notes, notes + 1)
    assert (found.ack == notes + 1) == (slots[at][:60] == fresh[:60])


def test_the_youngest_whole_note_is_never_overwritten_first(state: Path) -> None:
    for start in (1, 2):
        acks = AckFile("wl", start, SESSION, GENERATION)
        for number in range(1, start + 2):
            acks.note(number)
        acks.close()
        before = state.read_bytes()
        last = ackfile.latest(before)
        again = AckFile("wl", start + 10, SESSION, GENERATION)
        again.note(1)
        again.close()
        after = state.read_bytes()
        kept = [after[at : at + SLOT_BYTES] for at in (0, SLOT_BYTES)]
        assert last is not None and ackfile.encode(last) in kept


def test_a_damaged_file_is_no_note_but_still_usable(state: Path) -> None:
    state.write_bytes(b"junk")
    assert ackfile.read("wl") is None
    acks = AckFile("wl", 1, SESSION, GENERATION)
    acks.note(1)
    acks.close()
    assert ackfile.read("wl") == Ack(1, 1, SESSION, GENERATION)
