# SPDX-License-Identifier: GPL-3.0-or-later
"""A handover that is hit at every phase: the service comes back, nothing is lost, and one host at most has it.

A client writes to PostgreSQL all along and is told nothing. Before the commit the service is back on
the source within max_downtime, by the playbook or, when that is dead, by the timer on the source;
running failover.yml again finishes the job. A watcher in each guest samples the mounts ten times a
second. The client's log is compared with the database at the end of every case.
"""

from __future__ import annotations

import json
import random
import shlex
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from demo import ledger
from demo.client_process import ClientProcess
from demo.cluster import Cluster
from lab import Lab, LabError, wait
from lab.disks import disk_by_number
from tests.ansible.controller import Controller
from tests.ansible.mounts import MountWatch
from tests.ansible.playbooks import LIMIT_SECONDS, install_once, play

pytestmark = [pytest.mark.ansible, pytest.mark.timeout(3000)]

WORKLOAD = "pgdemo"
MAX_DOWNTIME_SECONDS = 120
IDS_PER_CLIENT = 1_000_000
SERVICE = "postgresql@15-main.service"

BEFORE_COMMIT = {
    "begin": "Open the handover on the source and wait until the drain will be short",
    "converge": "Open the handover on the source and wait until the drain will be short",
    "quiesce": "Stop the workload on the source, hold its devices and ship what is left",
    "drain": "Stop the workload on the source, hold its devices and ship what is left",
    "prepare": "Let the target note the candidate",
}
FROM_COMMIT = {
    "commit": "Commit on the source",
    "promote": "Promote the target and start the workload there",
    "start": "Promote the target and start the workload there",
    "finish source": "Make the source a standby of the new generation",
    "finish target": "Let the target ship back",
}
#: A kill comes up to so many seconds after its task has begun: before, in or after what the host does in it. What is
#: to die before the commit must do so sooner than a host can be reached twice.
LATEST_BEFORE_SECONDS, LATEST_FROM_SECONDS = 2.5, 6.0
#: Has breqd take the first block of the volume for dirty.
MARK = """
import sys
sys.path.insert(0, "/usr/lib/bmigrate/bmigrate.pyz")
from bmigrate.common import paths, rpc
rpc.call(paths.breqd_socket(), "mark", workload="pgdemo", volume="pgdata", extents=[[0, 4096]], reason="test")
"""
#: The second step of a task: it has begun when one of these phases is on the host's disk.
SECOND = {"converge": "begun", "drain": "quiesced|drained", "start": "promoted|started"}


