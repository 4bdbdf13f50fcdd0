# SPDX-License-Identifier: GPL-3.0-or-later
"""What the units do: clean flags taken away and written, mounts and services kept where they belong."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from bmigrate.common import atomic, blockdev, paths
from bmigrate.common import config as configs
from bmigrate.common import state as states
from bmigrate.common.errors import RefusedError
from bmigrate.handover import early, names, shutdown, units
from bmigrate.handover.host import Host
from tests.unit.handover_world import config_of

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


def test_the_shutdown_unit_refuses_while_the_host_stays_up(
    root: Path, primary: states.WorkloadState, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_the_shutdown_unit_closes_between_hold_and_release(
    root: Path, primary: states.WorkloadState, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert closing(monkeypatch, []) == ["hold.hold", "breqd.clean_close", "hold.release"]


def test_a_volume_with_a_raw_writer_gets_no_clean_flag(
    root: Path, primary: states.WorkloadState, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert closing(monkeypatch, ["process 9 (dd)"]) == ["hold.hold", "hold.release"]


def test_a_standby_is_not_closed_by_the_shutdown_unit(root: Path, primary: states.WorkloadState) -> None:
    item = primary
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
