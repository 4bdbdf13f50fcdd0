# SPDX-License-Identifier: GPL-3.0-or-later
"""Bad input on installed hosts: a clear error, the documented exit code, and nothing changed before it.

A workload `scratch` of its own is configured on both hosts for these tests, on the two spare disks,
and taken away afterwards; the workloads of the lab are not touched, but for the wrong host key.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from lab import Lab, wait
from lab.disks import disk_by_number
from tests.ansible.playbooks import install_once, play

pytestmark = [pytest.mark.ansible, pytest.mark.timeout(900)]

HOST, PEER = "beta", "alpha"
FAULT_BYTES = disk_by_number(2).size_bytes
GENERATION = {"number": 1, "id": "0123456789abcdef0123456789abcdef"}
SMALL = disk_by_number(4).guest_path(HOST)
LARGE_BLOCKS = disk_by_number(3).guest_path(HOST)


class Scratch:
    """The workload `scratch` on one host, and how the commands answer for it."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab

    def configure(self, device: str, **changes: Any) -> None:
        """Write its configuration with this device."""
        config = {
            "workload": "scratch",
            "host": HOST,
            "hosts": {"alpha": {"address": "10.77.0.1"}, "beta": {"address": "10.77.0.2"}},
            "volumes": [{"name": "data", "devices": {PEER: "/dev/null-of-the-peer", HOST: device}}],
            **changes,
        }
        self.lab.ssh(HOST, "cat > /etc/bmigrate/scratch.yml", input_text=yaml.safe_dump(config))

    def call(self, command: str) -> tuple[int, dict[str, Any]]:
        """Exit code and error of a bmigrate command with --json on the host."""
        done = self.lab.ssh(HOST, f"bmigrate {command} --json", check=False)
        answer = json.loads(done.stdout)
        assert answer["ok"] is False and answer["changed"] is False, answer
        error: dict[str, Any] = answer["error"]
        return done.returncode, error

    def adopt(self, size_bytes: int, block_bytes: int = 512) -> tuple[int, dict[str, Any]]:
        """What adopting the device as a copy of such a volume answers."""
        volume = {"name": "data", "size_bytes": size_bytes, "logical_block_size": block_bytes}
        generation = json.dumps({**GENERATION, "volumes": [volume]})
        return self.call(f"adopt --workload scratch --generation '{generation}'")

    def digest(self, device: str) -> str:
        """SHA-256 of a device of the host."""
        return self.lab.ssh(HOST, f"sha256sum < {device}").stdout

    def has_state(self) -> bool:
        """Whether the host has a role for the workload."""
        return self.lab.ssh(HOST, "test -e /var/lib/bmigrate/scratch/state.json", check=False).returncode == 0


@pytest.fixture(scope="module")
def installed(lab: Lab) -> Lab:
    install_once(lab)
    return lab


@pytest.fixture
def scratch(installed: Lab) -> Iterator[Scratch]:
    installed.ssh(HOST, f"wipefs -aq {SMALL} {LARGE_BLOCKS}; blkdiscard -z {SMALL}; blkdiscard -z {LARGE_BLOCKS}")
    made = Scratch(installed)
    yield made
    assert not made.has_state(), "a refused command left a role behind"
    installed.ssh(HOST, "rm -rf /etc/bmigrate/scratch.yml /var/lib/bmigrate/scratch")


def expect(answer: tuple[int, dict[str, Any]], code: int, reason: str, *words: str) -> None:
    """The exit code, the reason, and that the text names volume and host and says what to do."""
    exit_code, error = answer
    assert (exit_code, error["reason"]) == (code, reason), error
    assert error["host"] and error["hint"], error
    for word in words:
        assert word in error["message"], error


def test_a_missing_device(scratch: Scratch) -> None:
    scratch.configure("/dev/disk/by-id/virtio-not-there")
    expect(scratch.adopt(1 << 20), 3, "device_missing", "/dev/disk/by-id/virtio-not-there")


def test_a_target_that_is_too_small(scratch: Scratch) -> None:
    scratch.configure(SMALL)
    expect(scratch.adopt(FAULT_BYTES), 3, "too_small", str(FAULT_BYTES), SMALL)


def test_a_target_with_larger_logical_blocks(scratch: Scratch) -> None:
    scratch.configure(LARGE_BLOCKS)
    expect(scratch.adopt(FAULT_BYTES, 512), 3, "logical_block_size", "4096", "512")


def test_a_mounted_target(scratch: Scratch) -> None:
    scratch.configure(SMALL)
    scratch.lab.ssh(HOST, f"mkfs.ext4 -qF {SMALL} && mount {SMALL} /mnt")
    try:
        expect(scratch.adopt(1 << 20), 3, "mounted", "/mnt")
    finally:
        scratch.lab.ssh(HOST, "umount /mnt")


