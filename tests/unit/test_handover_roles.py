# SPDX-License-Identifier: GPL-3.0-or-later
"""First roles: what is on a device, who may become primary or standby."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from bmigrate.common import blockdev, paths
from bmigrate.common import state as states
from bmigrate.common.errors import RefusedError, UsageError
from bmigrate.handover import probe, roles
from bmigrate.handover.host import Host
from tests.unit.handover_world import config_of

GENERATION = {"number": 1, "id": "g1"}


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


GOOD = {"size_bytes": 1 << 30, "logical_block_size": 512, "untrackable": None}
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
        ({"untrackable": "zoned"}, [], "untrackable"),
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


def test_a_standby_of_another_generation_is_not_adopted_again(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = FirstRole("beta", GOOD, [], monkeypatch)
    roles.adopt(host, SOURCE, None, SOURCE["volumes"])
    with pytest.raises(RefusedError) as caught:
        roles.adopt(host, {**SOURCE, "id": "other"}, "pg", SOURCE["volumes"])
    assert caught.value.reason == "wrong_generation" and "forked" in caught.value.message