class Service:
    """The demo workload with a client on it, for all cases of this file."""

    def __init__(self, lab: Lab, directory: Path) -> None:
        self.lab = lab
        self.directory = directory
        self.cluster = Cluster(lab)
        self.watch = MountWatch(lab, {name: disk_by_number(1).guest_path(name) for name in lab.vms}, directory)
        self.clients = 0
        self.events: list[dict[str, object]] = []
        self.first_id = 1
        self.random = random.Random(seed := random.randrange(1 << 32))
        print(f"moments by seed {seed}")

    def role(self, host: str) -> str:
        """The durable role of a host, read past all programs."""
        text = self.lab.ssh(host, f"cat /var/lib/bmigrate/{WORKLOAD}/state.json", check=False).stdout
        return str(json.loads(text)["role"]) if text else "none"

    def primary(self) -> str:
        """The one host whose durable role is primary."""
        (found,) = [name for name in self.lab.vms if self.role(name) == "primary"]
        return found

    def wait_for_phase(self, controller: Controller, task: str, phase: str, host: str) -> None:
        """Wait until the task of a phase has begun, and the step itself where the task has two."""
        controller.wait_for_task(task)
        if phase in SECOND:
            look = f'grep -Eqs \'"phase": "({SECOND[phase]})"\' /var/lib/bmigrate/{WORKLOAD}/state.json'
            wait(
                lambda: self.lab.ssh(host, look, check=False).returncode == 0,
                LIMIT_SECONDS,
                f"phase {SECOND[phase]}",
                0.1,
            )

    def other(self, host: str) -> str:
        """The peer of a host."""
        return next(name for name in self.lab.vms if name != host)

    def deploy(self) -> None:
        """PostgreSQL on the primary's volume, installed, synced, with a short max_downtime."""
        if "none" in {self.role(name) for name in self.lab.vms}:
            probe = self.lab.ssh("alpha", f"blkid -p {disk_by_number(1).guest_path('alpha')}", check=False)
            if probe.returncode == 2:
                self.cluster.settle("alpha")
        install_once(self.lab)
        run = play(self.lab, "sync.yml", bmigrate_workload=WORKLOAD, bmigrate_initial_primary="alpha")
        assert run.returncode == 0, run.output[-6000:]
        for host in self.lab.vms:
            edit = f"s/max_downtime_seconds: .*/max_downtime_seconds: {MAX_DOWNTIME_SECONDS}/"
            path = f"/etc/bmigrate/{WORKLOAD}.yml"
            self.lab.ssh(
                host, f"sed -i '{edit}' {path}; grep -q 'max_downtime_seconds: {MAX_DOWNTIME_SECONDS}$' {path}"
            )
        primary = self.primary()
        self.lab.ssh(primary, f"systemctl start {SERVICE}", timeout=300)
        if "ledger" not in self.cluster.sql(primary, "select datname from pg_database").split():
            self.cluster.create_ledger(primary)
        else:
            self.cluster.sql(primary, f"alter role ledger password '{self.cluster.password}'")
            self.first_id = max([0, *self.cluster.rows(primary)]) + 1
        for host in self.lab.vms:
            self.watch.start(host)

    def client(self) -> ClientProcess:
        """A client with numbers of its own."""
        self.clients += 1
        first = self.first_id + self.clients * IDS_PER_CLIENT
        return ClientProcess(self.cluster.conninfo(), self.directory / f"client-{self.clients}", first)

    def judge(self, client: ClientProcess) -> list[ledger.Outage]:
        """End the client; nothing that was acknowledged to any client may be missing. Returns its outages."""
        client.stop()
        events = client.events()
        self.events += events
        assert ledger.missing(self.events, self.cluster.rows(self.primary())) == []
        return ledger.outages(events)

    def wait_in_step(self) -> None:
        """Until the replica is in step, whatever was hit before."""
        command = f"bmigrate sync --workload {WORKLOAD} --wait --timeout 600 --json"
        done = self.lab.ssh(self.primary(), command, check=False, timeout=660)
        assert done.returncode == 0, done

    def failover(self, log: Path) -> Controller:
        """Start failover.yml."""
        return Controller(self.lab, log, "failover.yml", bmigrate_confirm=WORKLOAD, bmigrate_report_directory="")

    def kill_in(self, controller: Controller, task: str, phase: str, host: str) -> None:
        """Kill the controller at a random moment from the beginning of a phase on."""
        self.wait_for_phase(controller, task, phase, host)
        latest = LATEST_BEFORE_SECONDS if phase in BEFORE_COMMIT else LATEST_FROM_SECONDS
        moment = time.monotonic() + self.random.uniform(0, latest)
        wait(lambda: time.monotonic() >= moment or controller.process.poll() is not None, 60, "the moment", 0.05)
        controller.kill()
        # What it had asked for goes on without it, to the end of the step.
        for name in self.lab.vms:
            wait(lambda name=name: not self.is_stepping(name), LIMIT_SECONDS, f"{name} to end its step", 0.5)  # type: ignore[misc]

    def is_stepping(self, host: str) -> bool:
        """Whether a module of Ansible's, or a step, is running on a host (the shell that asks is neither)."""
        look = "pgrep -fx /usr/bin/python3 || pgrep -f '[b]migrate handover'"
        return self.lab.ssh(host, f"bash -c {shlex.quote(look)}", check=False).returncode == 0

    def is_open(self) -> bool:
        """Whether a handover is open on one of the hosts."""
        path = f"/var/lib/bmigrate/{WORKLOAD}/state.json"
        return any(json.loads(self.lab.ssh(name, f"cat {path}").stdout)["handover"] for name in self.lab.vms)

    def finish_the_handover(self, source: str, log: Path) -> None:
        """Run failover.yml once more; the other host is primary then, and this one its standby.

        The step that a dead controller asked for may have been the last one: then there is nothing left to run.
        """
        if self.is_open() or self.role(source) == "primary":
            again = self.failover(log)
            assert again.finish() == 0, again.output()[-6000:]
        assert self.primary() == self.other(source)
        assert self.role(source) == "standby"


