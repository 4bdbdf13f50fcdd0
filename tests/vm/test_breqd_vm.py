# SPDX-License-Identifier: GPL-3.0-or-later
"""breqd over the real module: whatever differs from the replica is dirty, however often breqd is killed.

Uses disk 4 of alpha and a workload of its own, beside whatever else is deployed there. Where
nothing is deployed yet it builds the module in the guest and runs breqd as a transient unit.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import Lab, wait
from lab.disks import disk_by_number

ROOT = Path(__file__).resolve().parents[2]
GUEST = Path(__file__).with_name("breqd_guest.py")
DISK = disk_by_number(4)
SEED = 20260701
UNIT = """[Unit]
Description=breqd under test
StartLimitIntervalSec=0
[Service]
Type=notify
ExecStart=/usr/sbin/breqd run
Restart=always
RestartSec=200ms
"""
CONFIG = """workload: probe
host: alpha
hosts: {{alpha: {{address: 10.77.0.1}}, beta: {{address: 10.77.0.2}}}}
overflow_region_bytes: 65536
volumes: [{{name: small, devices: {{alpha: {device}, beta: /dev/disk/by-id/virtio-bm-small-beta}}}}]
"""

DETACH = """
import sys
sys.path.insert(0, "/usr/lib/bmigrate/bmigrate.pyz")
from bmigrate.common import paths, rpc
rpc.call(paths.breqd_socket(), "detach", workload="probe", volume="small")
"""

pytestmark = [pytest.mark.vm, pytest.mark.unproven]


def _load_module(lab: Lab) -> None:
    """Build on the lab host for the guest's kernel release: seconds, where the guest needs minutes."""
    release = lab.ssh("alpha", "uname -r").stdout.strip()
    headers = Path("/lib/modules") / release / "build"
    assert headers.exists(), f"the lab host has no headers of {release}: run make setup"
    subprocess.run(["tools/build-module"], cwd=ROOT, check=True, env={**os.environ, "KDIR": str(headers)})
    for name in ("bufflink.ko", "reqlog.ko"):
        lab.put("alpha", ROOT / "build" / "module" / release / name, f"/run/breqd-test/{name}")
    lab.ssh("alpha", "cd /run/breqd-test && insmod bufflink.ko && insmod reqlog.ko")


def _deploy(lab: Lab) -> None:
    """The zipapp, the module, and a unit; only where install.yml has not run."""
    subprocess.run(["python3", "tools/build_zipapp.py"], cwd=ROOT, check=True)
    lab.ssh("alpha", "mkdir -p /usr/lib/bmigrate /run/breqd-test")
    lab.put("alpha", ROOT / "build" / "bmigrate.pyz", "/usr/lib/bmigrate/bmigrate.pyz")
    lab.ssh("alpha", "chmod 755 /usr/lib/bmigrate/bmigrate.pyz; ln -sf /usr/lib/bmigrate/bmigrate.pyz /usr/sbin/breqd")
    if lab.ssh("alpha", "test -e /dev/reqlog", check=False).returncode != 0:
        _load_module(lab)
    lab.ssh("alpha", "cat > /run/systemd/system/breqd.service", input_text=UNIT)
    lab.ssh("alpha", "systemctl daemon-reload && systemctl start breqd.service", timeout=200)


def _undeploy(lab: Lab) -> None:
    """Leave the guest as it was: what comes next installs on a fresh host."""
    lab.ssh(
        "alpha",
        "systemctl stop breqd.service; rm -f /run/systemd/system/breqd.service; systemctl daemon-reload; "
        "rmmod reqlog bufflink; rm -rf /run/breqd-test /usr/lib/bmigrate /usr/sbin/breqd "
        "/etc/bmigrate /var/lib/bmigrate /run/bmigrate; test ! -e /sys/module/bufflink",
        timeout=200,
    )


@pytest.fixture
def tracked(lab: Lab) -> Iterator[Lab]:
    """alpha with breqd running and a workload of this test's own, primary there."""
    deployed = lab.ssh("alpha", "systemctl is-active --quiet breqd.service", check=False).returncode == 0
    if not deployed:
        _deploy(lab)
    state = {"schema": 1, "workload": "probe", "host": "alpha", "role": "primary"}
    lab.ssh("alpha", "mkdir -p /etc/bmigrate /var/lib/bmigrate/probe")
    lab.ssh("alpha", "cat > /etc/bmigrate/probe.yml", input_text=CONFIG.format(device=DISK.guest_path("alpha")))
    lab.ssh("alpha", "cat > /var/lib/bmigrate/probe/state.json", input_text=json.dumps(state))
    lab.ssh("alpha", "systemctl kill -s HUP --kill-who=main breqd.service")

    def attached() -> bool:
        answer = lab.ssh("alpha", "breqd status --workload probe --json", check=False).stdout
        volumes = json.loads(answer)["data"]["volumes"] if answer.startswith("{") else []
        return any(item["attached"] for item in volumes)

    wait(attached, 120, "breqd to attach the small disk")
    yield lab
    # The configuration first: without it nothing attaches the volume again.
    lab.ssh("alpha", "rm -f /etc/bmigrate/probe.yml && systemctl kill -s HUP --kill-who=main breqd.service")
    lab.ssh("alpha", "python3 -", input_text=DETACH)
    lab.ssh("alpha", "rm -rf /var/lib/bmigrate/probe /run/breqd_guest.py")
    if not deployed:
        _undeploy(lab)


def test_what_differs_is_dirty_however_often_breqd_is_killed(tracked: Lab) -> None:
    tracked.ssh("alpha", "cat > /run/breqd_guest.py", input_text=GUEST.read_text())
    print(f"seed {SEED}")
    run = tracked.ssh(
        "alpha",
        f"python3 /run/breqd_guest.py {DISK.guest_path('alpha')} probe small {SEED} 3",
        check=False,
        timeout=850,
    )
    assert run.returncode == 0, run.stdout + run.stderr + tracked.ssh("alpha", "journalctl -u breqd -n 50").stdout
    result = json.loads(run.stdout.splitlines()[-1])
    print(json.dumps(result, indent=1))
    assert result["problems"] == []
    assert result["kills"] == 9 == result["outstanding_at_kills"]
    assert result["suspect"] is None and result["same_attachment"], "a kill is not a lapse of tracking"
    assert result["seeds"] == 0, "a full copy would hide what was lost"
    assert all(check["differing_sectors"] > 0 for check in result["checks"]), "nothing was written: nothing was tested"
    assert all(check["dirty_sectors"] < DISK.size_bytes // 512 for check in result["checks"]), (
        "all dirty proves nothing"
    )
    assert result["redirtied_claimed_blocks"] > 0, "no claimed block was written again"
    assert result["overflow_regions"] >= 100 and result["widened_bytes"] > 0, "the log did not overflow"
