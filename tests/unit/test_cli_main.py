# SPDX-License-Identifier: GPL-3.0-or-later
"""The command line: help that teaches, documented exit codes, one JSON object, light imports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bmigrate.cli import main as cli
from bmigrate.common import errors, paths
from bmigrate.common import state as states
from bmigrate.handover import source
from bmigrate.handover.host import Host

CONFIG = """\
workload: pg
host: alpha
hosts: {alpha: {address: 10.0.0.1}, beta: {address: 10.0.0.2}}
volumes: [{name: data, devices: {alpha: /dev/nothing-a, beta: /dev/nothing-b}}]
"""


@pytest.fixture
def configured(root: Path) -> Path:
    """A host with one configured workload."""
    (root / "etc" / "pg.yml").write_text(CONFIG)
    return root


def answer(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, Any]]:
    """Run a command with --json; its exit code and its one object."""
    code = cli.main([*words, "--json"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1, lines
    found: dict[str, Any] = json.loads(lines[0])
    assert set(found) == {"schema", "ok", "changed", "workload", "data", "error"}
    assert found["ok"] is (code == 0)
    return code, found


def test_help_shows_every_command_and_every_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--help"], ["handover", "--help"], ["init", "--help"], ["adopt", "--help"], ["units", "--help"]):
        with pytest.raises(SystemExit) as caught:
            cli.main(words)
        assert caught.value.code == 0
        text = capsys.readouterr().out
        for code, meaning in errors.EXIT_CODES:
            assert f"{code:>2}  {meaning}" in text, words
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    text = capsys.readouterr().out
    assert all(name in text for name in cli.COMMANDS)


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_every_command_has_help_of_its_own(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([name, "--help"])
    assert caught.value.code == 0
    assert len(capsys.readouterr().out.splitlines()) > 8


@pytest.mark.parametrize(
    "words",
    [
        ["handover", "leap", "--workload", "pg"],
        ["handover", "begin"],
        ["handover", "begin", "--workload", "../etc"],
        ["handover", "begin", "--workload", "pg"],
        ["handover", "begin", "--workload", "pg", "--run-id", "a b"],
        ["handover", "commit", "--workload", "pg", "--run-id", "r1", "--candidate", "{"],
        ["adopt", "--workload", "pg", "--generation", "[]"],
        ["nothing"],
        ["init", "--workload", "unknown"],
    ],
)
def test_a_wrong_command_line_is_usage(
    configured: Path, primary: states.WorkloadState, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    item = primary
    item.handover = {"run_id": "r1", "side": "source", "phase": "drained", "peer": "beta", "results": {},
                     "candidate": {"number": 2, "id": "x"}}  # fmt: skip
    states.save(item)
    code, found = answer(capsys, *words)
    assert code == 2 and found["error"]["code"] == "usage"
    assert found["error"]["message"]


def test_begin_is_done_once_and_repeats_its_answer(
    configured: Path, primary: states.WorkloadState, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["handover", "begin", "--workload", "pg", "--run-id", "r1", "--expect", "idle"]
    code, first = answer(capsys, *words)
    assert code == 0 and first["changed"] and first["data"]["phase"] == "begun"
    code, again = answer(capsys, *words)
    assert code == 0 and not again["changed"]
    assert again["data"]["result"] == first["data"]["result"]
    code, other = answer(capsys, "handover", "begin", "--workload", "pg", "--run-id", "r2")
    assert code == 3 and other["error"]["reason"] == "handover_open"
    code, wrong = answer(capsys, "handover", "drain", "--workload", "pg", "--run-id", "r1")
    assert code == 6 and wrong["error"]["reason"] == "wrong_phase"
    item = states.load("pg")
    assert item is not None and item.handover is not None and item.handover["phase"] == "begun"


def test_resume_answers_rolled_back_with_its_result(
    configured: Path, primary: states.WorkloadState, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Host, "hold", lambda self, op, **fields: {})
    monkeypatch.setattr(Host, "ship", lambda self, op, **fields: {})
    monkeypatch.setattr(Host, "disarm_dead_man", lambda self: None)
    answer(capsys, "handover", "begin", "--workload", "pg", "--run-id", "r1")
    for changed in (True, False):
        code, found = answer(capsys, "handover", "resume", "--workload", "pg", "--run-id", "r1", "--reason", "test")
        assert code == 7 and found["changed"] is changed
        assert found["error"]["code"] == "rolled_back" and found["data"]["phase"] == "idle"
    assert paths.primary_marker("pg").exists()


def test_a_host_without_a_role_is_refused_and_discover_still_answers(
    configured: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, found = answer(capsys, "handover", "begin", "--workload", "pg", "--run-id", "r1")
    assert code == 3 and found["error"]["reason"] == "not_initialised"
    code, found = answer(capsys, "handover", "discover", "--workload", "pg")
    assert code == 0 and found["data"]["role"] == "none" and found["data"]["state"] is None
    assert found["data"]["volumes"]["data"]["reason"] == "device_missing"
    assert found["data"]["breqd"]["error"]["code"] == "unreachable"


def test_preflight_names_every_blocker_and_changes_nothing(
    configured: Path, primary: states.WorkloadState, capsys: pytest.CaptureFixture[str]
) -> None:
    (paths.state_dir("pg") / "lock").write_text("4711\n")
    before = {path: path.read_bytes() for path in configured.rglob("*") if path.is_file()}
    code, found = answer(capsys, "handover", "preflight", "--workload", "pg")
    assert code == 3 and not found["changed"]
    assert {"daemon_down", "device_missing"} <= {item["reason"] for item in found["data"]["blockers"]}
    assert {path: path.read_bytes() for path in configured.rglob("*") if path.is_file()} == before


def test_judge_needs_both_hosts_and_answers_a_split_brain_with_its_own_code(
    configured: Path, primary: states.WorkloadState, capsys: pytest.CaptureFixture[str]
) -> None:
    assert answer(capsys, "handover", "judge", "--workload", "pg")[0] == 2
    peer: dict[str, Any] = {
        "host": "beta",
        "workload": "pg",
        "role": "primary",
        "phase": "idle",
        "history": [],
        "run_id": None,
    }
    code, found = answer(capsys, "handover", "judge", "--workload", "pg", "--peer-facts", json.dumps(peer))
    assert code == 6 and "two primaries" in found["error"]["message"]


def test_the_downtime_commands_import_nothing_heavy(configured: Path, primary: states.WorkloadState) -> None:
    """Start-up time is downtime: no NumPy, no schema validation, no other command."""
    program = (
        "import sys; from bmigrate.cli import main; "
        "main.main(['handover', 'begin', '--workload', 'pg', '--run-id', 'r1', '--json']); "
        "print(sorted(name for name in sys.modules if name.split('.')[0] in ('numpy', 'jsonschema', 'subprocess') "
        "or name in ('bmigrate.cli.status', 'bmigrate.handover.target', 'bmigrate.handover.preflight')))"
    )
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path))
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_an_unexpected_error_is_a_defect_in_the_documented_form(
    configured: Path, primary: states.WorkloadState, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:

    def broken(*_: Any) -> Any:
        raise ZeroDivisionError("broken")

    monkeypatch.setattr(source, "begin", broken)
    code, found = answer(capsys, "handover", "begin", "--workload", "pg", "--run-id", "r1")
    assert code == 70 and found["error"]["code"] == "defect"


def test_a_timer_of_a_run_that_is_over_ends_for_good(
    configured: Path, primary: states.WorkloadState, capsys: pytest.CaptureFixture[str]
) -> None:
    """Were it refused (3), systemd would repeat it every two seconds: 6 is one of its good ends."""
    answer(capsys, "handover", "begin", "--workload", "pg", "--run-id", "r2")
    words = ["handover", "resume", "--workload", "pg", "--run-id", "r1"]
    assert answer(capsys, *words, "--reason", "dead-man")[0] == 6
    assert answer(capsys, *words)[0] == 3


def test_a_full_disk_is_a_refusal_that_says_what_is_still_true(
    configured: Path, primary: states.WorkloadState, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:

    def full(item: states.WorkloadState) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(states, "save", full)
    code, found = answer(capsys, "handover", "begin", "--workload", "pg", "--run-id", "r1")
    assert code == 3 and found["error"]["reason"] == "os_error" and "No space left" in found["error"]["message"]


def test_discover_shows_only_what_is_durable(
    configured: Path, primary: states.WorkloadState, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A commit read between the rename and the fsync of a killed process must not promote the target."""
    synced: list[str] = []
    real = os.fsync

    def fsync(fd: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{fd}"))
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    assert answer(capsys, "handover", "discover", "--workload", "pg")[0] == 0
    assert synced[-1] == str(paths.state_dir("pg"))
