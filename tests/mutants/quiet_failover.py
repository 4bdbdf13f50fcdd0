# SPDX-License-Identifier: GPL-3.0-or-later
"""A seed and a failover by the shipped playbooks with nothing going wrong, for the tree that the current directory is.

Run by `python -m tests.mutants`, one tree after another on the same guests: each installs its own programs over those
of the one before, and moves the workload on from where it is.
"""

from __future__ import annotations

import json
import shlex

import pytest

from lab import Lab
from lab.disks import disk_by_number
from tests.ansible.playbooks import play

pytestmark = [pytest.mark.ansible, pytest.mark.timeout(3000)]
WORKLOAD, DISK = "fault", 2
PIECE_BYTES, PIECES = 64 << 10, 24


def role(lab: Lab, host: str) -> str:
    """The durable role of a host."""
    text = lab.ssh(host, f"cat /var/lib/bmigrate/{WORKLOAD}/state.json", check=False).stdout
    return str(json.loads(text)["role"]) if text else "none"


def test_a_seed_and_a_quiet_failover(lab: Lab) -> None:
    for name, extra in (("install.yml", {}), ("sync.yml", {"bmigrate_initial_primary": "alpha"})):
        run = play(lab, name, bmigrate_workload=WORKLOAD, **extra)
        assert run.returncode == 0, run.output[-6000:]
    (source,) = [host for host in lab.vms if role(lab, host) == "primary"]
    (target,) = [host for host in lab.vms if host != source]
    device = disk_by_number(DISK).guest_path(source)
    writes = (
        f"for n in $(seq 0 {PIECES - 1}); do dd if=/dev/urandom of={device} bs={PIECE_BYTES} count=1 "
        "seek=$((n * 37 + RANDOM % 30)) oflag=direct conv=notrunc status=none || exit; done"
    )
    lab.ssh(source, f"bash -c {shlex.quote(writes)}")
    run = play(lab, "failover.yml", bmigrate_confirm=WORKLOAD, bmigrate_report_directory="")
    assert run.returncode == 0, run.output[-6000:]
    assert (role(lab, source), role(lab, target)) == ("standby", "primary")
    result = lab.compare(DISK)
    assert result.equal, f"a quiet failover left a difference: {result}"
