# SPDX-License-Identifier: GPL-3.0-or-later
"""Two hosts in memory, for tests of the handover: the real steps run over hosts that can die anywhere.

Each host has a state on disk (what a power cut leaves), the same in the page cache (what a killed
process leaves), and what runs on it. Every effect of a step goes through ``World.tick``, which may
end the step there, and which checks after each effect that at most one host may run the workload.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from bmigrate.common import config as configs
from bmigrate.common.errors import BmigrateError, PhaseError, RefusedError
from bmigrate.common.state import WorkloadState
from bmigrate.handover import boot, judge, machine, source, target
from bmigrate.handover.store import Store

Fields = dict[str, Any]


class Killed(BaseException):
    """The process of a step is dead (or its host is): nothing of it runs any more."""


def config_of(host: str) -> configs.Config:
    """The workload as configured on ``alpha`` or ``beta``."""
    return configs.parse(
        {
            "workload": "pg",
            "host": host,
            "hosts": {"alpha": {"address": "10.0.0.1"}, "beta": {"address": "10.0.0.2"}},
            "volumes": [{"name": "data", "devices": {"alpha": "/dev/vda", "beta": "/dev/vdb"}}],
            "mounts": [{"volume": "data", "path": "/srv/pg", "fstype": "ext4"}],
            "services": ["first.service", "second.service"],
            "hooks": {"before_quiesce": [["/bin/hook"]]},
            "health": {"command": ["/bin/health"], "timeout_seconds": 1},
        }
    )


class Machine:
    """One host. Its methods are those of ``bmigrate.handover.host.Host`` that the steps call."""

    def __init__(self, world: World, name: str) -> None:
        self.world, self.name = world, name
        self.config = config_of(name)
        self.workload = "pg"
        first = {"number": 1, "id": "g1"}
        role = "primary" if name == "alpha" else "standby"
        self.disk = WorkloadState("pg", name, role=role, generation=first, history=[first], shipping=role == "primary")
        self.cache = copy.deepcopy(self.disk)
        self.content = 0
        self.boots = 0
        self.failing: set[str] = set()
        self.breaking: set[str] = set()
        self.writing_stranger = False
        self.suspect: str | None = None
        self.busy_for = 0.0
        self._power_on()

    def _power_on(self) -> None:
        self.boots += 1
        self.cache = copy.deepcopy(self.disk)
        self.marker = False
        self.is_mounted = False
        self.running: set[str] = set()
        self.dead_man: str | None = None
        self.sealed = False
        self.held = self.cache.role == "standby"
        self.continuous = self.held
        self.fenced = self.cache.handover is not None
        self.tracked: str | None = "resume" if self.cache.role == "primary" else None

    # -- what the tests do to it ------------------------------------------------------------------

    def power_cut(self) -> None:
        """Everything that was not on disk is gone."""
        self._power_on()
        self.continuous = False

    @property
    def active(self) -> bool:
        """Whether the workload could write here."""
        return self.is_mounted or bool(self.running)

    def facts(self) -> Fields:
        """What discover says of the state; it is durable before it is said."""
        if self.world.durable_reads:
            self.disk = copy.deepcopy(self.cache)
        item = self.cache
        return {
            "host": self.name,
            "workload": "pg",
            "role": item.role,
            "history": item.history,
            "abandoned": item.abandoned,
            "candidate": item.candidate,
            "demoted": item.demoted,
            "phase": machine.phase_of(item),
            "run_id": item.handover["run_id"] if item.handover else None,
            "side": item.handover["side"] if item.handover else None,
            "state": item.to_dict(),
        }

    @contextlib.contextmanager
    def opened(self) -> Iterator[MemoryStore]:
        """As ``store.opened``: what was read is durable before anybody acts on it."""
        if self.world.durable_reads:
            self.disk = copy.deepcopy(self.cache)
        yield MemoryStore(self)

    # -- the edge ---------------------------------------------------------------------------------

    def _effect(self, name: str, *details: Any) -> None:
        self.world.tick(self, name, *details)
        if name in self.breaking:
            raise OSError(5, f"{name}: Input/output error")
        if name in self.failing:
            raise RefusedError(f"{name} fails on purpose", reason="made_to_fail")

    def now(self) -> float:
        return self.world.clock

    def boot_id(self) -> str:
        return f"{self.name}-{self.boots}"

    def pause(self, seconds: float) -> None:
        self.world.clock += seconds
        self.busy_for = max(0.0, self.busy_for - seconds)

    def arm_dead_man(self, run_id: str, seconds: float) -> None:
        self._effect("arm")
        self.dead_man = self.dead_man or run_id

    def dead_man_armed(self) -> bool:
        return self.dead_man is not None

    def disarm_dead_man(self) -> None:
        self._effect("disarm")
        self.dead_man = None

    def run_hooks(self, hooks: Sequence[Sequence[str]]) -> None:
        self._effect("hooks")

    def set_marker(self) -> None:
        self._effect("marker")
        self.marker = True

    def clear_marker(self) -> None:
        self._effect("unmark")
        self.marker = False

    def stop_service(self, service: str) -> None:
        self._effect("stop", service)
        self.running.discard(service)

    def start_service(self, service: str) -> None:
        self._effect("start", service)
        if not (self.marker and self.is_mounted):
            raise RefusedError("assertion failed", reason="command_failed")
        if not self.active or service not in self.running:
            self.running.add(service)
        self.world.check_running(self)

    def stop_mounts(self) -> None:
        self._effect("unmount")
        if self.running:
            raise RefusedError("busy", reason="device_busy")
        self.is_mounted = False

    def start_mounts(self) -> None:
        self._effect("mount")
        if not self.marker or self.held:
            raise RefusedError("not permitted, or held", reason="mount_failed")
        self.is_mounted = True
        self.world.check_running(self)

    def mounted(self) -> dict[str, list[str]]:
        return {"data": ["1: /srv/pg"] if self.is_mounted else []}

    def writers(self) -> dict[str, list[str]]:
        return {"data": ["process 7 (dd)"] if self.writing_stranger else []}

    def flush_devices(self) -> None:
        self._effect("flush")

    def settle_devices(self, wait: bool) -> None:
        self._effect("settle")

    def health_check(self) -> Fields | None:
        self._effect("health")
        return {"attempts": 1, "seconds": 0.0}

    def hold(self, op: str, wait_seconds: float = 60.0, **fields: Any) -> Fields:
        self._effect(f"hold.{op}")
        if op == "hold":
            if self.is_mounted or self.busy_for:
                raise RefusedError("mounted", reason="device_busy")
            self.held = True
        elif op == "release":
            if self.cache.role == "standby":
                raise RefusedError("a standby stays held", reason="wrong_role")
            self.held = False
            self.fenced = False
        elif op == "reload":
            self.fenced = self.fenced and self.cache.handover is not None
        elif op == "fence":
            self.continuous = self.fenced = True
            return {"epoch": 1}
        status = {"held": self.held, "continuous": self.continuous and not self.suspect, "suspect": self.suspect}
        return {"volumes": [dict(status, volume="data")]}

    @contextlib.contextmanager
    def holding(self) -> Iterator[Any]:
        try:
            yield self.hold
        finally:
            self.fenced = self.fenced and self.cache.handover is not None

    def breqd(self, op: str, wait_seconds: float = 30.0, **fields: Any) -> Fields:
        self._effect(f"breqd.{op}", fields.get("mode"))
        if op == "attach":
            if fields["mode"] == "promote" and not (self.held and self.continuous):
                raise RefusedError("not held", reason="not_held")
            self.tracked = str(fields["mode"])
            return {"attachment": "a", "suspect": None}
        if op == "detach":
            self.tracked = None
        dirty = 0 if self.world.peer(self).content == self.content else 4096
        return {
            "volumes": [{"volume": "data", "attached": True, "suspect": None, "dirty_bytes": dirty, "claimed_bytes": 0}]
        }

    def ship(self, op: str, wait_seconds: float = 30.0, **fields: Any) -> Fields:
        self._effect(f"ship.{op}")
        if op == "drain":
            if not self.held or self.active:
                raise RefusedError("the drain needs the device held", reason="not_held")
            if self.world.peer(self).fenced:
                raise RefusedError("the standby lets no sender in", reason="sealed")
            self.world.peer(self).content = self.content
            self.sealed = True
            return {"digest": f"digest-{self.content}", "seconds": 0.0, "bytes_shipped": 1, "epoch": 1}
        if op == "unseal":
            self.sealed = False
        return {"predicted_drain_seconds": 0.0, "bytes_left": 0}


class MemoryStore(Store):
    """A store whose save may die before it is visible, and after that before it is durable."""

    def __init__(self, host: Machine) -> None:
        super().__init__(copy.deepcopy(host.cache))
        self.host = host

    def save(self, after: WorkloadState) -> None:
        """As ``state.save``: visible with the rename, safe with the fsync of the directory."""
        self.host.world.tick(self.host, "replace", machine.phase_of(after))
        self.host.cache = copy.deepcopy(after)
        self.host.world.tick(self.host, "renamed", machine.phase_of(after))
        self.host.disk = copy.deepcopy(after)
        self.state = after
        self.host.world.tick(self.host, "saved", machine.phase_of(after))


class World:
    """Both hosts, a clock, and the countdown to the next death."""

    def __init__(self) -> None:
        self.clock = 1000.0
        self.trace: list[tuple[Any, ...]] = []
        self.die_in: int | None = None
        self.durable_reads = True
        self.last_written = 0
        self.alpha = Machine(self, "alpha")
        self.beta = Machine(self, "beta")
        self.hosts = {"alpha": self.alpha, "beta": self.beta}
        for host in self.hosts.values():
            self.boot(host)
        self.trace.clear()

    def peer(self, host: Machine) -> Machine:
        """The other host."""
        return self.beta if host is self.alpha else self.alpha

    @property
    def alive(self) -> bool:
        """Whether the death that was ordered is still to come."""
        return self.die_in is not None

    def tick(self, host: Machine, name: str, *details: Any) -> None:
        """One effect is about to happen, or has happened."""
        self.check()
        self.trace.append((host.name, name, *details))
        if self.die_in is not None:
            if self.die_in <= 0:
                self.die_in = None
                raise Killed(name)
            self.die_in -= 1

    def check(self) -> None:
        """The promise: at most one host may run the workload, at every instant."""
        assert not (self.alpha.active and self.beta.active), "both hosts run the workload"
        assert not (self.alpha.marker and self.beta.marker), "both hosts may run the workload"
        assert not (
            self.alpha.cache.role == self.beta.cache.role == "primary" and self.alpha.marker and self.beta.marker
        )

    def check_running(self, host: Machine) -> None:
        """A host that runs the workload has everything that was written before."""
        self.check()
        assert host.content == self.last_written, (
            f"{host.name} runs on content {host.content}, {self.last_written} exists"
        )
        assert host.tracked is not None, f"{host.name} runs untracked"

    def write(self) -> None:
        """The workload writes, where it runs."""
        for host in self.hosts.values():
            if host.running:
                self.last_written += 1
                host.content = self.last_written

    def boot(self, host: Machine) -> None:
        """The boot unit; retried by the operator until it is through."""
        with host.opened() as store:
            boot.boot(store, host)  # type: ignore[arg-type]

    def step(self, host: Machine, step: str, run_id: str, expect: str | None = None, **given: Any) -> Fields | None:
        """What the command line does for one step; returns the result, None when the process died."""
        try:
            with host.opened() as store:
                earlier = machine.recorded(store.state, step, run_id)
                if earlier is not None:
                    return earlier
                machine.check(store.state, step, run_id, expect)
                return self._act(host, store, step, run_id, given)
        except Killed:
            return None

    def _act(self, host: Any, store: Store, step: str, run_id: str, given: Fields) -> Fields:
        record = store.state.handover or {}
        if step == "prepare":
            return target.prepare(store, host, run_id, given["candidate"], given["digest"])
        if step == "commit":
            return source.commit(store, host, run_id, given["candidate"])
        if step == "promote":
            return target.promote(store, host, run_id, given["certificate"], given.get("accept_unheld", True))
        if step == "cancel":
            return target.cancel(store, host, run_id, given["abandoned"])
        if step == "resume":
            return source.resume(store, host, run_id, str(given.get("reason", "test")))
        module: Any = target if step == "start" or record.get("side") == "target" else source
        return dict(getattr(module, step)(store, host, run_id))

    def fire_dead_man(self, host: Machine) -> None:
        """The timer is due: systemd repeats the service until the workload runs or the commit has happened."""
        if host.dead_man is None:
            return
        try:
            if self.step(host, "resume", host.dead_man, reason="dead-man") is None:
                return
        except PhaseError:
            pass
        except BmigrateError as error:
            if error.reason != "handover_open":
                return
        host.dead_man = None

    def verdict(self) -> Fields:
        """Who is who, by the rules of ``judge``."""
        return judge.verdict(self.alpha.facts(), self.beta.facts())

    def go_on(self, run_id: str) -> Fields:
        """What failover.yml does: one step further than the facts say; returns the verdict it went by."""
        found = self.verdict()
        assert found["problem"] is None, found["problem"]
        src, dst = self.hosts[found["source"]], self.hosts[found["target"]]
        step, run_id = str(found["next_step"]), found["run_id"] or run_id
        host = src if found["next_side"] == "source" else dst
        record = src.cache.handover or src.cache.last_handover or {}
        self.step(
            host,
            "quiesce" if step == "converge" else step,
            run_id,
            candidate=record.get("candidate"),
            digest=(record.get("results", {}).get("drain") or {}).get("digest"),
            certificate=src.cache.demoted,
            abandoned=src.cache.abandoned,
        )
        return found

    def rescue(self) -> None:
        """What the playbook does when a step before the commit fails: the source takes the workload back."""
        for host in self.hosts.values():
            if host.cache.handover and host.cache.handover["side"] == "source":
                with contextlib.suppress(PhaseError):
                    self.step(host, "resume", host.cache.handover["run_id"], reason="rescue")

    def finish_it(self, run_id: str, limit: int = 20) -> None:
        """Go on until no handover is open.

        Raises:
            AssertionError: it does not end.
        """
        for _ in range(limit):
            if self.verdict()["fresh"]:
                return
            try:
                self.go_on(run_id)
            except BmigrateError:
                self.rescue()
        raise AssertionError(f"not finished after {limit} steps: {self.alpha.facts()} {self.beta.facts()}")


def changed_config(host: Machine, **fields: Any) -> None:
    """Give a host another configuration."""
    host.config = replace(host.config, **fields)
