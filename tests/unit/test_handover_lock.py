# SPDX-License-Identifier: GPL-3.0-or-later
"""One step at a time: the lock, who may break it, durable reads, and the dead-man timer."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bmigrate.common import faults, paths
from bmigrate.common import state as states
from bmigrate.common.errors import RefusedError
from bmigrate.handover import machine, store
from bmigrate.handover.host import Host
from tests.unit.handover_world import config_of

ROOT = Path(__file__).resolve().parents[2]

# -- lock and preemption ----------------------------------------------------------------------------

HOLDER = """
import signal
from bmigrate.handover import store
with store.opened("pg"):
    print("locked", flush=True)
    signal.pause()
"""


@pytest.fixture
def holder(root: Path) -> Iterator[Any]:
    """Starts a process that holds the lock and looks like the given step."""
    started: list[subprocess.Popen[str]] = []

    def start(step: str) -> subprocess.Popen[str]:
        argv = [sys.executable, "-c", HOLDER, "handover", step, "--workload", "pg"]
        environment = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path))
        process = subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.parametrize("step", ["drain", "quiesce", "converge"])
def test_a_resume_ends_a_step_that_hangs(root: Path, primary: states.WorkloadState, holder: Any, step: str) -> None:
    stuck = holder(step)
    began = time.monotonic()
    with store.opened("pg", preempt_for="r1") as opened:
        assert opened.state.role == "primary"
    assert time.monotonic() - began < 10
    assert stuck.wait(timeout=10) == -signal.SIGKILL


@pytest.mark.parametrize("step", ["promote", "start", "resume", "finish"])
def test_a_resume_never_ends_a_step_of_another_kind(
    root: Path, primary: states.WorkloadState, holder: Any, step: str
) -> None:
    other = holder(step)
    with pytest.raises(RefusedError) as caught:
        with store.opened("pg", wait_seconds=0.3, preempt_for="r1"):
            pass
    assert caught.value.reason == "busy"
    assert other.poll() is None


def test_a_step_that_is_not_a_resume_waits_and_names_the_owner(
    root: Path, primary: states.WorkloadState, holder: Any
) -> None:
    owner = holder("drain")
    with pytest.raises(RefusedError) as caught:
        with store.opened("pg", wait_seconds=0.2):
            pass
    assert str(owner.pid) in caught.value.message
    assert owner.poll() is None


def test_opening_makes_durable_what_it_reads(
    root: Path, primary: states.WorkloadState, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    real = os.fsync

    def fsync(fd: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{fd}"))
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    with store.opened("pg"):
        directory = str(paths.state_dir("pg"))
        assert synced == [f"{directory}/state.json", directory]


def test_a_workload_without_a_role_is_refused_by_name(root: Path) -> None:
    with pytest.raises(RefusedError) as caught:
        with store.opened("pg"):
            pass
    assert caught.value.reason == "not_initialised"


def test_a_save_that_fails_leaves_the_old_state_in_force(root: Path, primary: states.WorkloadState) -> None:
    faults.configure("state.replace=error:28")
    try:
        with store.opened("pg") as opened:
            with pytest.raises(OSError):
                opened.save(machine.begin(opened.state, "r1", "beta", "x", {}))
            assert machine.phase_of(opened.state) == "idle"
    finally:
        faults.configure("")
    loaded = states.load("pg")
    assert loaded is not None and loaded.handover is None


def test_looking_at_the_lock_changes_nothing(root: Path, primary: states.WorkloadState, holder: Any) -> None:
    assert store.lock_free("pg")
    owner = holder("drain")
    lock = paths.state_dir("pg") / "lock"
    before = (lock.read_bytes(), lock.stat().st_mtime_ns)
    assert not store.lock_free("pg")
    owner.kill()
    owner.wait()
    assert store.lock_free("pg")
    assert (lock.read_bytes(), lock.stat().st_mtime_ns) == before


# -- the dead-man timer -----------------------------------------------------------------------------


class Commands(Host):
    """A host whose commands are recorded; ``armed`` is the run id of the timer that waits."""

    def __init__(self, armed: str | None) -> None:
        super().__init__(config_of("alpha"))
        self.armed = armed
        self.argvs: list[list[str]] = []

    def attempt(self, argv: Any, timeout_seconds: float = 1.0) -> tuple[int, str]:
        words = list(argv)
        self.argvs.append(words)
        if words[0] == "systemd-run":
            self.armed = words[words.index("--run-id") + 1]
        elif words[:2] == ["systemctl", "stop"]:
            self.armed = None
        elif words[:2] == ["systemctl", "is-active"]:
            return (0 if self.armed else 3), ""
        elif words[:2] == ["systemctl", "show"]:
            return 0, f"ExecStart={{ argv[]=bmigrate handover resume --run-id {self.armed} ; }}"
        return 0, ""


def test_the_timer_names_the_run_and_repeats_until_it_is_done() -> None:
    host = Commands(None)
    host.arm_dead_man("r1", 90.0)
    argv = next(words for words in host.argvs if words[0] == "systemd-run")
    assert "--on-active=90.000" in argv and "--timer-property=AccuracySec=100ms" in argv
    assert "--unit=bmigrate-deadman-pg" in argv and "--property=SuccessExitStatus=6 7" in argv
    assert argv[argv.index("handover") :] == [
        "handover", "resume", "--workload", "pg", "--run-id", "r1", "--reason", "dead-man", "--json"
    ]  # fmt: skip


@pytest.mark.parametrize(("armed", "new"), [("r1", 0), ("r0", 1)])
def test_a_timer_of_this_run_is_kept_and_one_of_another_replaced(armed: str, new: int) -> None:
    host = Commands(armed)
    host.arm_dead_man("r1", 90.0)
    assert sum(words[0] == "systemd-run" for words in host.argvs) == new
    assert host.armed == "r1"


def test_a_timer_that_does_not_start_stops_the_quiesce(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Commands(None)
    monkeypatch.setattr(Host, "dead_man_armed", lambda self: False)
    with pytest.raises(RefusedError) as caught:
        host.arm_dead_man("r1", 90.0)
    assert "dead-man" in caught.value.message


CHANGE = """
import os, signal, sys
from bmigrate.common import state

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

