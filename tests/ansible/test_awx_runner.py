# SPDX-License-Identifier: GPL-3.0-or-later
"""As AWX runs it: a project directory, an inventory script, extra-vars that are all text, artifacts read back."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ansible_runner
import pytest
import yaml

from lab import Lab
from tests.ansible.playbooks import (
    LIMIT_SECONDS,
    ROOT,
    TOOLS,
    environment,
    fingerprint,
    is_installed,
    note_installed,
    play,
    still,
)

pytestmark = pytest.mark.ansible
WORKLOAD = "fault"


class Awx:
    """One private data directory, laid out as AWX does, and the jobs run in it."""

    def __init__(self, lab: Lab, directory: Path) -> None:
        self.lab, self.directory = lab, directory
        self._project()
        self._inventory()
        for name in ("env", "artifacts"):
            (directory / name).mkdir()
        variables = {key: environment(lab)[key] for key in ("BMIGRATE_LAB", "PATH")}
        (directory / "env" / "envvars").write_text(json.dumps(variables))
        (directory / "env" / "settings").write_text(
            json.dumps({"job_timeout": LIMIT_SECONDS, "suppress_env_files": True})
        )

    def _project(self) -> None:
        """The repository as a checkout has it: what git knows, and nothing built."""
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            check=True,
        )
        for name in filter(None, listed.stdout.decode().split("\0")):
            source, target = ROOT / name, self.directory / "project" / name
            if source.is_symlink() or source.is_file():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, target, follow_symlinks=False)

    def _inventory(self) -> None:
        """A script that prints one JSON object with all variables in it, and no group_vars beside it."""
        script = ROOT / "inventories" / "lab" / "hosts.py"
        told = subprocess.run(
            [str(TOOLS / "python"), str(script), "--list"],
            env=environment(self.lab),
            capture_output=True,
            text=True,
            check=True,
        )
        inventory = json.loads(told.stdout)
        group = yaml.safe_load((ROOT / "inventories" / "lab" / "group_vars" / "all.yml").read_text())
        hosts = group["bmigrate_lab_hosts"]
        workloads = [dict(item, hosts=hosts) for item in group["bmigrate_workloads"]]
        inventory["all"] = {"vars": {"bmigrate_workloads": workloads}}
        path = self.directory / "inventory" / "hosts"
        path.parent.mkdir(parents=True)
        path.write_text(f"#!/usr/bin/env python3\nprint({json.dumps(json.dumps(inventory))})\n")
        path.chmod(0o755)

    def job(self, playbook: str, **extra: str) -> tuple[Any, dict[str, Any]]:
        """Run a playbook; the runner and the stats that the job leaves as artifacts."""
        assert all(isinstance(value, str) for value in extra.values())
        (self.directory / "env" / "extravars").write_text(json.dumps(extra))
        ident = f"{playbook}-{len(list((self.directory / 'artifacts').iterdir()))}"
        runner = ansible_runner.run(
            private_data_dir=str(self.directory), playbook=playbook, ident=ident, quiet=True, timeout=LIMIT_SECONDS
        )
        kept = self.directory / "artifacts" / ident
        output = (kept / "stdout").read_text()
        assert (kept / "rc").read_text().strip() == "0", output[-6000:]
        assert (kept / "status").read_text() == "successful"
        events = [json.loads(path.read_text()) for path in (kept / "job_events").glob("*.json")]
        assert not [event for event in events if event["event"] == "runner_on_unreachable"]
        (last,) = [event for event in events if event["event"] == "playbook_on_stats"]
        assert not last["event_data"]["failures"], output[-6000:]
        return runner, last["event_data"].get("artifact_data", {})


@pytest.fixture(scope="module")
def awx(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Awx]:
    yield Awx(lab, tmp_path_factory.mktemp("awx"))


def test_install_from_a_checkout(awx: Awx, lab: Lab) -> None:
    """What is built in another directory is the same to the byte: where it was installed before, nothing changes."""
    before = is_installed(lab)
    runner, _ = awx.job("install.yml")
    note_installed(lab)
    assert set(runner.stats["changed"]) - {"localhost"} == (set() if before else {"alpha", "beta"})
    assert (awx.directory / "project" / "build" / "bmigrate.pyz").exists()


def test_sync_without_waiting_and_with(awx: Awx) -> None:
    extra = {"bmigrate_workload": WORKLOAD, "bmigrate_initial_primary": "alpha"}
    _, stats = awx.job("sync.yml", bmigrate_wait="false", **extra)
    assert stats["bmigrate_sync"][WORKLOAD]["primary"] == "alpha"
    _, stats = awx.job("sync.yml", bmigrate_wait="yes", bmigrate_sync_timeout_seconds="900", **extra)
    assert stats["bmigrate_sync"][WORKLOAD]["state"] == "in_step"


def test_check_mode_predicts_and_changes_nothing(awx: Awx, lab: Lab) -> None:
    with still(lab) as before:
        run = play(lab, "failover.yml", "--check", bmigrate_confirm=WORKLOAD)
        after = {host: fingerprint(lab, host) for host in lab.vms}
    assert run.returncode == 0, run.output
    assert "blockers: none" in run.output and "from alpha to beta" in run.output, run.output
    assert "predicted downtime: not known" not in run.output and "predicted downtime:" in run.output
    assert "lag: not known" not in run.output
    assert after == before


def test_failover_leaves_its_verdict_as_an_artifact(awx: Awx, lab: Lab) -> None:
    runner, stats = awx.job("failover.yml", bmigrate_confirm=WORKLOAD)
    report = stats["bmigrate_handover"]
    assert report["verdict"] == "ok" and report["workload"] == WORKLOAD
    assert (report["source"], report["target"], report["generation"]["number"]) == ("alpha", "beta", 2)
    assert 0 < report["downtime_seconds"] < 300
    names = [phase["phase"] for phase in report["phases"]]
    assert names == ["converge", "quiesce", "drain", "prepare", "commit", "promote", "start"]
    assert report["bytes_left_when_drain_began"] is not None and len(report["digest"]) == 64
    kept = awx.directory / "project" / "artifacts"
    assert json.loads((kept / f"handover-{WORKLOAD}-{report['run_id']}.json").read_text())["verdict"] == "ok"
    assert "<html" in (kept / f"handover-{WORKLOAD}-{report['run_id']}.html").read_text()
    assert "failures" in runner.stats
    assert lab.compare(2).equal


def test_status_is_a_table_and_data(awx: Awx) -> None:
    _, stats = awx.job("status.yml")
    lines = {(line["workload"], line["host"]): line for line in stats["bmigrate_status"]}
    assert lines[WORKLOAD, "alpha"]["role"] == "standby" and lines[WORKLOAD, "beta"]["role"] == "primary"
    assert lines[WORKLOAD, "alpha"]["generation"] == lines[WORKLOAD, "beta"]["generation"] == 2
