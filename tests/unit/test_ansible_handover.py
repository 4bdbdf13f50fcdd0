# SPDX-License-Identifier: GPL-3.0-or-later
"""The handover and shipping modules: the command line they build, and what they make of the answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.unit.ansible_module import Programs, envelope, run_module

X = {"number": 2, "id": "a" * 32}


@pytest.fixture
def programs(tmp_path: Path) -> Programs:
    return Programs(tmp_path / "bin")


def step(programs: Programs, name: str, check: bool = False, **options: Any) -> dict[str, Any]:
    words = {"step": name, "workload": "w", "run_id": "r1", **options}
    return run_module("bmigrate_handover", words, programs, check=check)


BASE = ["--workload", "w", "--run-id", "r1"]
CASES = [
    ("begin", {"expect": "idle"}, [*BASE, "--expect", "idle"]),
    ("converge", {}, BASE),
    ("quiesce", {"expect": "begun"}, [*BASE, "--expect", "begun"]),
    ("drain", {}, BASE),
    (
        "prepare",
        {"candidate": X, "digest": "d"},
        [*BASE, "--candidate", f'{{"id": "{"a" * 32}", "number": 2}}', "--digest", "d"],
    ),
    ("commit", {"candidate": X}, [*BASE, "--candidate", f'{{"id": "{"a" * 32}", "number": 2}}']),
    ("promote", {"certificate": {"run_id": "r1"}}, [*BASE, "--certificate", '{"run_id": "r1"}']),
    (
        "promote",
        {"certificate": {"a": 1}, "accept_unheld": True},
        [*BASE, "--certificate", '{"a": 1}', "--accept-unheld"],
    ),
    ("start", {}, BASE),
    ("finish", {}, BASE),
    ("cancel", {"abandoned": [X]}, [*BASE, "--abandoned", f'[{{"id": "{"a" * 32}", "number": 2}}]']),
]


@pytest.mark.parametrize("name, options, words", CASES)
def test_a_step_is_one_call_with_the_documented_words(
    programs: Programs, name: str, options: dict[str, Any], words: list[str]
) -> None:
    programs.add("bmigrate", ["handover", 0, envelope({"phase": "p"}, changed=True)])
    answer = step(programs, name, **options)
    assert programs.calls() == [["bmigrate", "handover", name, *words, "--json"]]
    assert answer["changed"] is True and answer["rc"] == 0 and answer["data"] == {"phase": "p"}


def test_steps_of_one_host_share_a_call_of_the_module_and_stop_at_the_first_failure(programs: Programs) -> None:
    later = [{"step": "drain", "expect": "quiesced"}]
    programs.add(
        "bmigrate",
        ["handover quiesce", 0, envelope({"phase": "quiesced"}, changed=True)],
        ["handover drain", 0, envelope({"result": {"digest": "d"}}, changed=False)],
    )
    answer = step(programs, "quiesce", expect="begun", then=later)
    assert [call[2] for call in programs.calls()] == ["quiesce", "drain"]
    assert programs.calls()[1] == ["bmigrate", "handover", "drain", *BASE, "--expect", "quiesced", "--json"]
    assert answer["changed"] is True and answer["data"] == {"result": {"digest": "d"}}
    error = {"code": "rolled_back", "message": "given up"}
    programs.add("bmigrate", ["handover quiesce", 7, envelope(error=error)])
    before = len(programs.calls())
    answer = step(programs, "quiesce", expect="begun", then=later)
    assert answer["failed"] is True and [call[2] for call in programs.calls()[before:]] == ["quiesce"]


def test_a_repeated_step_reports_no_change(programs: Programs) -> None:
    programs.add("bmigrate", ["handover", 0, envelope({"result": {"digest": "d"}}, changed=False)])
    answer = step(programs, "drain")
    assert answer["changed"] is False and answer["data"]["result"] == {"digest": "d"}


@pytest.mark.parametrize(
    "rc, code",
    [
        (2, "usage"),
        (3, "refused"),
        (4, "unreachable"),
        (5, "suspect"),
        (6, "phase"),
        (7, "rolled_back"),
        (70, "defect"),
    ],
)
def test_an_exit_code_becomes_a_failure_that_says_what_where_and_what_to_do(
    programs: Programs, rc: int, code: str
) -> None:
    error = {
        "code": code,
        "reason": "busy",
        "message": "it is open",
        "volume": "v",
        "host": "alpha",
        "hint": "close it",
    }
    programs.add("bmigrate", ["handover quiesce", rc, envelope(error=error)])
    answer = step(programs, "quiesce")
    assert answer["failed"] is True and answer["rc"] == rc
    assert (answer["code"], answer["reason"]) == (code, "busy")
    assert answer["msg"] == "it is open (volume v, host alpha) -- close it"


def test_resume_ends_with_rolled_back_and_that_is_success(programs: Programs) -> None:
    error = {"code": "rolled_back", "message": "given up"}
    programs.add("bmigrate", ["handover resume", 7, envelope({"role": "primary"}, changed=True, error=error)])
    answer = step(programs, "resume", reason="test")
    assert "failed" not in answer and answer["rolled_back"] is True and answer["changed"] is True
    assert programs.calls()[0][-3:] == ["--reason", "test", "--json"]


def test_preflight_with_a_blocker_is_an_answer_and_not_a_failure(programs: Programs) -> None:
    blocker = {"reason": "fstab", "message": "fstab mounts it", "volume": None, "host": "alpha", "hint": "remove it"}
    data = {"blockers": [blocker], "warnings": [], "prediction": {}}
    programs.add("bmigrate", ["handover preflight", 3, envelope(data, error={"code": "refused", "message": "no"})])
    answer = run_module("bmigrate_handover", {"step": "preflight", "workload": "w", "peer_facts": {"a": 1}}, programs)
    assert "failed" not in answer and answer["changed"] is False
    assert answer["data"]["blocker_texts"] == ["fstab mounts it (host alpha) -- remove it"]
    assert "--peer-facts" in programs.calls()[0]


def test_check_mode_asks_and_never_runs_the_step(programs: Programs) -> None:
    state = {"role": "primary", "handover": {"run_id": "r1", "phase": "quiesced", "results": {"quiesce": {}}}}
    programs.add("bmigrate", ["handover discover", 0, envelope({"state": state})])
    assert step(programs, "drain", check=True)["changed"] is True
    assert step(programs, "quiesce", check=True)["changed"] is False
    assert {call[2] for call in programs.calls()} == {"discover"}


def test_an_answer_that_is_not_the_documented_form_is_a_failure(programs: Programs) -> None:
    programs.add("bmigrate", ["handover", 0, "Traceback: something"])
    answer = step(programs, "begin")
    assert answer["failed"] is True and "documented form" in answer["msg"]


def test_a_host_without_the_program_is_named_as_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    answer = step(Programs(tmp_path), "begin")
    assert answer["failed"] is True and "install.yml" in answer["msg"] and answer["code"] == "not_installed"


@pytest.mark.parametrize(
    "name, missing", [("prepare", "candidate"), ("commit", "candidate"), ("promote", "certificate")]
)
def test_a_step_without_what_it_needs_calls_nothing(programs: Programs, name: str, missing: str) -> None:
    programs.add("bmigrate")
    answer = step(programs, name)
    assert answer["failed"] is True and missing in answer["msg"] and programs.calls() == []


def test_a_step_without_a_run_id_calls_nothing(programs: Programs) -> None:
    programs.add("bmigrate")
    answer = run_module("bmigrate_handover", {"step": "quiesce", "workload": "w"}, programs)
    assert answer["failed"] is True and "run_id" in answer["msg"] and programs.calls() == []


@pytest.mark.parametrize("name, role", [("init", "primary"), ("adopt", "standby")])
def test_a_first_role_is_given_once(programs: Programs, name: str, role: str) -> None:
    options = {"step": name, "workload": "w", "generation": X, "overwrite": "w"}
    discovered = ["handover discover", 0, envelope({"state": None, "role": "none"})]
    programs.add("bmigrate", discovered, [name, 0, envelope({"generation": X}, changed=True)])
    assert run_module("bmigrate_handover", options, programs)["changed"] is True
    call = next(call for call in programs.calls() if call[1] == name)
    assert ("--overwrite" in call) == (name == "adopt")
    programs.add("bmigrate", ["handover discover", 0, envelope({"state": {"role": role}, "role": role})])
    before = len(programs.calls())
    assert run_module("bmigrate_handover", options, programs)["changed"] is False
    assert [call[1] for call in programs.calls()[before:]] == ["handover"]


def ship_status(state: str) -> list[Any]:
    return ["status", 0, envelope({"workloads": [{"workload": "w", "ship": {"state": state}}]})]


def test_waiting_for_in_step_is_bounded(programs: Programs) -> None:
    programs.add("bmigrate", ["sync", 0, envelope({"state": "in_step"}, changed=True)])
    answer = run_module("bmigrate_ship", {"workload": "w", "state": "in_step", "timeout_seconds": 7}, programs)
    assert programs.calls() == [["bmigrate", "sync", "--workload", "w", "--wait", "--timeout", "7", "--json"]]
    assert answer["changed"] is True and answer["data"]["state"] == "in_step"


@pytest.mark.parametrize("wanted, word", [("paused", "pause"), ("shipping", "resume")])
def test_pause_and_resume_report_what_changed(programs: Programs, wanted: str, word: str) -> None:
    for changed in (True, False):
        programs.add("bmigrate", ship_status("paused"), [word, 0, envelope({"state": wanted}, changed=changed)])
        assert run_module("bmigrate_ship", {"workload": "w", "state": wanted}, programs)["changed"] is changed


@pytest.mark.parametrize(
    "wanted, now, changed",
    [
        ("paused", "in_step", True),
        ("paused", "paused", False),
        ("shipping", "paused", True),
        ("shipping", "in_step", False),
    ],
)
def test_check_mode_of_shipping_only_reads(programs: Programs, wanted: str, now: str, changed: bool) -> None:
    programs.add("bmigrate", ship_status(now))
    assert run_module("bmigrate_ship", {"workload": "w", "state": wanted}, programs, check=True)["changed"] is changed
    assert {call[1] for call in programs.calls()} == {"status"}


def test_a_difference_found_by_verify_is_a_failure(programs: Programs) -> None:
    error = {"code": "refused", "reason": "different", "message": "4 KiB differ", "hint": "find out who wrote"}
    programs.add("bmigrate", ["verify", 3, envelope({"different_bytes": 4096}, error=error)])
    answer = run_module("bmigrate_ship", {"workload": "w", "state": "verified"}, programs)
    assert answer["failed"] is True and answer["reason"] == "different" and answer["data"]["different_bytes"] == 4096
