# SPDX-License-Identifier: GPL-3.0-or-later
"""The order of durable effects, and death at every one of them.

The first half reads the trace of a quiet handover; the second repeats it once for each effect in
it, dies there in several ways, goes on as failover.yml does, and looks at what came of it.
"""

from __future__ import annotations

from typing import Any

import pytest

from bmigrate.cli import handover as cli
from bmigrate.common.errors import BmigrateError, PhaseError, RefusedError, RolledBackError
from bmigrate.handover import machine
from bmigrate.handover.store import Store
from tests.unit.handover_world import Machine, World, changed_config

RUN = "r1"
DEATHS = ("process", "source power", "target power", "dead-man", "source power later", "target power later")


def move(world: World, limit: int = 12) -> None:
    """A whole handover, begun and finished."""
    for _ in range(limit):
        world.go_on(RUN)
        if world.verdict()["fresh"]:
            return
    raise AssertionError("not finished")


def position(trace: list[tuple[Any, ...]], *wanted: Any) -> int:
    """Index of the first effect that begins with these words."""
    for index, effect in enumerate(trace):
        if effect[: len(wanted)] == wanted:
            return index
    raise AssertionError(f"{wanted} did not happen: {trace}")


def in_order(trace: list[tuple[Any, ...]], *effects: tuple[Any, ...]) -> None:
    """Each effect happened, in this order."""
    places = [position(trace, *effect) for effect in effects]
    assert places == sorted(places), list(zip(places, effects))


@pytest.fixture
def world() -> World:
    """Both hosts, the workload running on alpha, something written since the last sync."""
    made = World()
    made.write()
    return made


def test_a_quiet_handover_moves_the_workload_and_its_last_write(world: World) -> None:
    move(world)
    assert world.beta.running == {"first.service", "second.service"}
    assert world.beta.content == world.last_written == 1
    assert world.alpha.disk.role == "standby" and world.beta.disk.role == "primary"
    assert world.alpha.disk.generation == world.beta.disk.generation
    assert world.alpha.disk.history == world.beta.disk.history
    assert world.beta.disk.shipping and not world.alpha.disk.shipping


def test_failback_is_the_same_and_the_generation_counts_on(world: World) -> None:
    move(world)
    world.write()
    world.finish_it("unused")
    for _ in range(12):
        world.go_on("r2")
        if world.verdict()["fresh"]:
            break
    assert world.alpha.running and world.alpha.content == world.last_written == 2
    assert [item["number"] for item in world.alpha.disk.history] == [1, 2, 3]
    assert world.alpha.disk.demoted is None


def test_the_dead_man_is_armed_before_anything_stops(world: World) -> None:
    move(world)
    in_order(world.trace, ("alpha", "arm"), ("alpha", "hooks"), ("alpha", "unmark"), ("alpha", "stop"))


def test_services_stop_in_reverse_then_unmount_then_flush_then_hold_then_drain(world: World) -> None:
    move(world)
    in_order(
        world.trace,
        ("alpha", "stop", "second.service"),
        ("alpha", "stop", "first.service"),
        ("alpha", "unmount"),
        ("alpha", "flush"),
        ("alpha", "hold.hold"),
        ("alpha", "saved", "quiesced"),
        ("alpha", "ship.drain"),
    )


def test_the_target_is_fenced_and_has_noted_before_the_source_commits(world: World) -> None:
    move(world)
    in_order(
        world.trace,
        ("alpha", "saved", "drained"),
        ("beta", "hold.fence"),
        ("beta", "saved", "prepared"),
        ("alpha", "breqd.barrier"),
        ("alpha", "saved", "committed"),
        ("alpha", "disarm"),
    )


