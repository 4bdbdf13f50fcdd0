# SPDX-License-Identifier: GPL-3.0-or-later
"""A service on a logical volume moves to the other host and back: LVM over a disk with 4096-byte blocks.

The service writes all along; tracking begins while it does. Each line of its journal is on the volume
before it is acknowledged in a file elsewhere. The last file of the lab's tests by its name: the volume
groups stay on disk 3 of both guests.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from lab import Lab, wait
from lab.disks import disk_by_number
from tests.ansible.playbooks import ROOT, bare_guests, play
from tests.vm.rig import install, modules

pytestmark = [pytest.mark.vm, pytest.mark.timeout(1500)]

WORKLOAD = "lvdemo"
LV = "/dev/bmvg/data"
MOUNT = "/srv/lvdemo"
ACKNOWLEDGED = "/var/tmp/lvdemo-acknowledged"
LV_MIB = 40
#: Appends a number and overwrites some blocks of a file, durably, then says so outside the volume.
WRITER = f"""#!/bin/sh
set -eu
n=$(wc -l < {MOUNT}/journal)
while :; do
    n=$((n + 1))
    dd if=/dev/urandom of={MOUNT}/blocks bs=4k count=4 seek=$((n * 7919 % 5000)) conv=notrunc status=none
    echo $n >> {MOUNT}/journal
    sync {MOUNT}/journal {MOUNT}/blocks
    echo $n >> {ACKNOWLEDGED}
done
"""
UNIT = f"""[Unit]
RequiresMountsFor={MOUNT}
[Service]
ExecStart=/usr/local/sbin/lvdemo-writer
"""


def definition() -> dict[str, Any]:
    """The workload as an operator writes it into the inventory."""
    return {
        "workload": WORKLOAD,
        "hosts": {"alpha": {"address": "10.77.0.1"}, "beta": {"address": "10.77.0.2"}},
        "volumes": [{"name": "data", "devices": {"alpha": LV, "beta": LV}}],
        "mounts": [{"volume": "data", "path": MOUNT, "fstype": "ext4", "options": "noatime"}],
        "services": ["lvdemo.service"],
        "limits": {"max_drain_seconds": 10.0, "max_downtime_seconds": 300, "converge_timeout_seconds": 600},
    }


class Deployed:
    """The workload on both hosts."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab

    def sync(self) -> None:
        """sync.yml until the replica is in step."""
        run = play(self.lab, "sync.yml", bmigrate_workload=WORKLOAD, bmigrate_initial_primary="alpha", **inventory())
        assert run.returncode == 0, run.output[-6000:]

    def failover(self) -> dict[str, Any]:
        """failover.yml; returns where the workload is afterwards, from the hosts' durable state."""
        run = play(self.lab, "failover.yml", bmigrate_confirm=WORKLOAD, bmigrate_report_directory="", **inventory())
        assert run.returncode == 0, run.output[-6000:]
        return {name: self.role(name) for name in self.lab.vms}

    def role(self, host: str) -> str:
        """The durable role of a host."""
        text = self.lab.ssh(host, f"cat /var/lib/bmigrate/{WORKLOAD}/state.json").stdout
        return str(json.loads(text)["role"])

    def acknowledged(self, host: str) -> int:
        """The last number that the service on a host has acknowledged, 0: none."""
        text = self.lab.ssh(host, f"tail -n 1 {ACKNOWLEDGED} 2>/dev/null", check=False).stdout
        return int(text or 0)

    def journal(self, host: str) -> list[int]:
        """What is in the journal where the volume is mounted."""
        return [int(line) for line in self.lab.ssh(host, f"cat {MOUNT}/journal").stdout.split()]

    def wait_for_writes(self, host: str, count: int) -> None:
        """Until the service on a host has acknowledged so many more."""
        first = self.acknowledged(host)
        wait(lambda: self.acknowledged(host) >= first + count, 300, f"{count} writes on {host}")

    def digest(self, host: str) -> str:
        """SHA-256 of the host's logical volume, past its page cache."""
        return self.lab.ssh(host, f"dd if={LV} bs=1M iflag=direct status=none | sha256sum", timeout=300).stdout


def inventory() -> dict[str, Any]:
    """Extra-vars: the workloads of the lab, and this one."""
    group = yaml.safe_load((ROOT / "inventories" / "lab" / "group_vars" / "all.yml").read_text())
    hosts = group["bmigrate_lab_hosts"]
    return {"bmigrate_workloads": [*(dict(item, hosts=hosts) for item in group["bmigrate_workloads"]), definition()]}


@pytest.fixture(scope="module")
def deployed(lab: Lab) -> Iterator[Deployed]:
    if any(lab.ssh(host, f"test -e {LV}", check=False).returncode == 0 for host in lab.vms):
        bare_guests(lab)
    install(lab)
    for host in lab.vms:
        disk = disk_by_number(3).guest_path(host)
        lab.ssh(host, f"wipefs -aq {disk}; pvcreate -qy {disk} && vgcreate -qy bmvg {disk}", timeout=120)
        lab.ssh(host, f"lvcreate -qy -Wn -L {LV_MIB}M -n data bmvg && mkdir -p {MOUNT}", timeout=120)
        lab.ssh(host, "cat > /usr/local/sbin/lvdemo-writer; chmod 755 /usr/local/sbin/lvdemo-writer", input_text=WRITER)
        lab.ssh(host, "cat > /etc/systemd/system/lvdemo.service", input_text=UNIT)
    lab.ssh("alpha", f"mkfs.ext4 -qF {LV} && mount {LV} {MOUNT} && : > {MOUNT}/journal", timeout=120)
    # It runs before bmigrate knows of it; afterwards it may only be started where the host has the role for it.
    lab.ssh("alpha", "systemctl daemon-reload; systemctl start lvdemo.service")
    run = play(lab, "install.yml", **modules(lab), **inventory())
    assert run.returncode == 0, run.output[-6000:]
    yield Deployed(lab)


def test_a_service_on_a_logical_volume_moves_there_and_back(deployed: Deployed) -> None:
    deployed.wait_for_writes("alpha", 20)
    deployed.sync()
    deployed.wait_for_writes("alpha", 20)

    assert deployed.failover() == {"alpha": "standby", "beta": "primary"}
    deployed.wait_for_writes("beta", 20)
    there = deployed.acknowledged("beta")
    found = deployed.journal("beta")
    assert found == list(range(1, len(found) + 1))
    assert len(found) >= there > deployed.acknowledged("alpha") >= 40

    assert deployed.failover() == {"alpha": "primary", "beta": "standby"}
    deployed.wait_for_writes("alpha", 20)
    here = deployed.acknowledged("alpha")
    found = deployed.journal("alpha")
    assert found == list(range(1, len(found) + 1))
    assert len(found) >= here > deployed.acknowledged("beta")

    deployed.lab.ssh("alpha", f"systemctl stop lvdemo.service && umount {MOUNT}", timeout=300)
    deployed.sync()
    assert deployed.digest("alpha") == deployed.digest("beta")


def test_the_replica_of_a_logical_volume_is_held(deployed: Deployed) -> None:
    """Nobody mounts it, nobody takes it away: the device mapper refuses both while breqd's hold is on it."""
    mounted = deployed.lab.ssh("beta", f"mount {LV} {MOUNT}", check=False)
    removed = deployed.lab.ssh("beta", "lvremove -y bmvg/data", check=False)
    assert mounted.returncode and removed.returncode, (mounted, removed)
    assert deployed.role("beta") == "standby"
