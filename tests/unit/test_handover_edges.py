# SPDX-License-Identifier: GPL-3.0-or-later
"""The edges of the handover: lock and preemption, unit files, names, clean flags, facts and verdicts."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bmigrate.common import atomic, blockdev, faults, paths
from bmigrate.common import config as configs
from bmigrate.common import state as states
from bmigrate.common.errors import RefusedError, UsageError
from bmigrate.handover import early, judge, machine, names, preflight, probe, roles, shutdown, store, units
from bmigrate.handover.host import Host
from tests.unit.handover_world import config_of

GENERATION = {"number": 1, "id": "g1"}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The three directories of a host, in a temporary place."""
    for name in ("etc", "state", "run"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(f"BMIGRATE_{name.upper()}", str(tmp_path / name))
    return tmp_path


def primary(root: Path) -> states.WorkloadState:
    """A primary's state on disk."""
    item = states.WorkloadState("pg", "alpha", role="primary", generation=GENERATION, history=[GENERATION])
    atomic.make_directory(paths.state_dir("pg"))
    states.save(item)
    return item


# -- lock and preemption ----------------------------------------------------------------------------

HOLDER = """
import sys, time
from bmigrate.handover import store
with store.opened("pg"):
    print("locked", flush=True)
    time.sleep(60)
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
def test_a_resume_ends_a_step_that_hangs(root: Path, holder: Any, step: str) -> None:
    primary(root)
    stuck = holder(step)
    began = time.monotonic()
    with store.opened("pg", preempt_for="r1") as opened:
        assert opened.state.role == "primary"
    assert time.monotonic() - began < 10
    assert stuck.wait(timeout=10) == -signal.SIGKILL


@pytest.mark.parametrize("step", ["promote", "start", "resume", "finish"])
def test_a_resume_never_ends_a_step_of_another_kind(root: Path, holder: Any, step: str) -> None:
    primary(root)
    other = holder(step)
    with pytest.raises(RefusedError) as caught:
        with store.opened("pg", wait_seconds=0.3, preempt_for="r1"):
            pass
    assert caught.value.reason == "busy"
    assert other.poll() is None


def test_a_step_that_is_not_a_resume_waits_and_names_the_owner(root: Path, holder: Any) -> None:
    primary(root)
    owner = holder("drain")
    with pytest.raises(RefusedError) as caught:
        with store.opened("pg", wait_seconds=0.2):
            pass
    assert str(owner.pid) in caught.value.message
    assert owner.poll() is None


def test_opening_makes_durable_what_it_reads(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    primary(root)
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


def test_a_save_that_fails_leaves_the_old_state_in_force(root: Path) -> None:
    primary(root)
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


# -- clean flags ------------------------------------------------------------------------------------


def test_the_early_unit_moves_every_flag_with_the_id_of_this_boot(root: Path) -> None:
    for workload, volume in (("pg", "data"), ("pg", "wal"), ("web", "data")):
        atomic.make_directory(paths.state_dir(workload))
        paths.clean_flag(workload, volume).write_text(json.dumps({"schema": 1, "volume": volume}))
    assert len(early.retire_all()) == 3
    assert not list(paths.state().glob("*/*.clean"))
    token = json.loads(paths.clean_token("pg", "wal").read_text())
    assert token["boot_id"] == blockdev.boot_id() and token["flag"] == {"schema": 1, "volume": "wal"}
    assert early.retire_all() == []


def test_a_damaged_flag_is_taken_away_and_believed_by_nobody(root: Path) -> None:
    atomic.make_directory(paths.state_dir("pg"))
    paths.clean_flag("pg", "data").write_bytes(b"\xff{not json")
    early.retire_all()
    assert not paths.clean_flag("pg", "data").exists()
    assert json.loads(paths.clean_token("pg", "data").read_text())["flag"] is None


def test_the_flag_is_gone_durably_only_after_its_token_exists(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    atomic.make_directory(paths.state_dir("pg"))
    paths.clean_flag("pg", "data").write_text("{}")
    token = paths.clean_token("pg", "data")

    def unlink(path: Path) -> bool:
        assert token.exists()
        return True

    monkeypatch.setattr(atomic, "unlink_durably", unlink)
    early.retire_all()
    assert token.exists()


def test_no_workload_may_start_while_a_clean_flag_is_there(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    atomic.make_directory(paths.state_dir("pg"))
    paths.clean_flag("pg", "data").write_text("{}")
    host = Host(config_of("alpha"))
    host.set_marker()
    assert host.marked() and not paths.clean_flag("pg", "data").exists()
    host.clear_marker()
    paths.clean_flag("pg", "data").write_text("{}")

    def failing(path: Any) -> bool:
        raise OSError(30, "read-only")

    monkeypatch.setattr(atomic, "unlink_durably", failing)
    with pytest.raises(OSError):
        host.set_marker()
    assert not host.marked()


# -- the shutdown unit ------------------------------------------------------------------------------


def test_the_shutdown_unit_refuses_while_the_host_stays_up(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    primary(root)
    monkeypatch.setattr(configs, "load", lambda workload, validated=True: config_of("alpha"))
    monkeypatch.setattr(Host, "attempt", lambda self, argv, timeout_seconds=1.0: (0, "running\n"))
    with pytest.raises(RefusedError) as caught:
        shutdown.close_all()
    assert caught.value.reason == "not_stopping"


def closing(monkeypatch: pytest.MonkeyPatch, writers: list[str]) -> list[str]:
    """Run the shutdown with recorded daemon calls."""
    calls: list[str] = []
    monkeypatch.setattr(configs, "load", lambda workload, validated=True: config_of("alpha"))
    monkeypatch.setattr(Host, "attempt", lambda self, argv, timeout_seconds=1.0: (0, "stopping\n"))

    def ask(self: Host, path: Path, op: str, wait_seconds: float, fields: dict[str, Any]) -> dict[str, Any]:
        calls.append(f"{path.stem}.{op}")
        return {}

    monkeypatch.setattr(Host, "_ask", ask)
    monkeypatch.setattr(Host, "writers", lambda self: {"data": writers})
    shutdown.close_all()
    return calls


def test_the_shutdown_unit_closes_between_hold_and_release(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    primary(root)
    assert closing(monkeypatch, []) == ["hold.hold", "breqd.clean_close", "hold.release"]


def test_a_volume_with_a_raw_writer_gets_no_clean_flag(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    primary(root)
    assert closing(monkeypatch, ["process 9 (dd)"]) == ["hold.hold", "hold.release"]


def test_a_standby_is_not_closed_by_the_shutdown_unit(root: Path) -> None:
    item = primary(root)
    item.role = "standby"
    states.save(item)
    assert shutdown.close_all() == []


# -- units and names --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "unit"),
    [
        ("/srv/pg", "srv-pg"),
        ("/srv/my-data", "srv-my\\x2ddata"),
        ("/", "-"),
        ("//srv///pg/", "srv-pg"),
        ("/.hidden", "\\x2ehidden"),
        ("/dev/disk/by-id/virtio-bm_pg", "dev-disk-by\\x2did-virtio\\x2dbm_pg"),
        ("/srv/ü", "srv-\\xc3\\xbc"),
    ],
)
def test_paths_are_escaped_as_systemd_does(path: str, unit: str) -> None:
    assert names.escape_path(path) == unit
    tool = shutil.which("systemd-escape")
    if tool:
        assert subprocess.run([tool, "--path", path], capture_output=True, text=True).stdout.strip() == unit


def test_units_say_where_they_may_start_and_when_they_stop(root: Path) -> None:
    files = units.wanted(config_of("alpha"))
    mount = files["srv-pg.mount"]
    for line in (
        f"AssertPathExists={paths.primary_marker('pg')}",
        "DefaultDependencies=no",
        "Conflicts=umount.target",
        "Before=umount.target",
        "What=/dev/vda",
        "Where=/srv/pg",
    ):
        assert line + "\n" in mount
    assert "bmigrate-shutdown.service" in next(line for line in mount.splitlines() if line.startswith("After="))
    assert "local-fs" not in mount and "Requires=" not in mount
    service = files["first.service.d/50-bmigrate.conf"]
    assert "Requires=srv-pg.mount\n" in service and f"AssertPathExists={paths.primary_marker('pg')}\n" in service
    assert "What=/dev/vdb" in units.wanted(config_of("beta"))["srv-pg.mount"]


def test_bringing_units_in_line_is_idempotent_and_removes_what_is_not_wanted(root: Path) -> None:
    directory = root / "units"
    directory.mkdir()
    config = config_of("alpha")
    checked = units.bring_in_line(config, directory, check=True)
    assert checked["changed"] and not list(directory.iterdir())
    first = units.bring_in_line(config, directory)
    assert first["written"] == checked["written"] and len(first["written"]) == 3
    assert not units.bring_in_line(config, directory)["changed"]
    fewer = units.bring_in_line(
        configs.parse(
            {
                "workload": "pg",
                "host": "alpha",
                "hosts": {"alpha": {"address": "a"}, "beta": {"address": "b"}},
                "volumes": [{"name": "data", "devices": {"alpha": "/dev/vda", "beta": "/dev/vdb"}}],
            }
        ),
        directory,
    )
    assert len(fewer["removed"]) == 3 and not list(directory.iterdir())


def test_a_unit_of_somebody_else_is_never_overwritten(root: Path) -> None:
    directory = root / "units"
    directory.mkdir()
    (directory / "srv-pg.mount").write_text("[Mount]\n")
    with pytest.raises(RefusedError) as caught:
        units.bring_in_line(config_of("alpha"), directory)
    assert caught.value.reason == "foreign_unit"
    assert (directory / "srv-pg.mount").read_text() == "[Mount]\n"


# -- what is on a device ----------------------------------------------------------------------------

needs_tools = pytest.mark.usefixtures("tools")


@pytest.fixture
def tools() -> None:
    """The tools that the hosts have too."""
    for tool in ("blkid", "wipefs", "mkfs.ext4"):
        assert shutil.which(tool, path=os.environ["PATH"] + ":/usr/sbin:/sbin"), f"{tool} is needed by this test"


@needs_tools
def test_an_empty_device_is_empty_and_any_content_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", os.environ["PATH"] + ":/usr/sbin:/sbin")
    attempt = Host(config_of("alpha")).attempt
    image = tmp_path / "disk"
    with open(image, "wb") as stream:
        stream.truncate(8 << 20)
    monkeypatch.setattr(blockdev, "open_direct", lambda path: os.open(path, os.O_RDONLY))
    assert probe.contents(str(image), attempt) == []
    with open(image, "r+b") as stream:
        stream.seek((1 << 20) - 1)
        stream.write(b"\x01")
    assert probe.contents(str(image), attempt) == ["bytes other than zero in its first MiB"]
    subprocess.run(["mkfs.ext4", "-q", "-L", "mine", str(image)], check=True)
    found = probe.contents(str(image), attempt)
    assert any("ext4 (blkid)" in text and "mine" in text for text in found)
    assert any("ext4 at byte" in text and "(wipefs)" in text for text in found)


def test_a_probe_that_cannot_look_never_says_empty() -> None:
    with pytest.raises(RefusedError) as caught:
        probe.contents("/dev/null", lambda argv, timeout: (127, "not found"))
    assert caught.value.reason == "probe_failed"


def test_fstab_entries_are_found_by_mount_point_and_by_device() -> None:
    text = "# /dev/vda /srv/pg ext4\n/dev/vda /elsewhere ext4\nUUID=1 / ext4\n/dev/vdz /srv/pg/ ext4\n"
    assert len(probe.fstab_entries(text, ["/srv/pg"], ["/dev/vda"])) == 2


# -- init and adopt ---------------------------------------------------------------------------------


class FirstRole(Host):
    """A host whose devices and daemons answer what the test says."""

    def __init__(self, name: str, found: dict[str, Any], used: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(config_of(name))
        self.calls: list[str] = []
        self.used = used
        monkeypatch.setattr(probe, "facts", lambda device: {"present": True, "path": device, **found})
        monkeypatch.setattr(probe, "contents", lambda device, attempt: found.get("contents", []))

    def holders(self, volume: str) -> list[str]:
        return self.used

    def settle_devices(self, wait: bool) -> None:
        self.calls.append("settle")

    def _ask(self, path: Any, op: str, wait_seconds: float, fields: dict[str, Any]) -> dict[str, Any]:
        self.calls.append(f"{path.stem}.{op}")
        return {"volumes": []}


GOOD = {"size_bytes": 1 << 30, "logical_block_size": 512, "bio_based": None}
SOURCE: dict[str, Any] = {
    "number": 3,
    "id": "g3",
    "volumes": [{"name": "data", "size_bytes": 1 << 30, "logical_block_size": 512}],
}


@pytest.mark.parametrize(
    ("found", "used", "reason"),
    [
        ({"size_bytes": (1 << 30) - 512}, [], "too_small"),
        ({"logical_block_size": 4096}, [], "logical_block_size"),
        ({"present": False, "problem": "gone", "reason": "device_missing"}, [], "device_missing"),
        ({"bio_based": "md"}, [], "bio_based"),
        ({}, ["mounted at /mnt (seen by process 1)"], "mounted"),
        ({}, ["vda is part of md0"], "device_busy"),
        ({"contents": ["ext4 (blkid)"]}, [], "foreign_data"),
    ],
)
def test_adopt_refuses_what_it_must_before_anything_changes(
    root: Path, monkeypatch: pytest.MonkeyPatch, found: dict[str, Any], used: list[str], reason: str
) -> None:
    host = FirstRole("beta", {**GOOD, **found}, used, monkeypatch)
    with pytest.raises(RefusedError) as caught:
        roles.adopt(host, SOURCE, None, SOURCE["volumes"])
    assert caught.value.reason == reason and caught.value.volume == "data"
    assert states.load("pg") is None and host.calls == []


def test_adopt_overwrites_only_when_the_workload_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = FirstRole("beta", {**GOOD, "contents": ["ext4 (blkid)"]}, [], monkeypatch)
    with pytest.raises(UsageError):
        roles.adopt(host, SOURCE, "other", SOURCE["volumes"])
    result, changed = roles.adopt(host, SOURCE, "pg", SOURCE["volumes"])
    item = states.load("pg")
    assert changed and result["overwritten"] == {"data": ["ext4 (blkid)"]}
    assert item is not None and item.role == "standby" and item.generation == {"number": 3, "id": "g3"}
    assert host.calls == ["hold.hold", "hold.reload"]
    assert roles.adopt(host, SOURCE, None, SOURCE["volumes"])[1] is False


def test_a_primary_is_not_adopted_nor_a_standby_initialised(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = FirstRole("alpha", GOOD, [], monkeypatch)
    assert roles.init(host)[1] is True
    item = states.load("pg")
    assert item is not None and item.role == "primary" and item.shipping and paths.primary_marker("pg").exists()
    with pytest.raises(RefusedError) as caught:
        roles.adopt(host, SOURCE, "pg", [])
    assert caught.value.reason == "wrong_role"
    item.role = "standby"
    states.save(item)
    with pytest.raises(RefusedError) as caught:
        roles.init(host)
    assert caught.value.reason == "wrong_role"


# -- facts and verdicts -----------------------------------------------------------------------------


def facts(host: str, role: str, phase: str = "idle", **fields: Any) -> dict[str, Any]:
    """What discover prints, reduced to what judge reads."""
    side = {"primary": "source", "standby": "target"}.get(role)
    open_run = {} if phase == "idle" else {"run_id": "r1", "side": side}
    base = {"host": host, "workload": "pg", "role": role, "phase": phase, "run_id": None, "side": None}
    lists = {"history": [GENERATION], "abandoned": [], "candidate": None, "demoted": None}
    return {**base, **lists, **open_run, **fields}


def test_two_primaries_none_and_forks_have_no_verdict() -> None:
    for one, other, word in (
        (facts("a", "primary"), facts("b", "primary"), "two primaries"),
        (facts("a", "standby"), facts("b", "standby"), "no host is primary"),
        (facts("a", "none"), facts("b", "none"), "sync.yml"),
        (facts("a", "primary"), facts("b", "standby", history=[{"number": 1, "id": "other"}]), "forked"),
        (facts("a", "primary"), facts("a", "standby"), "both facts"),
    ):
        verdict = judge.verdict(one, other)
        assert word in str(verdict["problem"]) and verdict["source"] is None


def test_the_verdict_names_the_step_that_comes_next() -> None:
    x = {"number": 2, "id": "x"}
    for source, target, step in (
        (facts("a", "primary"), facts("b", "standby"), ("begin", "source")),
        (facts("a", "primary", "begun"), facts("b", "standby"), ("converge", "source")),
        (facts("a", "primary", "drained"), facts("b", "standby", "prepared"), ("commit", "source")),
        (facts("a", "primary", "resuming"), facts("b", "standby", "prepared"), ("resume", "source")),
        (facts("a", "primary", abandoned=[x]), facts("b", "standby", "prepared", candidate=x), ("cancel", "target")),
        (
            facts("a", "standby", "committed", side="source"),
            facts("b", "primary", "promoted", side="target"),
            ("start", "target"),
        ),
    ):
        for pair in ((source, target), (target, source)):
            verdict = judge.verdict(*pair)
            assert (verdict["next_step"], verdict["next_side"]) == step
            assert (verdict["source"], verdict["target"]) == ("a", "b")


def preflight_facts(side: str, **fields: Any) -> dict[str, Any]:
    """A healthy host's facts."""
    host = "alpha" if side == "primary" else "beta"
    volume = {
        "path": "/dev/vda",
        "real_path": "/dev/vda",
        "present": True,
        "size_bytes": 1 << 30,
        "logical_block_size": 512,
        "mounted": [],
        "holders": [],
        "bio_based": None,
    }
    healthy: dict[str, Any] = {
        **facts(host, side),
        "version": "1",
        "generation": GENERATION,
        "state": {},
        "volumes": {"data": volume},
        "services": {"first.service": "active" if side == "primary" else "inactive"},
        "units": {"first.service": "disabled"},
        "module": {"loaded": True, "modules": {"reqlog": True}, "kernel": "6"},
        "dead_man_armed": False,
        "breqd": {"running": True, "volumes": [{"volume": "data", "attached": True, "suspect": None}]},
        "hold": {"running": True, "volumes": [{"volume": "data", "held": True, "suspect": None}]},
        "ship": {
            "running": True,
            "workloads": [{"workload": "pg", "state": "in_step", "predicted_drain_seconds": 0.5, "lag_seconds": 0.1}],
        },
    }
    return {**healthy, **fields}


def blockers(mine: dict[str, Any], peer: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The reasons that preflight gives."""
    monkeypatch.setattr(shutil, "which", lambda tool, path=None: f"/usr/bin/{tool}")
    plan = preflight.check(config_of("alpha"), mine, peer)
    for problem in plan["blockers"]:
        assert problem["message"] and problem["hint"], problem
    return {str(problem["reason"]) for problem in plan["blockers"]}


def test_nothing_stands_in_the_way_of_two_healthy_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert blockers(preflight_facts("primary"), preflight_facts("standby"), monkeypatch) == set()


@pytest.mark.parametrize(
    ("side", "change", "reason"),
    [
        ("primary", {"breqd": {"running": False}}, "daemon_down"),
        ("primary", {"module": {"loaded": False, "modules": {"reqlog": False}, "kernel": "6"}}, "module_not_loaded"),
        ("primary", {"breqd": {"running": True, "volumes": []}}, "not_tracked"),
        (
            "primary",
            {"breqd": {"running": True, "volumes": [{"volume": "data", "attached": True, "suspect": "crash"}]}},
            "suspect",
        ),
        ("primary", {"ship": {"running": True, "workloads": []}}, "not_shipping"),
        ("primary", {"ship": {"running": True, "workloads": [{"workload": "pg", "state": "seeding"}]}}, "not_in_step"),
        ("primary", {"dead_man_armed": True}, "dead_man_armed"),
        ("primary", {"units": {"first.service": "missing"}}, "service_missing"),
        ("standby", {"hold": {"running": True, "volumes": [{"volume": "data", "held": False}]}}, "not_held"),
        (
            "standby",
            {"hold": {"running": True, "volumes": [{"volume": "data", "held": True, "suspect": "reverted"}]}},
            "suspect",
        ),
        ("standby", {"services": {"first.service": "active"}}, "service_runs"),
        ("standby", {"generation": {"number": 1, "id": "other"}}, "wrong_generation"),
        ("standby", {"role": "primary"}, "roles"),
        ("standby", {"version": "2"}, "version"),
        ("standby", {"volumes": {"data": {"present": False, "problem": "gone"}}}, "device_missing"),
    ],
)
def test_each_obstacle_is_a_blocker_with_a_hint(
    monkeypatch: pytest.MonkeyPatch, side: str, change: dict[str, Any], reason: str
) -> None:
    mine = preflight_facts("primary", **(change if side == "primary" else {}))
    peer = preflight_facts("standby", **(change if side == "standby" else {}))
    assert reason in blockers(mine, peer, monkeypatch)


def test_a_device_that_does_not_fit_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for change, reason in (
        ({"size_bytes": 1 << 29}, "too_small"),
        ({"logical_block_size": 4096}, "logical_block_size"),
        ({"mounted": ["1: /mnt"]}, "mounted"),
        ({"bio_based": "device mapper"}, "bio_based"),
    ):
        peer = preflight_facts("standby")
        peer["volumes"]["data"] = {**peer["volumes"]["data"], **change}
        assert reason in blockers(preflight_facts("primary"), peer, monkeypatch)


def test_the_predicted_downtime_is_drain_plus_what_the_last_handover_took() -> None:
    def record(*steps: str) -> dict[str, Any]:
        return {"last_handover": {"run_id": "r0", "results": {step: {"seconds": 1.0} for step in steps}}}

    source = preflight_facts("primary", state=record("prepare", "promote", "start"))
    target = preflight_facts("standby", state=record("quiesce", "drain", "commit"))
    found = preflight.predict(config_of("alpha"), source, target)
    assert found["downtime_seconds"] == 5.5 and found["measured"]
    given_up = preflight.predict(config_of("alpha"), preflight_facts("primary", state=record("quiesce")), target)
    assert given_up["downtime_seconds"] == 0.5 + preflight.UNMEASURED_SECONDS and not given_up["measured"]
    assert preflight.predict(config_of("alpha"), None)["downtime_seconds"] is None


def test_a_standby_of_another_generation_is_not_adopted_again(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = FirstRole("beta", GOOD, [], monkeypatch)
    roles.adopt(host, SOURCE, None, SOURCE["volumes"])
    with pytest.raises(RefusedError) as caught:
        roles.adopt(host, {**SOURCE, "id": "other"}, "pg", SOURCE["volumes"])
    assert caught.value.reason == "wrong_generation" and "forked" in caught.value.message


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


def test_looking_at_the_lock_changes_nothing(root: Path, holder: Any) -> None:
    primary(root)
    assert store.lock_free("pg")
    owner = holder("drain")
    lock = paths.state_dir("pg") / "lock"
    before = (lock.read_bytes(), lock.stat().st_mtime_ns)
    assert not store.lock_free("pg")
    owner.kill()
    owner.wait()
    assert store.lock_free("pg")
    assert (lock.read_bytes(), lock.stat().st_mtime_ns) == before
