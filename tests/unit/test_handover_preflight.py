# SPDX-License-Identifier: GPL-3.0-or-later
"""Verdicts and blockers: every obstacle is named before anything is changed."""

from __future__ import annotations

import shutil
from typing import Any

import pytest

from bmigrate.handover import judge, preflight
from tests.unit.handover_world import config_of

GENERATION = {"number": 1, "id": "g1"}


# -- facts and verdicts -----------------------------------------------------------------------------


def facts(host: str, role: str, phase: str = "idle", **fields: Any) -> dict[str, Any]:
    """What discover prints, reduced to what judge reads."""
    side = {"primary": "source", "standby": "target"}.get(role)
    open_run = {} if phase == "idle" else {"run_id": "r1", "side": side}
    base = {"host": host, "workload": "pg", "role": role, "phase": phase, "run_id": None, "side": None}
    lists = {"history": [GENERATION], "abandoned": [], "candidate": None, "demoted": None}
    return {**base, **lists, **open_run, **fields}


def test_two_primaries_none_and_forks_have_no_verdict() -> None:
    for one, other, word in (
        (facts("a", "primary"), facts("b", "primary"), "two primaries"),
        (facts("a", "standby"), facts("b", "standby"), "no host is primary"),
        (facts("a", "none"), facts("b", "none"), "sync.yml"),
        (facts("a", "primary"), facts("b", "standby", history=[{"number": 1, "id": "other"}]), "forked"),
        (facts("a", "primary"), facts("a", "standby"), "both facts"),
    ):
        verdict = judge.verdict(one, other)
        assert word in str(verdict["problem"]) and verdict["source"] is None


def test_the_verdict_names_the_step_that_comes_next() -> None:
    x = {"number": 2, "id": "x"}
    for source, target, step in (
        (facts("a", "primary"), facts("b", "standby"), ("begin", "source")),
        (facts("a", "primary", "begun"), facts("b", "standby"), ("converge", "source")),
        (facts("a", "primary", "drained"), facts("b", "standby", "prepared"), ("commit", "source")),
        (facts("a", "primary", "resuming"), facts("b", "standby", "prepared"), ("resume", "source")),
        (facts("a", "primary", abandoned=[x]), facts("b", "standby", "prepared", candidate=x), ("cancel", "target")),
        (
            facts("a", "standby", "committed", side="source"),
            facts("b", "primary", "promoted", side="target"),
            ("start", "target"),
        ),
    ):
        for pair in ((source, target), (target, source)):
            verdict = judge.verdict(*pair)
            assert (verdict["next_step"], verdict["next_side"]) == step
            assert (verdict["source"], verdict["target"]) == ("a", "b")


def preflight_facts(side: str, **fields: Any) -> dict[str, Any]:
    """A healthy host's facts."""
    host = "alpha" if side == "primary" else "beta"
    volume = {
        "path": "/dev/vda",
        "real_path": "/dev/vda",
        "present": True,
        "size_bytes": 1 << 30,
        "logical_block_size": 512,
        "mounted": [],
        "holders": [],
        "untrackable": None,
    }
    healthy: dict[str, Any] = {
        **facts(host, side),
        "version": "1",
        "generation": GENERATION,
        "state": {},
        "volumes": {"data": volume},
        "services": {"first.service": "active" if side == "primary" else "inactive"},
        "units": {"first.service": "disabled"},
        "module": {"loaded": True, "modules": {"reqlog": True}, "kernel": "6"},
        "dead_man_armed": False,
        "breqd": {"running": True, "volumes": [{"volume": "data", "attached": True, "suspect": None}]},
        "hold": {"running": True, "volumes": [{"volume": "data", "held": True, "suspect": None}]},
        "ship": {
            "running": True,
            "workloads": [{"workload": "pg", "state": "in_step", "predicted_drain_seconds": 0.5, "lag_seconds": 0.1}],
        },
    }
    return {**healthy, **fields}