def test_the_target_tracks_before_it_lets_go_and_may_run_only_after_both(world: World) -> None:
    move(world)
    in_order(
        world.trace,
        ("alpha", "saved", "committed"),
        ("beta", "saved", "promoting"),
        ("beta", "breqd.attach", "promote"),
        ("beta", "hold.refresh"),
        ("beta", "hold.release"),
        ("beta", "settle"),
        ("beta", "marker"),
        ("beta", "saved", "promoted"),
        ("beta", "mount"),
        ("beta", "start", "first.service"),
        ("beta", "start", "second.service"),
        ("beta", "health"),
        ("beta", "saved", "started"),
        ("beta", "saved", "idle"),
        ("beta", "ship.reload"),
    )
    noted = [
        effect for effect in world.trace if effect[0] == "beta" and effect[1] == "saved" and effect[2] == "promoting"
    ]
    assert len(noted) == 2, "the attachment is noted before the device is let go"
    second = [index for index, effect in enumerate(world.trace) if effect == ("beta", "saved", "promoting")][1]
    assert second < position(world.trace, "beta", "hold.release")


def test_resume_abandons_durably_before_it_touches_anything(world: World) -> None:
    for _ in range(4):
        world.go_on(RUN)
    assert machine.phase_of(world.alpha.disk) == "drained"
    world.trace.clear()
    world.step(world.alpha, "resume", RUN)
    effects = [effect for effect in world.trace if effect[1] not in ("replace", "renamed")]
    assert effects[0] == ("alpha", "saved", "resuming")
    assert world.alpha.disk.abandoned and world.alpha.running and world.alpha.dead_man is None
    in_order(
        effects,
        ("alpha", "hold.release"),
        ("alpha", "marker"),
        ("alpha", "mount"),
        ("alpha", "start"),
        ("alpha", "saved", "idle"),
        ("alpha", "disarm"),
    )


def test_a_repeated_step_answers_what_was_recorded_and_does_nothing(world: World) -> None:
    for _ in range(4):
        world.go_on(RUN)
    world.trace.clear()
    first = world.alpha.cache.handover or {}
    for step in ("begin", "quiesce", "drain"):
        assert world.step(world.alpha, step, RUN) == first["results"][step]
    assert world.trace == []


def test_another_controller_cannot_interleave(world: World) -> None:
    world.go_on(RUN)
    for step in ("begin", "quiesce", "resume", "commit"):
        with pytest.raises(RefusedError) as caught:
            world.step(world.alpha, step, "other", candidate={"number": 2, "id": "x"})
        assert caught.value.reason == "handover_open"
        assert RUN in caught.value.message


def test_a_step_that_expects_another_phase_is_refused(world: World) -> None:
    world.go_on(RUN)
    with pytest.raises(PhaseError):
        world.step(world.alpha, "quiesce", RUN, expect="drained")
    with pytest.raises(PhaseError):
        world.step(world.alpha, "commit", RUN, candidate={"number": 2, "id": "x"})


def test_an_abandoned_generation_is_never_committed(world: World) -> None:
    for _ in range(4):
        world.go_on(RUN)
    candidate = (world.alpha.cache.handover or {})["candidate"]
    world.step(world.alpha, "resume", RUN)
    with pytest.raises(PhaseError) as caught:
        machine.commit(world.alpha.cache, RUN, candidate, "digest", 0.0, {})
    assert caught.value.reason == "abandoned"


def test_promotion_needs_the_very_certificate(world: World) -> None:
    for _ in range(5):
        world.go_on(RUN)
    assert machine.phase_of(world.alpha.disk) == "committed"
    good = world.alpha.cache.demoted or {}
    for change in (
        {"digest": "another"},
        {"run_id": "another"},
        {"host": "beta"},
        {"workload": "other"},
        {"candidate": {"number": 2, "id": "x"}},
        {"candidate": None},
    ):
        with pytest.raises(PhaseError) as caught:
            world.step(world.beta, "promote", RUN, certificate=dict(good, **change))
        assert caught.value.reason == "bad_certificate"
    assert world.beta.disk.role == "standby"
    world.finish_it(RUN)
    assert world.beta.running


