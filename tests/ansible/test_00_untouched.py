# SPDX-License-Identifier: GPL-3.0-or-later
"""On hosts where nothing is installed: --check says what is missing, everything else refuses, nothing changes.

First of the Ansible tests by its name, because the guests must be as they were booted.
"""

from __future__ import annotations

import pytest

from lab import Lab
from tests.ansible.playbooks import fingerprint, play

pytestmark = pytest.mark.ansible


def test_failover_in_check_mode_names_what_is_missing_and_changes_nothing(lab: Lab) -> None:
    before = {host: fingerprint(lab, host) for host in lab.vms}
    run = play(lab, "failover.yml", "--check", bmigrate_confirm="fault")
    assert run.returncode == 0, run.output
    for host in lab.vms:
        assert f"bmigrate is not installed on {host}" in run.output, run.output
        assert run.recap(host)["changed"] == 0
    assert {host: fingerprint(lab, host) for host in lab.vms} == before


@pytest.mark.parametrize(
    "extra, words",
    [
        ({}, "bmigrate_confirm=WORKLOAD"),
        ({"bmigrate_confirm": "nonsense"}, "Got nonsense"),
        ({"bmigrate_confirm": "fault"}, "not installed on alpha"),
    ],
)
def test_failover_is_refused_with_the_reason(lab: Lab, extra: dict[str, str], words: str) -> None:
    run = play(lab, "failover.yml", **extra)
    assert run.returncode == 2 and words in run.output, run.output
