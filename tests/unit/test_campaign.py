# SPDX-License-Identifier: GPL-3.0-or-later
"""The campaign's book-keeping: what counts, what is left to do, and that a seed says the same every time."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest

from tests.campaign import __main__ as program
from tests.campaign import tally
from tests.campaign.faults import FAULTS, Fault, schedule


def result(number: int, happened: bool = True, verdict: str = "held", **details: Any) -> tally.Result:
    name = f"kind {number % 2}"
    return {
        "number": number, "fault": name, "happened": happened, "verdict": verdict, "details": details, "seconds": 30.0,
    }  # fmt: skip


def test_only_what_happened_counts() -> None:
    results = [result(0), result(1, happened=False), result(2), result(3)]
    assert tally.happened(results) == 3
    assert tally.until(results, 2) == results[:3]
    assert tally.until(results, 1) == results[:1]
    assert tally.until(results, 9) == results
    assert tally.until(results[:2], 1) == results[:1]
    assert tally.progress(results[:1], 2).startswith('1/2: {"number": 0')
    assert tally.progress(results[:3], 2).startswith("2/2, 3 tried: ")


def test_the_table_counts_the_same_and_hides_nothing() -> None:
    missed = result(1, happened=False, verdict="STUCK", differ=7)
    rows = tally.table([result(0, differ=5), missed]).splitlines()
    assert rows[1].split() == ["kind", "0", "1", "1", "0", "0", "30.0"]
    assert rows[2].split() == ["kind", "1", "0", "0", "0", "1", "30.0"]
    assert rows[-1].startswith("1 faults happened, 1 more were not reached; 1 held, 0 broken, 1 stuck; 5 blocks")


def test_results_on_file_are_gone_on_with() -> None:
    names = ["kind 0", "kind 1"] * 5
    results = [result(number, happened=number != 1) for number in range(4)]
    text = "".join(json.dumps(item) + "\n" for item in results)
    assert tally.read(text, names) == results
    assert tally.read(text[:-20], names) == results[:3], "a line that was cut short counted"
    assert tally.read("", names) == []
    with pytest.raises(tally.OtherSchedule, match=r"'kind 0'.*'other'"):
        tally.read(text, ["kind 0", "kind 1", "other", "kind 1"])


def test_every_kind_is_in_the_first_deck_and_a_seed_repeats() -> None:
    deck = sum(fault.weight for fault in FAULTS)

    def first(seed: int, count: int) -> list[Fault]:
        return list(itertools.islice(schedule(seed), count))

    assert first(3, 40) == first(3, 3 * deck)[:40]
    assert {fault.name for fault in first(3, deck)} == {fault.name for fault in FAULTS}
    assert first(3, deck) != first(4, deck)
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)


class _Played(program.Campaign):
    """One whose faults need no guests."""

    def __init__(self, *arguments: Any, missed: set[int]) -> None:
        super().__init__(*arguments)
        self.missed, self.tried = missed, list[int]()

    def _one(self, number: int, fault: Fault) -> tally.Result:
        self.tried.append(number)
        return {**result(number, happened=number not in self.missed), "fault": fault.name}

    def _leave(self) -> None:
        pass


def test_the_campaign_goes_on_until_as_many_have_happened(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BMIGRATE_LAB", "none")
    file, faults = tmp_path / "1.jsonl", list(itertools.islice(schedule(1), tally.most_tries(6)))
    first = _Played(1, faults, 3, file, missed={1, 2})
    assert [item["number"] for item in first.run()] == [0, 1, 2, 3, 4]
    again = _Played(1, faults, 6, file, missed={1, 2})
    assert tally.happened(again.run()) == 6 and again.tried == [5, 6, 7]
    shorter = _Played(1, faults, 2, file, missed=set())
    assert [item["number"] for item in shorter.run()] == [0, 1, 2, 3] and not shorter.tried
    never = _Played(1, faults, 30, tmp_path / "2.jsonl", missed=set(range(1, 99)))
    assert len(never.run()) == len(faults)


def test_kinds_that_there_are_none_of_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["--only", "no such kind", "--list"]) == 2
    assert program.main(["--only", "power of the", "--faults", "4", "--list"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert len(listed) == 4 and all("power of the" in line for line in listed)