def test_cancel_needs_proof_that_the_source_gave_up(world: World) -> None:
    for _ in range(4):
        world.go_on(RUN)
    assert machine.phase_of(world.beta.disk) == "prepared"
    with pytest.raises(PhaseError) as caught:
        world.step(world.beta, "cancel", RUN, abandoned=world.alpha.cache.abandoned)
    assert caught.value.reason == "not_abandoned"
    world.step(world.alpha, "resume", RUN)
    world.step(world.beta, "cancel", RUN, abandoned=world.alpha.cache.abandoned)
    assert machine.phase_of(world.beta.disk) == "idle" and not world.beta.fenced


@pytest.mark.parametrize("failing", ["hooks", "stop", "unmount", "flush", "hold.hold"])
def test_a_quiesce_that_fails_puts_everything_back_by_itself(world: World, failing: str) -> None:
    world.go_on(RUN)
    world.alpha.failing = {failing}
    with pytest.raises(RolledBackError):
        world.step(world.alpha, "quiesce", RUN)
    assert world.alpha.running == {"first.service", "second.service"}
    assert world.alpha.dead_man is None and world.alpha.disk.abandoned
    world.write()
    assert world.alpha.content == world.last_written == 2


def test_a_device_that_is_let_go_a_moment_later_is_waited_for_and_one_that_is_not_refused(world: World) -> None:
    world.go_on(RUN)
    world.alpha.busy_for = 1.0
    assert world.step(world.alpha, "quiesce", RUN) is not None
    world.step(world.alpha, "resume", RUN)
    world.step(world.alpha, "begin", "r2")
    world.alpha.busy_for = 60.0
    with pytest.raises(RolledBackError) as caught:
        world.step(world.alpha, "quiesce", "r2")
    assert caught.value.reason == "device_busy" and world.alpha.running


def test_a_flush_that_fails_puts_the_workload_back(world: World) -> None:
    world.go_on(RUN)
    world.alpha.breaking = {"flush"}
    with pytest.raises(RolledBackError) as caught:
        world.step(world.alpha, "quiesce", RUN)
    assert "Input/output error" in caught.value.message
    assert world.alpha.running and not world.alpha.held


def test_a_raw_writer_keeps_the_source_from_quiescing(world: World) -> None:
    world.go_on(RUN)
    world.alpha.writing_stranger = True
    with pytest.raises(RolledBackError) as caught:
        world.step(world.alpha, "quiesce", RUN)
    assert "process 7 (dd)" in caught.value.message
    assert world.alpha.running


def test_a_write_after_the_drain_stops_the_commit(world: World) -> None:
    for _ in range(4):
        world.go_on(RUN)
    world.alpha.content += 1
    with pytest.raises(RefusedError) as caught:
        world.go_on(RUN)
    assert caught.value.reason == "written_after_drain"
    assert world.alpha.disk.demoted is None


def test_an_unhealthy_target_says_so_and_leaves_the_copy_alone(world: World) -> None:
    for _ in range(6):
        world.go_on(RUN)
    assert machine.phase_of(world.beta.disk) == "promoted"
    world.beta.failing = {"health"}
    with pytest.raises(RefusedError) as caught:
        world.go_on(RUN)
    assert caught.value.reason == "unhealthy"
    assert not world.beta.disk.shipping and world.alpha.disk.role == "standby"
    assert world.alpha.content == world.last_written
    world.beta.failing = set()
    world.finish_it(RUN)
    assert world.beta.disk.shipping


def test_a_workload_of_volumes_only_needs_no_service(world: World) -> None:
    for host in world.hosts.values():
        changed_config(host, mounts=(), services=())
        host.start_mounts = lambda: None  # type: ignore[method-assign]
    world.alpha.running, world.alpha.is_mounted = set(), False
    move(world)
    assert world.beta.marker and not world.alpha.marker
    assert world.beta.content == world.last_written


def test_after_a_crash_of_the_target_promotion_is_an_explicit_choice(world: World) -> None:
    for _ in range(5):
        world.go_on(RUN)
    world.beta.power_cut()
    world.boot(world.beta)
    world.beta.suspect = "this host stopped without closing the volume"
    world.trace.clear()
    with pytest.raises(BmigrateError) as caught:
        world.step(world.beta, "promote", RUN, certificate=world.alpha.cache.demoted, accept_unheld=False)
    assert "--accept-unheld" in str(caught.value.hint)
    assert world.beta.disk.role == "standby"
    world.finish_it(RUN)
    assert ("beta", "breqd.attach", "resume") in world.trace, "its maps must not be taken for complete"
    assert world.beta.running


