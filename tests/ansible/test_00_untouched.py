# SPDX-License-Identifier: GPL-3.0-or-later
"""On hosts where nothing is installed: --check says what is missing, everything else refuses, nothing changes.

First of the Ansible tests by its name: it makes the guests anew when earlier tests have installed something.
"""

from __future__ import annotations

import pytest

from lab import Lab
from tests.ansible.playbooks import bare_guests, fingerprint, play

pytestmark = pytest.mark.ansible


@pytest.fixture(scope="module")
def bare(lab: Lab) -> Lab:
    """Guests on which bmigrate was never installed."""
    bare_guests(lab)
    return lab


def test_failover_in_check_mode_names_what_is_missing_and_changes_nothing(bare: Lab) -> None:
    before = {host: fingerprint(bare, host) for host in bare.vms}
    run = play(bare, "failover.yml", "--check", bmigrate_confirm="fault")
    assert run.returncode == 0, run.output
    for host in bare.vms:
        assert f"bmigrate is not installed on {host}" in run.output, run.output
        assert run.recap(host)["changed"] == 0
    assert {host: fingerprint(bare, host) for host in bare.vms} == before


@pytest.mark.parametrize(
    "extra, words",
    [
        ({}, "bmigrate_confirm=WORKLOAD"),
        ({"bmigrate_confirm": "nonsense"}, "Got nonsense"),
        ({"bmigrate_confirm": "fault"}, "not installed on alpha"),
    ],
)
def test_failover_is_refused_with_the_reason(bare: Lab, extra: dict[str, str], words: str) -> None:
    run = play(bare, "failover.yml", **extra)
    assert run.returncode == 2 and words in run.output, run.output


def test_without_kernel_headers_the_installation_is_refused_and_changes_nothing(bare: Lab) -> None:
    """The guests have no way to a package archive, so what is missing stays missing."""
    link = "/lib/modules/$(uname -r)/build"
    for host in bare.vms:
        bare.ssh(host, f"mv {link} /var/tmp/build.aside")
    try:
        before = {host: fingerprint(bare, host) for host in bare.vms}
        run = play(bare, "install.yml")
        assert run.returncode == 2, run.output
        for host in bare.vms:
            assert f"{host}: the headers of the running kernel are missing" in run.output, run.output
            assert run.recap(host)["changed"] == 0
        assert {host: fingerprint(bare, host) for host in bare.vms} == before
    finally:
        for host in bare.vms:
            bare.ssh(host, f"mv /var/tmp/build.aside {link}")
