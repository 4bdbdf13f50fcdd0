# SPDX-License-Identifier: GPL-3.0-or-later
"""breqd over the real module: whatever differs from the replica is dirty, however often breqd is killed.

Uses disk 4 of alpha and a workload of its own, beside whatever else is deployed there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import Lab, wait
from lab.disks import disk_by_number
from tests.vm.rig import install

GUEST = Path(__file__).with_name("breqd_guest.py")
DISK = disk_by_number(4)
SEED = 20260701
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

pytestmark = pytest.mark.vm


@pytest.fixture
def tracked(lab: Lab) -> Iterator[Lab]:
    """alpha with breqd running and a workload of this test's own, primary there."""
    install(lab)
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
