# SPDX-License-Identifier: GPL-3.0-or-later
"""When tracking may go on without suspicion: only when it is proved that no write was missed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from bmigrate.breqd import cleanflag, track
from bmigrate.breqd.track import Facts, Track, Verdict, judge
from bmigrate.common import blockdev, faults, paths
from bmigrate.common.blockdev import WriteCounters
from bmigrate.common.errors import DefectError
from bmigrate.handover import early

IDENTITY = {"size_bytes": 4096, "serial": "s"}
QUIET = WriteCounters(0, 0, 0, 0, True)
FLAG = {"identity": IDENTITY, "map_id": "m", "bitmap_crc": 7, "superblock_digest": "d"}
KNOWN = Track("w", "v", identity=IDENTITY, map_id="m", boot_id="old", attachment="a1")
CLEAN = Facts("new", IDENTITY, QUIET, map_id="m", bitmap_crc=7, flag=FLAG, superblock_digest="d")


def test_the_clean_flag_is_believed_when_everything_agrees() -> None:
    assert judge(KNOWN, CLEAN) == Verdict("keep", None)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"flag": None}, "not closed in good order"),
        ({"flag": None, "boot_id": "old"}, "in this boot"),
        ({"counters": WriteCounters(3, 24, 0, 0, True)}, "3 writes of 24 sectors"),
        ({"counters": WriteCounters(0, 0, 2, 16, True)}, "2 discards"),
        ({"counters": WriteCounters(0, 0, 0, 0, False)}, "iostats"),
        ({"superblock_digest": "e"}, "first or last MiB"),
        ({"superblock_digest": None, "flag": {**FLAG, "superblock_digest": None}}, "first or last MiB"),
        ({"bitmap_crc": 8}, "bitmap file changed"),
        ({"flag": {**FLAG, "map_id": "n"}}, "bitmap file changed"),
        ({"flag": {**FLAG, "identity": {"size_bytes": 4096, "serial": "t"}}}, "serial was 't', is 's'"),
    ],
)
def test_each_missing_proof_is_a_suspicion_that_keeps_the_marks(change: dict[str, Any], why: str) -> None:
    verdict = judge(KNOWN, dataclasses.replace(CLEAN, **change))
    assert verdict.bitmap == "keep" and verdict.suspect is not None and why in verdict.suspect


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"map_id": None, "bitmap_error": "torn"}, "torn"),
        ({"map_id": "other"}, "not the one"),
        ({"identity": {"size_bytes": 8192, "serial": "s"}}, "8192 bytes, it had 4096"),
        ({"identity": {"size_bytes": 4096, "serial": "t"}}, "another one: serial was 's', is 't'"),
    ],
)
def test_marks_of_another_map_or_device_are_not_taken_over(change: dict[str, Any], why: str) -> None:
    verdict = judge(KNOWN, dataclasses.replace(CLEAN, **change))
    assert verdict.bitmap == "empty" and verdict.suspect is not None and why in verdict.suspect


def test_the_very_same_attachment_goes_on_whatever_was_written() -> None:
    facts = dataclasses.replace(
        CLEAN, boot_id="old", attachment="a1", flag=None, counters=WriteCounters(9, 9, 9, 9, False)
    )
    assert judge(KNOWN, facts) == Verdict("keep", None)
    assert judge(KNOWN, dataclasses.replace(facts, events="removed")).suspect == "removed"
    for change in ({"attachment": "a2"}, {"attachment": None}, {"boot_id": "new"}):
        assert judge(KNOWN, dataclasses.replace(facts, **change)).suspect is not None


def test_no_map_at_all_means_all_dirty_and_no_suspicion() -> None:
    assert judge(None, Facts("b", IDENTITY, WriteCounters(5, 5, 0, 0, False))) == Verdict("all_dirty", None)
    assert judge(KNOWN, dataclasses.replace(CLEAN, map_id=None)) == Verdict("all_dirty", None)
    assert judge(None, CLEAN).suspect is not None, "a map without a record proves nothing"


@pytest.fixture
def roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """State and run directories of this test's own."""
    monkeypatch.setenv("BMIGRATE_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("BMIGRATE_RUN", str(tmp_path / "run"))
    return tmp_path


def test_a_record_comes_back_whole_and_damage_is_named(roots: Path) -> None:
    item = Track("w", "v", suspicions=2)
    item.raise_suspicion("first")
    item.raise_suspicion("second")
    item.save()
    again = track.load("w", "v")
    assert again == item and again is not None and again.suspect is not None
    assert (again.suspect["reason"], again.suspicions) == ("first", 4)
    assert track.load_all() == ([item], [])
    track.track_file("w", "v").write_text("{")
    with pytest.raises(DefectError):
        track.load("w", "v")
    assert [error.reason for error in track.load_all()[1]] == ["damaged"]
    track.track_file("w", "v").write_text(json.dumps({"schema": 99}))
    with pytest.raises(DefectError):
        track.load("w", "v")


def _token(content: Any) -> Path:
    path = paths.clean_token("w", "v")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_a_token_is_gone_before_it_is_believed(roots: Path) -> None:
    flag = {"schema": 1, "workload": "w", "volume": "v", **FLAG}
    token = _token({"boot_id": blockdev.boot_id(), "flag": flag})
    assert cleanflag.use_up("w", "v") == flag
    assert not token.exists() and cleanflag.use_up("w", "v") is None


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        {"boot_id": "another boot", "flag": {"schema": 1, "workload": "w", "volume": "v"}},
        {"boot_id": "now", "flag": None},
        {"boot_id": "now", "flag": {"schema": 2, "workload": "w", "volume": "v"}},
        {"boot_id": "now", "flag": {"schema": 1, "workload": "w", "volume": "other"}},
    ],
)
def test_a_token_that_is_not_quite_right_is_used_up_and_not_believed(
    roots: Path, monkeypatch: pytest.MonkeyPatch, content: Any
) -> None:
    monkeypatch.setattr(blockdev, "boot_id", lambda: "now")
    token = _token(content)
    assert cleanflag.use_up("w", "v") is None and not token.exists()


def test_the_flag_that_the_early_unit_moves_is_the_one_that_breqd_believes(roots: Path) -> None:
    """Both sides of the token's format, which two programs share."""
    paths.state_dir("w").mkdir(parents=True)
    cleanflag.write("w", "v", FLAG)
    early.retire_all()
    assert not paths.clean_flag("w", "v").exists()
    flag = cleanflag.use_up("w", "v")
    assert flag is not None
    assert judge(KNOWN, dataclasses.replace(CLEAN, flag=flag)) == Verdict("keep", None)


def test_a_flag_that_cannot_be_written_is_not_there(roots: Path) -> None:
    paths.state_dir("w").mkdir(parents=True)
    faults.configure("breqd.clean_flag=error:28")
    try:
        with pytest.raises(OSError):
            cleanflag.write("w", "v", FLAG)
    finally:
        faults.configure("")
    assert not paths.clean_flag("w", "v").exists() and cleanflag.withdraw("w", "v") is False
