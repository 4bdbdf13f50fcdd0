# SPDX-License-Identifier: GPL-3.0-or-later
"""What of the campaign needs no guests: what counts, what is left to do, whom a fault hits, the judge's third rule."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest

from lab import LabError
from tests.campaign import __main__ as program
from tests.campaign import judge, tally
from tests.campaign.faults import FAULTS, Fault, schedule
from tests.vm import processes, rig


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


def test_the_campaign_goes_on_until_as_many_have_happened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


class _Judged(program.Campaign):
    """One whose hosts are not there."""

    def _hosts(self) -> Any:
        return None

    def _logs(self) -> dict[str, str]:
        return {}

    def _leave(self) -> None:
        pass


def test_what_breaks_a_rule_has_happened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault that finds the loss itself, before it is over, counts; one that got stuck does not."""

    class Stage:
        def __init__(self, *_: object) -> None:
            self.details = dict[str, Any]()

        def start(self) -> None:
            pass

    def lose(stage: Any) -> bool:
        raise judge.Violation("a block is lost")

    def hang(stage: Any) -> bool:
        raise LabError("waited in vain")

    monkeypatch.setenv("BMIGRATE_LAB", "none")
    monkeypatch.setattr(program, "Stage", Stage)
    monkeypatch.setattr(judge, "nothing_false_is_said", lambda stage: None)
    made = _Judged(1, [], 1, tmp_path / "1.jsonl")
    broken, stuck = (made._one(0, Fault("f", 1, act)) for act in (lose, hang))
    assert (broken["verdict"], broken["happened"]) == ("BROKEN", True)
    assert (stuck["verdict"], stuck["happened"]) == ("STUCK", False)
    monkeypatch.setattr(judge, "nothing_false_is_said", lose)
    worse = made._one(0, Fault("f", 1, hang))
    assert worse["verdict"] == "BROKEN" and worse["why"].startswith("a block is lost; before that: waited in vain")


def test_kinds_that_there_are_none_of_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["--only", "no such kind", "--list"]) == 2
    assert program.main(["--only", "power of the", "--faults", "4", "--list"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert len(listed) == 4 and all("power of the" in line for line in listed)


def test_the_campaigns_sessions_have_several_streams() -> None:
    given = {item["workload"]: item for item in rig.workloads(3)}
    assert given[rig.WORKLOAD]["streams"] == 3 and "streams" not in given["pgdemo"]
    assert set(given[rig.WORKLOAD]["hosts"]) == set(rig.HOSTS), "the hosts are a template that nobody fills in"


class _Agent:
    def __init__(self, processes: list[dict[str, Any]]) -> None:
        self.processes = processes

    def call(self, do: str) -> list[dict[str, Any]]:
        assert do == "processes"
        return self.processes


def _process(pid: int, parent: int, name: str, *argv: str) -> dict[str, Any]:
    return {"pid": pid, "parent": parent, "name": name, "argv": argv or (name,), "ticks": 1000 - pid, "state": "S"}


def test_any_of_several_receivers_may_be_hit() -> None:
    """And the sshd above the one that was chosen."""
    everything = [_process(1, 0, "systemd"), _process(50, 1, "sshd")]
    for stream in range(3):
        everything += [
            _process(100 + stream, 50, "sshd"),
            _process(200 + stream, 100 + stream, "sh", "sh", "-c", "breceive"),
            _process(300 + stream, 200 + stream, "python3", "/usr/bin/python3", "/usr/sbin/breceive"),
        ]
    fake: Any = type("Rig", (), {"agents": {"beta": _Agent(everything)}})()
    chance = random.Random(3)
    assert {processes.find(fake, "beta", "breceive", chance)["pid"] for _ in range(40)} == {300, 301, 302}
    assert {processes.find(fake, "beta", "ssh-server", chance)["pid"] for _ in range(40)} == {100, 101, 102}
    assert processes.find(fake, "beta", "breceive")["pid"] == 302, "not the oldest"
    everything[:] = everything[:2]
    assert processes.find(fake, "beta", "breceive", chance) == {} == processes.find(fake, "beta", "ssh-server")


class _Blind:
    """A stage whose hosts differ, with a shipper that says what it is told to."""

    def __init__(self, *says: tuple[str, int]) -> None:
        self.says, self.primary, self.details = list(says), "alpha", dict[str, Any]()
        self.rig: Any = self
        self.lab: Any = self

    def marked_blocks(self, host: str) -> set[int]:
        return {7}

    def different_blocks(self) -> list[int]:
        return [7]

    def flush(self, host: str, disk: int) -> None:
        pass

    def status_of_session(self) -> dict[str, Any]:
        state, left = self.says.pop(0) if len(self.says) > 1 else self.says[0]
        return {"state": state, "bytes_left": left}


def test_in_step_may_not_be_said_while_blocks_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for longer than it takes to notice that the peer is gone."""
    monkeypatch.setattr(judge, "NOTICED_SECONDS", 0.05)
    monkeypatch.setattr(judge, "LOOK_SECONDS", 0.01)
    for honest in (_Blind(("in_step", 4096)), _Blind(("disconnected", 0)), _Blind(("in_step", 0), ("disconnected", 0))):
        judge.nothing_is_missing(honest)  # type: ignore[arg-type]
    with pytest.raises(judge.Violation, match="in step with nothing left"):
        judge.nothing_is_missing(_Blind(("in_step", 0)))  # type: ignore[arg-type]
