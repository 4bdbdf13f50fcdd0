# SPDX-License-Identifier: GPL-3.0-or-later
"""The plan of a handover, against the real state machine: killed anywhere and run again, it ends well.

A controller is played here that follows the plan, dies after a random number of steps, and starts anew
with nothing but what the two hosts recorded. The rules of the states are those of bmigrate.handover.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bmigrate.common.state import WorkloadState
from bmigrate.handover import machine
from tests.unit.ansible_module import load

plans = load("bmigrate_plan")
HOSTS = ["alpha", "beta"]
FIRST = {"number": 1, "id": "1" * 32}


def fresh() -> dict[str, WorkloadState]:
    """Alpha is primary of generation 1, beta its standby."""
    made = {name: WorkloadState("w", name, generation=dict(FIRST), history=[dict(FIRST)]) for name in HOSTS}
    made["alpha"].role, made["alpha"].shipping, made["beta"].role = "primary", True, "standby"
    return made


def report(state: WorkloadState | None, **facts: Any) -> dict[str, Any]:
    """What bmigrate_facts registers for a host in this state."""
    told = {"state": state.to_dict() if state else None, "volumes": {}}
    entry = {"configured": True, "discover": told, "error": None, **facts}
    return {"ansible_facts": {"bmigrate": {"installed": True, "workloads": {"w": entry}}}}


def reports(states: dict[str, WorkloadState]) -> dict[str, Any]:
    return {name: report(state) for name, state in states.items()}


def plan(states: dict[str, WorkloadState], **words: Any) -> dict[str, Any]:
    answer: dict[str, Any] = plans.decide("w", HOSTS, reports(states), **words)
    return answer


class Controller:
    """One run of failover.yml: at most ``budget`` changes before it is killed."""

    def __init__(self, states: dict[str, WorkloadState], budget: int, halfway: bool = True) -> None:
        self.states, self.budget, self.halfway = states, budget, halfway
        self.plan = plan(states)
        self.known = dict(self.plan["known"])

    def run(self) -> bool:
        """Do what the plan says; False when killed on the way."""
        assert self.plan["blockers"] == []
        source, target = self.plan["source"], self.plan["target"]
        work: list[Any] = []
        if "resume" in self.plan["undo"]:
            work.append(lambda: self.resume(source, self.plan["undo"]["resume"]))
        if "cancel" in self.plan["undo"]:
            work.append(lambda: self.cancel(source, target, self.plan["undo"]["cancel"]))
        work += [partial(self.step, step, source, target) for step in self.plan["steps"]]
        for action in work:
            if self.budget == 0:
                return False
            self.budget -= 1
            action()
        return True

    def step(self, name: str, source: str, target: str) -> None:
        run, states = self.plan["run_id"], self.states
        ours, theirs = states[source], states[target]
        if name == "begin":
            states[source] = machine.begin(
                ours, run, target, "%032x" % (len(ours.history) + len(ours.abandoned) + 7), {}
            )
            self.known["candidate"] = (states[source].handover or {})["candidate"]
        elif name in ("converge", "quiesce"):
            states[source] = machine.done(ours, name, run, {})
        elif name == "drain":
            states[source] = machine.done(ours, name, run, {"digest": "d" * 64})
            self.known["digest"] = "d" * 64
        elif name == "prepare":
            states[target] = machine.prepare(theirs, run, source, self.known["candidate"], self.known["digest"], {})
        elif name == "commit":
            states[source] = machine.commit(ours, run, self.known["candidate"], self.known["digest"], 0.0, {})
            self.known["certificate"] = states[source].demoted
        elif name == "promote":
            after = machine.promote(theirs, run, self.known["certificate"])
            states[target] = after
            if self.budget == 0 and self.halfway:
                return  # killed half way: the role is durable, the rest is not
            states[target] = machine.promoted(after, run, {})
        elif name == "start":
            states[target] = machine.done(theirs, name, run, {})
        elif name == "finish_source":
            states[source] = machine.finish(ours, run, {})
        else:
            states[target] = machine.finish(theirs, run, {})

    def resume(self, source: str, run: str) -> None:
        """What the source's own command does, in its two halves."""
        if self.states[source].handover is not None and machine.phase_of(self.states[source]) != machine.RESUMING:
            self.states[source] = machine.abandon(self.states[source], run, "test")
        self.states[source] = machine.resumed(self.states[source], run, {})

    def cancel(self, source: str, target: str, run: str) -> None:
        self.states[target] = machine.cancel(self.states[target], run, self.states[source].abandoned, {})


def dead_man(states: dict[str, WorkloadState], halfway: bool) -> None:
    """The timer on the source fires: it puts the workload back unless the commit has happened."""
    for name, state in states.items():
        if state.handover and state.handover["side"] == "source" and state.demoted is None:
            states[name] = machine.abandon(state, state.handover["run_id"], "dead-man")
            if not halfway:
                states[name] = machine.resumed(states[name], state.handover["run_id"], {})


