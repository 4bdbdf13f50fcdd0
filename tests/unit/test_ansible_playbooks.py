# SPDX-License-Identifier: GPL-3.0-or-later
"""The shipped playbooks against hosts that do not answer: refused with the reason, no wrong word, nothing asked."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.unit.ansible_module import ROOT

WORKLOAD = {
    "workload": "w",
    "hosts": {"alpha": {"address": "192.0.2.1"}, "beta": {"address": "192.0.2.2"}},
    "volumes": [{"name": "v", "devices": {"alpha": "/dev/x", "beta": "/dev/y"}}],
}


@pytest.fixture
def inventory(tmp_path: Path) -> Path:
    """Two hosts behind a port of this machine on which nobody listens."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    reach = {"ansible_host": "127.0.0.1", "ansible_port": port, "ansible_user": "nobody"}
    path = tmp_path / "hosts.yml"
    hosts = {"alpha": reach, "beta": reach}
    path.write_text(yaml.safe_dump({"all": {"hosts": hosts, "vars": {"bmigrate_workloads": [WORKLOAD]}}}))
    return path


def play(inventory: Path, name: str, *words: str, **extra: Any) -> tuple[int, str]:
    """Exit code and output of a playbook, as an operator starts it; standard input is closed."""
    argv = [str(Path(sys.executable).parent / "ansible-playbook"), "-i", str(inventory), name, *words]
    if extra:
        argv += ["-e", json.dumps(extra)]
    environment = {**os.environ, "ANSIBLE_NOCOLOR": "1", "ANSIBLE_TIMEOUT": "5", "ANSIBLE_SSH_RETRIES": "0"}
    environment["ANSIBLE_LOCAL_TEMP"] = str(inventory.parent / "tmp")
    environment["ANSIBLE_SHOW_CUSTOM_STATS"] = "1"
    done = subprocess.run(
        argv,
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    return done.returncode, done.stdout


def test_an_unreachable_source_is_refused_with_the_reason(inventory: Path) -> None:
    code, output = play(inventory, "failover.yml", bmigrate_confirm="w")
    assert code == 2
    assert "host alpha is unreachable" in output and "Connection refused" in output
    assert "promoting a replica without its primary is not supported" in output
    assert "verdict: blocked" in output or '"verdict": "blocked"' in output, output[-2000:]


def test_check_mode_prints_the_same_and_ends_well(inventory: Path) -> None:
    code, output = play(inventory, "failover.yml", "--check", bmigrate_confirm="w")
    assert code == 0 and "host beta is unreachable" in output and "nothing was changed" in output


@pytest.mark.parametrize("extra, word", [({}, "Got nothing"), ({"bmigrate_confirm": "other"}, "Got other")])
def test_without_the_name_of_a_workload_no_host_is_touched_and_nothing_is_asked(
    inventory: Path, extra: dict[str, str], word: str
) -> None:
    code, output = play(inventory, "failover.yml", **extra)
    assert code == 2 and word in output and "one of w" in output.replace("\n", " ").replace("  ", " ")


def test_sync_names_the_host_that_is_missing(inventory: Path) -> None:
    code, output = play(inventory, "sync.yml", bmigrate_initial_primary="alpha")
    assert code == 2 and "cannot be synced" in output and "alpha is unreachable" in output


def test_sync_and_install_refuse_a_workload_that_nobody_defined(inventory: Path) -> None:
    for name in ("sync.yml", "install.yml"):
        code, output = play(inventory, name, bmigrate_workload="other")
        assert code == 2 and "There is no workload other" in output and "Known are w" in output, name


def test_status_has_a_line_for_every_host_and_ends_well(inventory: Path) -> None:
    code, output = play(inventory, "status.yml")
    assert code == 0
    assert output.count("unreachable: ") >= 2 and "WORKLOAD" in output
