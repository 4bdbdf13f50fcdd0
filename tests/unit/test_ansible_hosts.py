# SPDX-License-Identifier: GPL-3.0-or-later
"""The modules that put files, keys, configuration and units on a host: against what is really there."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.unit.ansible_module import Programs, envelope, run_module

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAI" + "A" * 43
OTHER = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAI" + "B" * 43
HOSTS = {"alpha": {"address": "10.0.0.1"}, "beta": {"address": "10.0.0.2", "port": 2222}}
WORKLOADS = [{"workload": "w", "hosts": HOSTS}]


# -- files ----------------------------------------------------------------------------------------------------------


def pack(
    folder: Path, files: dict[str, str], links: dict[str, str] | None = None, mode: str = "0644"
) -> dict[str, Any]:
    """Pack files (path on the host -> text) and links with the real module."""
    entries = []
    for index, (path, text) in enumerate(sorted(files.items())):
        source = folder / f"source{index}"
        source.write_text(text)
        entries.append({"src": str(source), "dest": path, "mode": mode})
    return run_module("bmigrate_payload", {"dest": str(folder / "set.tar"), "files": entries, "links": links or {}})


def lay_out(folder: Path, check: bool = False, **options: Any) -> dict[str, Any]:
    words = {"name": "set", "archive": str(folder / "set.tar"), "directory": str(folder / "lists"), **options}
    return run_module("bmigrate_tree", words, check=check, diff=True)


def test_an_archive_is_the_same_bytes_whatever_the_files_are_like(tmp_path: Path) -> None:
    first = pack(tmp_path, {"/x/a": "one", "/x/b": "two"}, {"/x/l": "a"})
    for source in tmp_path.glob("source*"):
        os.utime(source, (0, 12345))
        source.chmod(0o600)
    again = pack(tmp_path, {"/x/a": "one", "/x/b": "two"}, {"/x/l": "a"})
    assert first["changed"] is True and again["changed"] is False and first["sha256"] == again["sha256"]
    assert pack(tmp_path, {"/x/a": "one", "/x/b": "TWO"}, {"/x/l": "a"})["changed"] is True


def test_a_tree_is_laid_out_once_and_repaired_when_it_was_touched(tmp_path: Path) -> None:
    root = tmp_path / "bmigrate-root"
    pack(tmp_path, {f"{root}/bin/tool": "#!x", f"{root}/etc/conf": "a=1\n"}, {f"{root}/sbin": "bin"}, mode="0755")
    assert lay_out(tmp_path, check=True)["changed"] is True and not root.exists()
    assert lay_out(tmp_path)["changed"] is True
    assert (root / "bin/tool").stat().st_mode & 0o777 == 0o755 and (root / "sbin").readlink() == Path("bin")
    assert lay_out(tmp_path)["changed"] is False
    (root / "etc/conf").write_text("a=2\n")
    told = lay_out(tmp_path, check=True)
    assert told["paths"] == [f"{root}/etc/conf"] and (root / "etc/conf").read_text() == "a=2\n"
    assert told["diff"][0]["before"] == "a=2\n" and told["diff"][0]["after"] == "a=1\n"
    assert lay_out(tmp_path)["changed"] is True and (root / "etc/conf").read_text() == "a=1\n"
    (root / "bin/tool").chmod(0o644)
    assert lay_out(tmp_path)["paths"] == [f"{root}/bin/tool"]


def test_only_what_an_earlier_archive_brought_is_removed(tmp_path: Path) -> None:
    root = tmp_path / "bmigrate-root"
    pack(tmp_path, {f"{root}/a": "1", f"{root}/b": "2", f"{root}/deep/er/c": "3"})
    lay_out(tmp_path)
    (root / "mine").write_text("not ours")
    pack(tmp_path, {f"{root}/a": "1"})
    assert lay_out(tmp_path)["paths"][0] == f"{root}/b"
    assert sorted(path.name for path in root.iterdir()) == ["a", "mine"]
    assert lay_out(tmp_path, state="absent")["changed"] is True
    assert [path.name for path in root.iterdir()] == ["mine"]
    assert lay_out(tmp_path, state="absent")["changed"] is False


def test_an_archive_that_leads_out_of_the_tree_is_refused(tmp_path: Path) -> None:
    import tarfile

    with tarfile.open(tmp_path / "set.tar", "w") as archive:
        info = tarfile.TarInfo("x/../../etc/evil")
        archive.addfile(info)
    assert "leads out of the tree" in lay_out(tmp_path)["msg"]


# -- keys -----------------------------------------------------------------------------------------------------------


def keys(folder: Path, check: bool = False, **options: Any) -> dict[str, Any]:
    host_key = folder / "host.pub"
    if not host_key.exists():
        host_key.write_text(KEY + " root@alpha\n")
    words = {
        "workloads": WORKLOADS,
        "host": "alpha",
        "directory": str(folder / "keys"),
        "host_key_file": str(host_key),
        "authorized_keys": str(folder / "ssh" / "authorized_keys"),
        **options,
    }
    return run_module("bmigrate_keys", words, check=check, diff=True)


PEERS = {"beta": {"host_key": OTHER, "public_keys": {"w": OTHER}}}


def test_a_key_is_made_once_and_its_private_half_is_never_told(tmp_path: Path) -> None:
    assert keys(tmp_path, check=True)["changed"] is True and not (tmp_path / "keys").exists()
    first = keys(tmp_path)
    assert first["changed"] is True and first["host_key"] == KEY
    private = (tmp_path / "keys" / "w").read_text()
    assert (tmp_path / "keys" / "w").stat().st_mode & 0o777 == 0o600
    assert private.splitlines()[1] not in json.dumps(first)
    again = keys(tmp_path)
    assert again["changed"] is False and again["public_keys"] == first["public_keys"]
    (tmp_path / "keys" / "w.pub").unlink()
    assert keys(tmp_path)["public_keys"] == first["public_keys"]


def test_the_peer_is_pinned_and_admitted_to_one_command_only(tmp_path: Path) -> None:
    ours = tmp_path / "ssh" / "authorized_keys"
    ours.parent.mkdir()
    ours.write_text("ssh-rsa AAAA somebody@else\n")
    ours.chmod(0o640)
    assert keys(tmp_path, peers=PEERS)["changed"] is True
    assert (tmp_path / "keys" / "w.known_hosts").read_text() == f"[10.0.0.2]:2222 {OTHER}\n"
    lines = ours.read_text().splitlines()
    assert lines[0] == "ssh-rsa AAAA somebody@else"
    assert lines[1] == f'restrict,command="/usr/sbin/breceive --workload w" {OTHER} bmigrate:w:beta'
    assert ours.stat().st_mode & 0o777 == 0o640  # as its owner had it
    assert keys(tmp_path, peers=PEERS)["changed"] is False
    fresh = {"beta": {"host_key": KEY, "public_keys": {"w": KEY}}}
    assert keys(tmp_path, peers=fresh)["changed"] is True
    assert len(ours.read_text().splitlines()) == 2 and OTHER not in ours.read_text()


def test_ssh_itself_accepts_the_lines(tmp_path: Path) -> None:
    public = keys(tmp_path)["public_keys"]["w"]
    keys(tmp_path, peers={"beta": {"host_key": public, "public_keys": {"w": public}}})
    for name in ("ssh/authorized_keys", "keys/w.known_hosts"):
        done = subprocess.run(
            ["ssh-keygen", "-l", "-f", str(tmp_path / name)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0 and "ED25519" in done.stdout, done.stderr


def test_a_host_without_a_usable_host_key_is_refused(tmp_path: Path) -> None:
    (tmp_path / "host.pub").write_text("ssh-dss AAAA\n")
    answer = keys(tmp_path)
    assert answer["failed"] is True and "ssh-keygen -A" in answer["msg"] and not (tmp_path / "keys").exists()


# -- configuration --------------------------------------------------------------------------------------------------


def configure(programs: Programs, folder: Path, text: str, check: bool = False) -> dict[str, Any]:
    words = {"name": "w", "content": text, "directory": str(folder / "etc")}
    return run_module("bmigrate_workload", words, programs, check=check, diff=True)


def test_a_configuration_that_the_program_refuses_does_not_replace_the_old_one(tmp_path: Path) -> None:
    programs = Programs(tmp_path / "bin")
    programs.add("bmigrate", ["units", 0, envelope({"written": [], "removed": [], "diff": []})])
    assert configure(programs, tmp_path, "workload: w\n")["changed"] is True
    error = {"code": "usage", "reason": "bad_config", "message": "w.yml: volumes: is missing", "hint": "add it"}
    programs.add("bmigrate", ["units", 2, envelope(error=error)])
    answer = configure(programs, tmp_path, "workload: [\n")
    assert answer["failed"] is True and "volumes: is missing" in answer["msg"]
    assert (tmp_path / "etc" / "w.yml").read_text() == "workload: w\n"


def test_a_configuration_is_written_once_with_its_units(tmp_path: Path) -> None:
    programs = Programs(tmp_path / "bin")
    unit = {"written": ["srv.mount"], "removed": [], "diff": [{"before": "", "after": "[Unit]\n"}]}
    programs.add("bmigrate", ["units", 0, envelope(unit, changed=True)])
    told = configure(programs, tmp_path, "a: 1\n", check=True)
    assert told["changed"] is True and not (tmp_path / "etc").exists()
    assert all("--check" in call for call in programs.calls())
    assert configure(programs, tmp_path, "a: 1\n")["units"] == ["srv.mount"]
    programs.add("bmigrate", ["units", 0, envelope({"written": [], "removed": [], "diff": []}, changed=False)])
    assert configure(programs, tmp_path, "a: 1\n")["changed"] is False


# -- daemons --------------------------------------------------------------------------------------------------------


def show(active: str, enabled: str, reload: str = "no") -> str:
    return (
        f"ActiveState={active}\nSubState=x\nUnitFileState={enabled}\nLoadState=loaded\nNeedDaemonReload={reload}\n"
        "ActiveEnterTimestampMonotonic=1\n"
    )


def daemons(programs: Programs, check: bool = False, **options: Any) -> dict[str, Any]:
    words = {"state": "running", "daemons": ["breqd.service"], **options}
    return run_module("bmigrate_daemon", words, programs, check=check)


def test_a_daemon_is_enabled_and_started_once(tmp_path: Path) -> None:
    programs = Programs(tmp_path / "bin")
    programs.add("systemctl", ["show", 0, show("inactive", "disabled", reload="yes")], ["", 0, ""])
    wanted = ["daemon-reload", "enable breqd.service", "start breqd.service"]
    assert daemons(programs, check=True)["actions"] == wanted
    assert {call[1] for call in programs.calls()} == {"show"}
    assert daemons(programs)["actions"] == wanted
    programs.add("systemctl", ["show", 0, show("active", "enabled")])
    assert daemons(programs)["changed"] is False


def test_a_daemon_older_than_its_files_is_restarted_and_a_plain_unit_is_not(tmp_path: Path) -> None:
    programs = Programs(tmp_path / "bin")
    programs.add("systemctl", ["show", 0, show("active", "enabled")], ["", 0, ""])
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "conf").write_text("x")
    answer = daemons(programs, units=["bmigrate-boot.service"], files=[str(tmp_path / "files")])
    assert answer["actions"] == ["restart breqd.service"]
    os.utime(tmp_path / "files" / "conf", (0, 0))
    assert daemons(programs, files=[str(tmp_path / "files")])["changed"] is False


def test_volumes_that_are_not_tracked_are_a_failure_that_names_them(tmp_path: Path) -> None:
    programs = Programs(tmp_path / "bin")
    found = {"breqd": {"volumes": [{"volume": "a", "attached": True}]}, "volumes": {"a": {}, "b": {}}}
    programs.add("bmigrate", ["handover discover", 0, envelope(found)])
    answer = run_module("bmigrate_daemon", {"state": "attached", "workload": "w"}, programs)
    assert answer["failed"] is True and "volume b" in answer["msg"] and "volume a" not in answer["msg"]


# -- facts ----------------------------------------------------------------------------------------------------------


def test_facts_of_a_host_without_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    answer = run_module(
        "bmigrate_facts", {"workloads": ["w"], "packages": ["surely-not-installed"]}, Programs(tmp_path)
    )
    facts = answer["ansible_facts"]["bmigrate"]
    assert answer["changed"] is False and facts["installed"] is False
    assert facts["workloads"]["w"] == {"configured": False, "discover": None, "error": None}
    assert facts["missing_packages"] == ["surely-not-installed"] and facts["kernel"]["release"] == os.uname().release
