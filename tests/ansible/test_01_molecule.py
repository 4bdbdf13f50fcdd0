# SPDX-License-Identifier: GPL-3.0-or-later
"""Molecule, as a developer runs it, on the lab that is up: install, sync, failover, failback.

Early by its name: the scenarios begin on guests without roles.
"""

from __future__ import annotations

import subprocess

import pytest

from lab import Lab
from tests.ansible.playbooks import ROOT, TOOLS, environment, note_installed

pytestmark = pytest.mark.ansible


@pytest.mark.timeout(2400)
def test_the_scenarios_pass_in_order(lab: Lab) -> None:
    scenarios = ["-s", "install", "-s", "sync", "-s", "failover", "-s", "failback"]
    done = subprocess.run(
        [str(TOOLS / "molecule"), "test", *scenarios],
        cwd=ROOT,
        env=dict(environment(lab), BMIGRATE_LAB_KEEP="1"),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=2300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-12000:]
    note_installed(lab)
    assert lab.ssh("alpha", "findmnt --noheadings --output TARGET /srv/pgdata", check=False).stdout.strip()
    assert not lab.ssh("beta", "findmnt --noheadings --output TARGET /srv/pgdata", check=False).stdout.strip()