def test_what_a_killed_process_left_is_durable_before_it_is_answered(world: World) -> None:
    """Killed between rename and fsync, the commit is visible and not yet safe; a repeat makes it safe first."""
    for _ in range(4):
        world.go_on(RUN)
    world.trace.clear()
    candidate = (world.alpha.cache.handover or {})["candidate"]
    for budget in range(12):
        world.die_in = budget
        assert world.step(world.alpha, "commit", RUN, candidate=candidate) is None
        if world.trace[-1][1:] == ("renamed", "committed"):
            break
    world.die_in = None
    assert world.alpha.cache.demoted and not world.alpha.disk.demoted
    answer = world.step(world.alpha, "commit", RUN, candidate=candidate)
    assert answer and answer["certificate"]["candidate"] == candidate
    world.alpha.power_cut()
    world.boot(world.alpha)
    assert not world.alpha.active, "the commit was answered and then lost"


def handover_length() -> int:
    """How many effects a quiet handover has."""
    world = World()
    world.write()
    move(world)
    return len(world.trace)


@pytest.mark.parametrize("death", DEATHS)
def test_death_at_every_effect_ends_with_one_host_that_has_everything(death: str) -> None:
    """Killed at each effect in turn; the same invariants are checked after every effect on the way out."""
    outcomes: set[str] = set()
    for budget in range(handover_length()):
        world = World()
        world.write()
        world.die_in = budget
        while world.alive:
            world.go_on(RUN)
        committed = world.alpha.disk.demoted is not None
        after_death(world, death)
        world.write()
        if death.endswith("later") and not world.verdict()["fresh"]:
            world.go_on(RUN)
            after_death(world, death.removesuffix(" later"))
        world.finish_it(RUN)
        world.check()
        winner = winner_of(world)
        if committed:
            assert winner is world.beta, f"effect {budget}: committed, and {winner.name} runs it"
        outcomes.add(winner.name)
        before = world.last_written
        world.write()
        assert winner.content == world.last_written == before + 1
    assert outcomes == {"alpha", "beta"}


def after_death(world: World, death: str) -> None:
    """What else happens at the moment of the death."""
    victims = {"source power": [world.alpha], "target power": [world.beta]}.get(death, [])
    for host in victims:
        host.power_cut()
        world.boot(host)
    if death == "dead-man":
        world.fire_dead_man(world.alpha)
        if world.alpha.disk.demoted is None:
            assert world.alpha.running, "before the commit the timer puts the service back"


def winner_of(world: World) -> Machine:
    """The one host that runs the workload."""
    running = [host for host in world.hosts.values() if host.running == {"first.service", "second.service"}]
    assert len(running) == 1
    return running[0]


def test_nobody_but_the_timer_is_needed_to_get_the_service_back() -> None:
    """The controller is gone for good, at every effect before the commit."""
    for budget in range(handover_length()):
        world = World()
        world.write()
        world.die_in = budget
        while world.alive:
            world.go_on(RUN)
        if world.alpha.cache.demoted is not None:
            break
        if not world.alpha.running or not world.alpha.marker:
            assert world.alpha.dead_man == RUN, f"effect {budget} ({world.trace[-1]}): down, and no timer is armed"
        world.fire_dead_man(world.alpha)
        assert world.alpha.running == {"first.service", "second.service"}, world.trace[-1]


def test_the_answer_of_finish_says_what_discover_would(world: World) -> None:
    """So that the report of a handover needs no further question; every other step leaves it out."""
    move(world)
    for host in (world.alpha, world.beta):
        store = Store(host.disk)
        assert cli._answer(store, "finish", {})["state"] == host.disk.to_dict()
        assert "state" not in cli._answer(store, "start", {})