def blockers(mine: dict[str, Any], peer: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The reasons that preflight gives."""
    monkeypatch.setattr(shutil, "which", lambda tool, path=None: f"/usr/bin/{tool}")
    plan = preflight.check(config_of("alpha"), mine, peer)
    for problem in plan["blockers"]:
        assert problem["message"] and problem["hint"], problem
    return {str(problem["reason"]) for problem in plan["blockers"]}


def test_nothing_stands_in_the_way_of_two_healthy_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert blockers(preflight_facts("primary"), preflight_facts("standby"), monkeypatch) == set()


@pytest.mark.parametrize(
    ("side", "change", "reason"),
    [
        ("primary", {"breqd": {"running": False}}, "daemon_down"),
        ("primary", {"module": {"loaded": False, "modules": {"reqlog": False}, "kernel": "6"}}, "module_not_loaded"),
        ("primary", {"breqd": {"running": True, "volumes": []}}, "not_tracked"),
        (
            "primary",
            {"breqd": {"running": True, "volumes": [{"volume": "data", "attached": True, "suspect": "crash"}]}},
            "suspect",
        ),
        ("primary", {"ship": {"running": True, "workloads": []}}, "not_shipping"),
        ("primary", {"ship": {"running": True, "workloads": [{"workload": "pg", "state": "seeding"}]}}, "not_in_step"),
        ("primary", {"dead_man_armed": True}, "dead_man_armed"),
        ("primary", {"units": {"first.service": "missing"}}, "service_missing"),
        ("standby", {"hold": {"running": True, "volumes": [{"volume": "data", "held": False}]}}, "not_held"),
        (
            "standby",
            {"hold": {"running": True, "volumes": [{"volume": "data", "held": True, "suspect": "reverted"}]}},
            "suspect",
        ),
        ("standby", {"services": {"first.service": "active"}}, "service_runs"),
        ("standby", {"generation": {"number": 1, "id": "other"}}, "wrong_generation"),
        ("standby", {"role": "primary"}, "roles"),
        ("standby", {"version": "2"}, "version"),
        ("standby", {"volumes": {"data": {"present": False, "problem": "gone"}}}, "device_missing"),
    ],
)
def test_each_obstacle_is_a_blocker_with_a_hint(
    monkeypatch: pytest.MonkeyPatch, side: str, change: dict[str, Any], reason: str
) -> None:
    mine = preflight_facts("primary", **(change if side == "primary" else {}))
    peer = preflight_facts("standby", **(change if side == "standby" else {}))
    assert reason in blockers(mine, peer, monkeypatch)


def test_a_device_that_does_not_fit_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for change, reason in (
        ({"size_bytes": 1 << 29}, "too_small"),
        ({"logical_block_size": 4096}, "logical_block_size"),
        ({"mounted": ["1: /mnt"]}, "mounted"),
        ({"untrackable": "zoned"}, "untrackable"),
    ):
        peer = preflight_facts("standby")
        peer["volumes"]["data"] = {**peer["volumes"]["data"], **change}
        assert reason in blockers(preflight_facts("primary"), peer, monkeypatch)


@pytest.mark.parametrize("size, blocks", [(4096, False), (16384, True)])
def test_blocks_that_are_larger_than_is_told_apart_block(
    monkeypatch: pytest.MonkeyPatch, size: int, blocks: bool
) -> None:
    """Also where both sides have them."""
    mine, peer = preflight_facts("primary"), preflight_facts("standby")
    for facts_ in (mine, peer):
        facts_["volumes"]["data"] = {**facts_["volumes"]["data"], "logical_block_size": size}
    assert ("logical_block_size" in blockers(mine, peer, monkeypatch)) is blocks


def test_the_predicted_downtime_is_drain_plus_what_the_last_handover_took() -> None:
    def record(*steps: str) -> dict[str, Any]:
        return {"last_handover": {"run_id": "r0", "results": {step: {"seconds": 1.0} for step in steps}}}

    source = preflight_facts("primary", state=record("prepare", "promote", "start"))
    target = preflight_facts("standby", state=record("quiesce", "drain", "commit"))
    found = preflight.predict(config_of("alpha"), source, target)
    assert found["downtime_seconds"] == 5.5 and found["measured"]
    given_up = preflight.predict(config_of("alpha"), preflight_facts("primary", state=record("quiesce")), target)
    assert given_up["downtime_seconds"] == 0.5 + preflight.UNMEASURED_SECONDS and not given_up["measured"]
    assert preflight.predict(config_of("alpha"), None)["downtime_seconds"] is None