def test_a_held_target(scratch: Scratch) -> None:
    scratch.configure(SMALL)
    hold = f"import os, time; os.open('{SMALL}', os.O_RDWR | os.O_EXCL); print('held', flush=True); time.sleep(9e4)"
    scratch.lab.ssh(HOST, f'systemd-run --quiet --unit=holder --collect python3 -c "{hold}"')
    try:
        said = "journalctl -b -u holder -o cat"
        wait(lambda: "held" in scratch.lab.ssh(HOST, said).stdout, 60, "the holder to hold")
        expect(scratch.adopt(1 << 20), 3, "device_busy", "python3")
    finally:
        scratch.lab.ssh(HOST, "systemctl stop holder")


def test_a_target_with_a_foreign_file_system(scratch: Scratch) -> None:
    scratch.configure(SMALL)
    scratch.lab.ssh(HOST, f"mkfs.xfs -qf {SMALL} 2>/dev/null || mkfs.ext4 -qF {SMALL}")
    before = scratch.digest(SMALL)
    expect(scratch.adopt(1 << 20), 3, "foreign_data", "not empty")
    assert scratch.digest(SMALL) == before


@pytest.mark.parametrize(
    "changes, key",
    [
        ({"volumes": 7}, "volumes"),
        ({"limits": {"max_drain_seconds": "soon"}}, "limits.max_drain_seconds"),
        ({"hosts": {"beta": {"address": "10.77.0.2"}}}, "hosts"),
    ],
)
def test_a_configuration_of_a_wrong_type(scratch: Scratch, changes: dict[str, Any], key: str) -> None:
    scratch.configure(SMALL, **changes)
    expect(scratch.adopt(1 << 20), 2, "bad_config", key, "scratch.yml")


def test_an_unknown_workload(scratch: Scratch) -> None:
    expect(scratch.call("adopt --workload nonsense --generation '{}'"), 2, "unknown_workload", "nonsense")


def test_an_unknown_volume(installed: Lab) -> None:
    ask = (
        "import json, socket, struct\n"
        "conn = socket.socket(socket.AF_UNIX); conn.connect('/run/bmigrate/breqd.sock')\n"
        "ask = {'v': 1, 'id': 1, 'op': 'attach', 'workload': 'fault', 'volume': 'nope', 'mode': 'resume'}\n"
        "body = json.dumps(ask)\n"
        "conn.sendall(struct.pack('<I', len(body)) + body.encode())\n"
        "print(conn.recv(65536)[4:].decode())\n"
    )
    error = json.loads(installed.ssh(HOST, "python3 -", input_text=ask).stdout)["error"]
    assert (error["code"], error["reason"]) == ("usage", "unknown_volume"), error
    assert "nope" in error["message"] and "known volumes" in error["hint"]


def test_garbage_on_the_wire(installed: Lab) -> None:
    """breceive answers an ERROR frame and a documented code, and writes nothing."""
    device = disk_by_number(2).guest_path(HOST)
    before = installed.ssh(HOST, f"sha256sum < {device}").stdout
    feed = "head -c 100000 /dev/urandom | breceive --workload fault 2> /run/why | head -c 4; echo ${PIPESTATUS[1]}"
    done = installed.ssh(HOST, f"bash -c '{feed}'; cat /run/why", check=False)
    assert done.stdout.startswith("BMG13\n"), done.stdout  # an ERROR frame, and exit code 3: refused
    assert "magic" in done.stdout and HOST in done.stdout, done.stdout
    assert installed.ssh(HOST, f"sha256sum < {device}").stdout == before


def test_a_wrong_host_key(installed: Lab) -> None:
    """The pinned key of the peer is another one: nothing is shipped, and the state says why."""
    for name in ("install.yml", "sync.yml"):
        run = play(installed, name, bmigrate_workload="fault", bmigrate_initial_primary="alpha")
        assert run.returncode == 0, run.output[-6000:]
    primary = next(
        name for name in installed.vms
        if json.loads(installed.ssh(name, "cat /var/lib/bmigrate/fault/state.json").stdout)["role"] == "primary"
    )  # fmt: skip
    pinned = "/etc/bmigrate/keys/fault.known_hosts"
    wrong = (
        f"cp {pinned} /run/pinned; rm -f /run/other*; ssh-keygen -qt ed25519 -N '' -f /run/other; "
        f"awk -v key=\"$(cut -d' ' -f2 /run/other.pub)\" '{{$3 = key; print}}' /run/pinned > {pinned}"
    )
    installed.ssh(primary, wrong)
    try:
        installed.ssh(primary, "systemctl restart bmigrate-ship")

        def reason() -> str:
            done = installed.ssh(primary, "bmigrate status --workload fault --json", check=False)
            (entry,) = json.loads(done.stdout)["data"]["workloads"]
            return str(((entry["ship"] or {}).get("last_error") or {}).get("reason"))

        wait(lambda: reason() == "host_key_mismatch", 120, "the shipper to name the wrong host key", 1.0, reason)
        done = installed.ssh(
            primary, "bmigrate sync --workload fault --wait --timeout 10 --json", check=False, timeout=180
        )
        assert done.returncode in (3, 4), done
        assert "host key" in json.loads(done.stdout)["error"]["message"], done.stdout
    finally:
        installed.ssh(primary, f"cp /run/pinned {pinned}; systemctl restart bmigrate-ship")
    run = play(installed, "sync.yml", bmigrate_workload="fault")
    assert run.returncode == 0, run.output[-4000:]
