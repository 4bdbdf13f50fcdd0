# SPDX-License-Identifier: GPL-3.0-or-later
"""Two hosts' facts in, one verdict out: who is the source, who the target, what comes next. Pure.

Promise: when the facts allow more than one reading (two primaries, none, forked histories), the
answer is a problem and no roles. An interrupted handover is recognised from any point, and the next
step named, so that running failover.yml again finishes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bmigrate.handover import machine

Fields = dict[str, Any]

#: (source phase, target phase) of one run id -> (step, side) that goes on; None: nothing is open
_NEXT: dict[tuple[str, str], tuple[str, str]] = {
    (machine.BEGUN, machine.IDLE): ("converge", "source"),
    (machine.QUIESCED, machine.IDLE): ("drain", "source"),
    (machine.DRAINED, machine.IDLE): ("prepare", "target"),
    (machine.DRAINED, machine.PREPARED): ("commit", "source"),
    # Prepared too early: the target lets no sender in any more, so this drain cannot be.
    (machine.BEGUN, machine.PREPARED): ("resume", "source"),
    (machine.QUIESCED, machine.PREPARED): ("resume", "source"),
    (machine.COMMITTED, machine.IDLE): ("prepare", "target"),
    (machine.COMMITTED, machine.PREPARED): ("promote", "target"),
    (machine.COMMITTED, machine.PROMOTING): ("promote", "target"),
    (machine.COMMITTED, machine.PROMOTED): ("start", "target"),
    (machine.COMMITTED, machine.STARTED): ("finish", "source"),
    (machine.IDLE, machine.PROMOTING): ("promote", "target"),
    (machine.IDLE, machine.PROMOTED): ("start", "target"),
    (machine.IDLE, machine.STARTED): ("finish", "target"),
    (machine.RESUMING, machine.IDLE): ("resume", "source"),
    (machine.RESUMING, machine.PREPARED): ("resume", "source"),
    (machine.IDLE, machine.PREPARED): ("cancel", "target"),
}


def verdict(one: Mapping[str, Any], other: Mapping[str, Any]) -> Fields:
    """Who is who, and how to go on.

    Args:
        one, other: what ``discover`` printed on each host.

    Returns:
        {source, target, run_id, next_step, next_side, fresh, problem}: host names or None; ``fresh``
        when no handover is open; ``problem`` in words when nobody may go on.
    """
    hosts = [one, other]
    problem = _problem(one, other)
    if problem:
        return _answer(problem=problem)
    open_runs = {str(facts["run_id"]) for facts in hosts if facts.get("run_id")}
    if len(open_runs) > 1:
        late = _late_prepare(hosts)
        if late is not None:
            return late
        return _answer(problem=f"two handovers are open, {' and '.join(sorted(open_runs))}: one must be resumed first")
    if not open_runs:
        source = next((facts for facts in hosts if facts["role"] == "primary"), None)
        if source is None:
            return _answer(problem=_no_primary(hosts))
        target = other if source is one else one
        return _answer(source["host"], target["host"], fresh=True)
    return _interrupted(hosts, open_runs.pop())


def _interrupted(hosts: list[Mapping[str, Any]], run_id: str) -> Fields:
    sides = {str(facts["side"]): facts for facts in hosts if facts.get("run_id") == run_id}
    source, target = sides.get("source"), sides.get("target")
    rest = [facts for facts in hosts if facts is not source and facts is not target]
    if source is None and target is None:
        return _answer(problem=f"handover {run_id} is open on neither side")
    source = source or rest[0]
    target = target or next(facts for facts in hosts if facts is not source)
    pair = (
        str(source["phase"]) if source.get("run_id") else machine.IDLE,
        str(target["phase"]) if target.get("run_id") else machine.IDLE,
    )
    step = _NEXT.get(pair)
    if pair == (machine.IDLE, machine.PREPARED) and not machine.listed(target["candidate"] or {}, source["abandoned"]):
        certified = machine.same((source.get("demoted") or {}).get("candidate"), target["candidate"])
        step = ("promote", "target") if certified else None
    if step is None:
        return _answer(
            source["host"],
            target["host"],
            run_id,
            problem=f"handover {run_id} cannot be in phases {pair[0]} and {pair[1]}",
        )
    return _answer(source["host"], target["host"], run_id, step)


def _late_prepare(hosts: list[Mapping[str, Any]]) -> Fields | None:
    """A target that prepared for a run which the source had given up by then: that note goes first."""
    for target, source in (hosts, hosts[::-1]):
        candidate = target.get("candidate")
        if target["phase"] == machine.PREPARED and candidate and machine.listed(candidate, source["abandoned"]):
            return _answer(source["host"], target["host"], str(target["run_id"]), ("cancel", "target"))
    return None


def _problem(one: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    if one["host"] == other["host"]:
        return f"both facts are of host {one['host']}"
    if one["workload"] != other["workload"]:
        return f"facts of two workloads: {one['workload']} and {other['workload']}"
    if one["role"] == other["role"] == "primary":
        return f"two primaries: {one['host']} and {other['host']} (split brain); decide whose writes are thrown away"
    fork = machine.fork_of(one.get("history") or [], other.get("history") or [])
    return f"the histories have forked: {fork}" if fork else None


def _no_primary(hosts: list[Mapping[str, Any]]) -> str:
    roles = ", ".join(f"{facts['host']} is {facts['role']}" for facts in hosts)
    if all(facts["role"] == "none" for facts in hosts):
        return f"no host has a role yet ({roles}); run sync.yml with -e bmigrate_initial_primary=HOST"
    return f"no host is primary ({roles})"


def _answer(
    source: str | None = None,
    target: str | None = None,
    run_id: str | None = None,
    step: tuple[str, str] | None = None,
    *,
    fresh: bool = False,
    problem: str | None = None,
) -> Fields:
    return {
        "source": source,
        "target": target,
        "run_id": run_id,
        "next_step": step[0] if step else ("begin" if fresh else None),
        "next_side": step[1] if step else ("source" if fresh else None),
        "fresh": fresh,
        "problem": problem,
    }
