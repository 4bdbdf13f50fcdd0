# SPDX-License-Identifier: GPL-3.0-or-later
"""Two hosts, crashes anywhere, a dead-man timer at any moment, two controllers: one workload.

Whatever happens, at most one host may run it, nobody runs it on old data, a committed handover can
be finished, and before the commit the source can take the workload back.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from bmigrate.common import faults
from bmigrate.common.errors import BmigrateError, PhaseError, RefusedError
from bmigrate.handover import machine
from tests.unit.handover_world import Killed, Machine, World

SOURCE = ["begin", "quiesce", "drain", "commit", "finish", "resume"]
TARGET = ["prepare", "promote", "start", "finish", "cancel"]
DEATHS = st.one_of(st.none(), st.none(), st.integers(0, 14))


class TwoHosts(RuleBasedStateMachine):
    """Any step, by any controller, with anything it has ever seen, dying anywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        #: what the controller of each run has seen last, perhaps long ago
        self.seen: dict[str, dict[str, Any]] = {}
        self.runs: list[str] = []
        self.abandoned: list[list[Any]] = [[]]

    @initialize()
    def start(self) -> None:
        faults.configure("")

    def _fresh_run(self) -> str:
        """No controller uses a run id twice."""
        self.runs.append(f"r{len(self.runs)}")
        return self.runs[-1]

    def _remember(self) -> None:
        for host in self.world.hosts.values():
            record = host.cache.handover or {}
            found = {
                "candidate": record.get("candidate"),
                "digest": (record.get("results", {}).get("drain") or {}).get("digest"),
                "certificate": host.cache.demoted,
            }
            if record and record["side"] == "source":
                self.seen.setdefault(record["run_id"], {}).update({key: value for key, value in found.items() if value})
            if host.cache.abandoned not in self.abandoned:
                self.abandoned.append(list(host.cache.abandoned))

    def _attempt(self, host: Machine, step: str, die_in: int | None, data: Any) -> None:
        if step != "begin" and not self.runs:
            return
        run_id = self._fresh_run() if step == "begin" else data.draw(st.sampled_from(self.runs[-4:]), label="run")
        given = dict({"digest": "none", "certificate": {}}, **self.seen.get(run_id, {}))
        given["abandoned"] = data.draw(st.sampled_from(self.abandoned))
        if "candidate" not in given and step in ("prepare", "commit"):
            return
        self.world.die_in = die_in
        try:
            self.world.step(host, step, run_id, **given)
        except BmigrateError:
            pass
        finally:
            self.world.die_in = None
            self._remember()

    @rule(step=st.sampled_from(SOURCE + TARGET), name=st.sampled_from(["alpha", "beta"]), die_in=DEATHS, data=st.data())
    def any_step(self, step: str, name: str, die_in: int | None, data: Any) -> None:
        self._attempt(self.world.hosts[name], step, die_in, data)

    @rule(die_in=DEATHS)
    def playbook(self, die_in: int | None) -> None:
        """A controller that goes by the facts; most sequences get far only because of it."""
        self.world.die_in = die_in
        try:
            if self.world.verdict()["problem"] is None:
                self.world.go_on(self._fresh_run())
        except BmigrateError:
            pass
        finally:
            self.world.die_in = None
            self._remember()

    @rule(steps=st.integers(2, 6), die_in=st.integers(0, 40))
    def playbook_far(self, steps: int, die_in: int) -> None:
        """The same, some steps in a row, so that the later ones are met often, and die there."""
        for _ in range(steps):
            self.playbook(die_in=None)
        self.playbook(die_in=die_in)

    @rule(name=st.sampled_from(["alpha", "beta"]), die_in=DEATHS)
    def dead_man(self, name: str, die_in: int | None) -> None:
        self.world.die_in = die_in
        self.world.fire_dead_man(self.world.hosts[name])
        self.world.die_in = None

    @rule(name=st.sampled_from(["alpha", "beta"]), die_in=DEATHS)
    def power_cut(self, name: str, die_in: int | None) -> None:
        """The host goes down and boots; the boot itself may die, and is then done again."""
        host = self.world.hosts[name]
        host.power_cut()
        self.world.die_in = die_in
        try:
            self.world.boot(host)
        except Killed:
            host.power_cut()
            self.world.boot(host)
        finally:
            self.world.die_in = None

    @rule()
    def writes(self) -> None:
        self.world.write()

    @rule()
    def sync(self) -> None:
        """The shipper brings the replica up to date, where it may."""
        for host in self.world.hosts.values():
            peer = self.world.peer(host)
            same = machine.same(host.cache.generation, peer.cache.generation)
            prepared = machine.phase_of(peer.cache) == machine.PREPARED
            if host.cache.role == "primary" and host.cache.shipping and peer.cache.role == "standby" and same:
                if not prepared and not host.sealed:
                    peer.content = host.content

    @invariant()
    def one_runs(self) -> None:
        self.world.check()

    @invariant()
    def committed_is_not_abandoned(self) -> None:
        for host in self.world.hosts.values():
            generations = [item["number"] for item in host.disk.history]
            assert generations == sorted(set(generations)), "a generation was committed twice"
            for item in host.disk.abandoned:
                for other in self.world.hosts.values():
                    assert not machine.listed(item, other.disk.history), "an abandoned generation was committed"
                    assert not machine.same(item, (other.disk.demoted or {}).get("candidate"))

    @precondition(lambda self: any(host.cache.demoted for host in self.world.hosts.values()))
    @rule()
    def after_the_commit_the_source_never_comes_back(self) -> None:
        source = next(host for host in self.world.hosts.values() if host.cache.demoted)
        for run_id in self.runs:
            if machine.recorded(source.cache, "resume", run_id) is None:
                with pytest.raises((PhaseError, RefusedError)):
                    self.world.step(source, "resume", run_id)
        assert not source.active and not source.marker

    def teardown(self) -> None:
        """Whatever has happened, the facts say how to go on, and it ends with one host that runs the workload."""
        hosts = self.world.hosts.values()
        committed = next((host for host in hosts if machine.phase_of(host.disk) == machine.COMMITTED), None)
        self.world.finish_it(self._fresh_run())
        for host in self.world.hosts.values():
            self.world.fire_dead_man(host)
        running = [host for host in self.world.hosts.values() if host.running == set(host.config.services)]
        assert len(running) == 1, "nobody runs the workload"
        if committed is not None:
            assert running[0] is self.world.peer(committed), "a committed handover did not end on the target"
        super().teardown()


TestTwoHosts = TwoHosts.TestCase
TestTwoHosts.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