if len(sys.argv) > 1:
    setattr(os, sys.argv[1], die)
with state.locked("pg") as item:
    item.role, item.handover = "standby", {"run_id": "r" * 5000, "phase": "committed", "side": "source"}
"""


@pytest.mark.parametrize(
    ("plan", "function", "new"),
    [
        ("state.replace=kill", "", False),
        ("", "write", False),  # the temporary file is there, and empty
        ("", "fsync", False),  # its content is written, perhaps not durable
        ("", "rename", False),
        ("state.replaced=kill", "", True),
    ],
)
def test_a_process_that_dies_while_it_replaces_the_state_leaves_the_old_one_or_the_new(
    primary: states.WorkloadState, plan: str, function: str, new: bool
) -> None:
    """Whole, as it was or as it should become; and whoever comes next can go on, lock and leftovers notwithstanding."""
    path = paths.state_dir("pg") / "state.json"
    old = path.read_text()
    words = [sys.executable, "-c", CHANGE, *filter(None, [function])]
    environment = {**os.environ, "BMIGRATE_FAULTS": plan, "PYTHONPATH": "src"}
    killed = subprocess.run(words, env=environment, cwd=ROOT, capture_output=True, timeout=60)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    found = states.load("pg")
    assert found is not None and (found.role == "standby") == new
    if new:
        assert found.handover is not None and len(found.handover["run_id"]) == 5000
    else:
        assert path.read_text() == old and found == primary
    subprocess.run([sys.executable, "-c", CHANGE], env={**environment, "BMIGRATE_FAULTS": ""}, cwd=ROOT, check=True)
    found = states.load("pg")
    assert found is not None and found.role == "standby" and states.load_all() == [found]