@pytest.fixture(scope="module")
def service(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    made = Service(lab, tmp_path_factory.mktemp("clients"))
    try:
        made.deploy()
        yield made
        for host in lab.vms:
            assert made.watch.is_watched(host)
            assert made.watch.spans_of(host), f"{host} never had the volume mounted: nothing was shown"
        assert made.watch.overlaps() == []
    finally:
        made.watch.stop()


@pytest.mark.parametrize("before, after", list(zip(BEFORE_COMMIT, FROM_COMMIT, strict=True)))
def test_a_controller_killed_before_the_commit_and_again_from_it_on(
    service: Service, tmp_path: Path, before: str, after: str
) -> None:
    """The first death leaves the service on the source; the run after it dies too; the third finishes the job."""
    source = service.primary()
    with service.client() as client:
        client.wait_for_commits(20)
        controller = service.failover(tmp_path / "first.log")
        task = BEFORE_COMMIT[before]
        if before == "quiesce":
            controller.wait_for_task(task)
            wait(lambda: bool(ledger.outages(client.events())), LIMIT_SECONDS, "the client to be refused", 0.05)
            controller.kill()
        else:
            service.kill_in(controller, task, before, source)
        client.wait_for_commits(20, limit_seconds=MAX_DOWNTIME_SECONDS + LIMIT_SECONDS)
        assert service.primary() == source
        outages = service.judge(client)
    downtimes = [outage.downtime_seconds for outage in outages]
    assert all(seconds is not None and seconds <= MAX_DOWNTIME_SECONDS for seconds in downtimes), downtimes
    assert downtimes or before in ("begin", "converge"), "nothing was stopped: the kill came too early"
    with service.client() as client:
        client.wait_for_commits(20)
        controller = service.failover(tmp_path / "second.log")
        service.kill_in(controller, FROM_COMMIT[after], after, service.other(source))
        if service.role(source) == "primary":  # dead before it could ask for the commit
            client.wait_for_commits(20, limit_seconds=MAX_DOWNTIME_SECONDS + LIMIT_SECONDS)
        service.finish_the_handover(source, tmp_path / "third.log")
        client.wait_for_commits(20)
        service.judge(client)


def test_a_target_that_dies_in_quiesce_costs_a_short_outage_and_nothing_else(service: Service, tmp_path: Path) -> None:
    source = service.primary()
    target = service.other(source)
    with service.client() as client:
        client.wait_for_commits(20)
        controller = service.failover(tmp_path / "failover.log")
        controller.wait_for_task(BEFORE_COMMIT["quiesce"])
        service.lab.kill(target)
        assert controller.finish() != 0, controller.output()[-4000:]
        client.wait_for_commits(20, limit_seconds=MAX_DOWNTIME_SECONDS + LIMIT_SECONDS)
        assert service.role(source) == "primary"
        service.lab.start(target)
        service.watch.start(target)
        (outage,) = service.judge(client)
    assert outage.downtime_seconds is not None and outage.downtime_seconds <= MAX_DOWNTIME_SECONDS
    service.wait_in_step()


def test_a_drain_that_is_killed_puts_the_service_back(service: Service, tmp_path: Path) -> None:
    source = service.primary()
    with fault(service.lab, source, "ship.drain_barrier=kill"), service.client() as client:
        client.wait_for_commits(20)
        controller = service.failover(tmp_path / "failover.log")
        assert controller.finish() != 0
        assert "was undone before its commit" in controller.output(), controller.output()[-4000:]
        client.wait_for_commits(20, limit_seconds=MAX_DOWNTIME_SECONDS + LIMIT_SECONDS)
        assert service.primary() == source
        (outage,) = service.judge(client)
        assert outage.downtime_seconds is not None and outage.downtime_seconds <= MAX_DOWNTIME_SECONDS
    service.wait_in_step()


def test_a_digest_that_does_not_match_is_found_before_the_commit(service: Service, tmp_path: Path) -> None:
    """Somebody flips bytes on the standby's disk between the last pass and its proof."""
    source = service.primary()
    target = service.other(source)
    device = disk_by_number(1).guest_path(target)
    with fault(service.lab, source, "ship.drain_clean=delay:12"), service.client() as client:
        client.wait_for_commits(20)
        controller = service.failover(tmp_path / "failover.log")
        service.wait_for_phase(controller, BEFORE_COMMIT["drain"], "drain", source)
        wait(lambda: _draining(service, source), LIMIT_SECONDS, "the drain to begin", 0.1)
        # Nothing may be left for the drain. Block 0 is, when it is marked in the first of the delays; what is
        # flipped in the second one, after it was shipped, is in its first KiB, which is not ext4's.
        service.lab.ssh(source, "python3 -", input_text=MARK)
        flip = f"dd if=/dev/urandom of={device} bs=512 count=1 oflag=direct conv=notrunc,fsync status=none"
        service.lab.ssh(target, f"for i in $(seq 20); do {flip}; sleep 1; done")
        assert controller.finish() != 0, controller.output()[-4000:]
        assert "read back something else" in controller.output(), controller.output()[-4000:]
        client.wait_for_commits(20, limit_seconds=MAX_DOWNTIME_SECONDS + LIMIT_SECONDS)
        assert service.primary() == source
        service.judge(client)
        service.wait_in_step()  # before the shipper is restarted, which would begin the comparison anew
    service.finish_the_handover(source, tmp_path / "again.log")


def _draining(service: Service, source: str) -> bool:
    done = service.lab.ssh(source, f"bmigrate status --workload {WORKLOAD} --json", check=False)
    try:
        (entry,) = json.loads(done.stdout)["data"]["workloads"]
    except (ValueError, KeyError, TypeError) as error:
        raise LabError(f"no status: {done.stdout} {done.stderr}") from error
    return bool((entry["ship"] or {}).get("state") == "draining")


class fault:
    """Switch a fault point of the ship daemon on for a block, by a drop-in, as docs/safety.md says."""

    def __init__(self, lab: Lab, host: str, plan: str) -> None:
        self.lab, self.host, self.plan = lab, host, plan

    def _set(self, text: str) -> None:
        directory = "/run/systemd/system/bmigrate-ship.service.d"
        self.lab.ssh(
            self.host,
            f"mkdir -p {directory}; printf '{text}' > {directory}/fault.conf; systemctl daemon-reload; "
            "systemctl restart bmigrate-ship",
            timeout=180,
        )
        began = time.monotonic()

        def in_step() -> bool:
            status = self.lab.ssh(self.host, f"bmigrate sync --workload {WORKLOAD} --json", check=False, timeout=180)
            return status.returncode == 0

        wait(in_step, LIMIT_SECONDS, f"{self.host} to ship again after {time.monotonic() - began:.0f} s", 1.0)

    def __enter__(self) -> None:
        self._set(f"[Service]\\nEnvironment=BMIGRATE_FAULTS={self.plan}\\n")

    def __exit__(self, *_: object) -> None:
        self._set("")