@settings(deadline=None)  # a busy machine is no failure
@given(
    st.lists(
        st.tuples(st.integers(0, 12), st.booleans(), st.sampled_from(["", "dead-man", "dead-man killed"])), max_size=6
    )
)
def test_however_often_it_is_killed_the_last_run_finishes(kills: list[Any]) -> None:
    states = fresh()
    for budget, halfway, timer in kills:
        Controller(states, budget, halfway).run()
        if timer:
            dead_man(states, halfway=timer == "dead-man killed")
        assert sum(state.role == "primary" for state in states.values()) <= 1
    assert Controller(states, 99).run()
    after = plan(states)
    assert after["blockers"] == [] and not after["continued"] and after["undo"] == {}
    assert sorted(state.role for state in states.values()) == ["primary", "standby"]
    assert machine.same(states["alpha"].generation, states["beta"].generation)
    assert all(state.handover is None for state in states.values())


def test_run_twice_it_moves_there_and_back() -> None:
    states = fresh()
    assert Controller(states, 99).run()
    assert (states["beta"].role, states["alpha"].role) == ("primary", "standby")
    assert plan(states)["source"] == "beta"
    assert Controller(states, 99).run()
    assert states["alpha"].role == "primary" and (states["alpha"].generation or {})["number"] == 3


def test_after_the_commit_nothing_before_it_is_repeated() -> None:
    states = fresh()
    assert not Controller(states, 6).run()
    again = plan(states)
    assert again["continued"] and again["steps"] == ["promote", "start", "finish_source", "finish_target"]
    assert again["known"]["certificate"] == states["alpha"].demoted


def test_a_source_that_is_alone_in_not_having_finished_only_finishes() -> None:
    states = fresh()
    controller = Controller(states, 8)
    controller.run()
    controller.step("finish_target", "alpha", "beta")
    again = plan(states)
    assert again["steps"] == ["finish_source"] and again["source"] == "alpha" and again["blockers"] == []


def test_an_unreachable_host_is_a_blocker_with_the_reason() -> None:
    told = reports(fresh())
    told["alpha"] = {"unreachable": True, "msg": "Connection timed out"}
    answer = plans.decide("w", HOSTS, told)
    assert len(answer["blockers"]) == 1 and answer["steps"] == []
    assert "alpha is unreachable" in answer["blockers"][0] and "Connection timed out" in answer["blockers"][0]


@pytest.mark.parametrize(
    "facts, words",
    [
        ({"installed": False}, "not installed on beta"),
        ({"workloads": {"w": {"configured": False}}}, "not configured on beta"),
        ({"workloads": {"w": {"configured": True, "error": "state.json is damaged"}}}, "state.json is damaged"),
    ],
)
def test_a_host_that_cannot_tell_its_role_is_a_blocker(facts: dict[str, Any], words: str) -> None:
    told = reports(fresh())
    told["beta"]["ansible_facts"]["bmigrate"].update(facts)
    answer = plans.decide("w", HOSTS, told)
    assert answer["steps"] == [] and words in answer["blockers"][0]


def test_two_primaries_none_and_forks_are_refused() -> None:
    states = fresh()
    states["beta"].role = "primary"
    assert "alpha is primary and beta is primary" in plan(states)["blockers"][0]
    states["alpha"].role = states["beta"].role = "standby"
    assert plan(states)["steps"] == [] and plan(states)["blockers"]
    states = fresh()
    for name, digit in (("alpha", "a"), ("beta", "b")):
        states[name].history.append({"number": 2, "id": digit * 32})
    assert "fork at generation 2" in plan(states)["blockers"][0]


def test_two_open_runs_are_refused() -> None:
    states = fresh()
    Controller(states, 5).run()
    assert states["beta"].handover is not None
    states["beta"].handover["run_id"] = "another"
    answer = plan(states)
    assert answer["steps"] == [] and "another" in answer["blockers"][0]


def test_sync_needs_to_be_told_the_first_primary_by_name() -> None:
    empty: dict[str, Any] = {name: report(None) for name in HOSTS}
    blocked = plans.decide("w", HOSTS, empty, "sync")
    assert "bmigrate_initial_primary" in blocked["blockers"][0] and not blocked["init"] and not blocked["adopt"]
    wrong = plans.decide("w", HOSTS, empty, "sync", "gamma")
    assert wrong["blockers"]
    told = plans.decide("w", HOSTS, empty, "sync", "beta")
    assert (told["init"], told["adopt"], told["blockers"]) == ("beta", "alpha", [])


def test_sync_never_takes_a_role_from_the_operator_when_the_hosts_have_one() -> None:
    told = plan(fresh(), purpose="sync", initial_primary="beta")
    assert (told["source"], told["init"], told["adopt"], told["blockers"]) == ("alpha", "", "", [])


def test_sync_adopts_a_standby_that_has_lost_its_state() -> None:
    told = reports(fresh())
    told["beta"] = report(None)
    answer = plans.decide("w", HOSTS, told, "sync")
    assert answer["adopt"] == "beta" and answer["generation"] == FIRST and answer["history"] == [FIRST]


def test_sync_leaves_an_open_handover_alone() -> None:
    states = fresh()
    Controller(states, 4).run()
    answer = plan(states, purpose="sync")
    assert "failover.yml" in answer["blockers"][0] and not answer["init"] and not answer["adopt"]
