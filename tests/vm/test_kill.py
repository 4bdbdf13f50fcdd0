# SPDX-License-Identifier: GPL-3.0-or-later
"""Whoever of the data path dies or stops, at whatever moment, no write is lost.

Each round writes at random, sends SIGKILL to one process while claims are outstanding (a moment without any does not
count and is tried again), waits until a new session ships, goes on writing, drains, and compares on the lab host.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import pytest

from lab import LabError, wait
from tests.vm.processes import ON_STANDBY, find, is_receiver, main_process
from tests.vm.rig import BEING_STARTED, LIMIT_SECONDS, UNITS, WORKLOAD, Rig
from tests.vm.rounds import Round

pytestmark = pytest.mark.vm

TARGETS = ("breqd", "bmigrate", "ssh-client", "breceive", "hold", "ssh-server")
DROP_IN = "/run/systemd/system/breqd.service.d/vm-test.conf"
RING_LIMIT = "/sys/module/reqlog/parameters/ring_limit"
ATTEMPTS = 10


def kill_at_a_moment(around: Round, target: str) -> dict[str, Any]:
    """Kill the target while claims are outstanding; returns breqd's counters right before."""
    rig, primary, standby = around.rig, around.primary, around.standby
    host = standby if target in ON_STANDBY else primary
    for _ in range(ATTEMPTS):
        around.writer.wait_more(around.random.randrange(20, 250))
        victim = find(rig, host, target)
        if not victim:
            continue
        who = {"pid": victim["pid"], "ticks": victim["ticks"], "number": int(signal.SIGKILL)}
        if host == primary:
            try:
                seen = rig.agents[host].call(
                    "kill_when_outstanding", workload=WORKLOAD, volume=rig.volume, limit_seconds=20.0, **who
                )
            except LabError as error:
                if not any(word in str(error) for word in BEING_STARTED):
                    raise
                seen = None
            if seen is None:
                continue
            around.redirtied.see(seen)
            return dict(seen)
        before = kill_while_nothing_is_answered(around, host, who)
        if before is not None:
            return before
    raise AssertionError(f"{target}: in {ATTEMPTS} attempts no claim was outstanding when it was killed")


def kill_while_nothing_is_answered(around: Round, host: str, who: dict[str, int]) -> dict[str, Any] | None:
    """Kill on the standby, whose clock says nothing of the claims on the primary: stop its receivers first.

    A stopped receiver acknowledges nothing, and the writer goes on, so what is claimed then stays claimed until the
    victim is dead. The receivers that outlive it go on afterwards, with old bytes in their pipes.
    Returns breqd's counters right before; None when the victim, or the session, had ended by itself.
    """
    rig = around.rig
    epoch = around.epoch()
    stopped: list[dict[str, int]] = []
    try:
        for process in filter(is_receiver, rig.agents[host].call("processes")):
            receiver = {"pid": process["pid"], "ticks": process["ticks"]}
            rig.agents[host].call("signal", number=int(signal.SIGSTOP), **receiver)
            stopped.append(receiver)
        around.until_claims()
        before = around.look()
        rig.agents[host].call("signal", **who)
    except LabError as error:
        if "ProcessLookupError" not in str(error):
            raise
        return None
    finally:
        for receiver in stopped:
            try:
                rig.agents[host].call("signal", number=int(signal.SIGCONT), **receiver)
            except LabError as error:
                if "ProcessLookupError" not in str(error):
                    raise
    if stopped and before["claimed_bytes"] > 0 and before["allowed_epoch"] == epoch:
        return before
    around.until_new_session(epoch)
    return None


@pytest.mark.parametrize("moment", (1, 2, 3))
@pytest.mark.parametrize("target", TARGETS)
def test_kill_loses_nothing(rig: Rig, target: str, moment: int) -> None:
    """SIGKILL at a random moment with claims outstanding: no difference, and nothing but claims and marks helped."""
    with Round(rig, f"kill-{target}-{moment}") as around:
        around.until_claims()
        epoch = around.epoch()
        seen = kill_at_a_moment(around, target)
        assert seen["claimed_bytes"] > 0
        around.summary.update(target=target, claimed_bytes_at_kill=seen["claimed_bytes"])
        session = around.until_new_session(max(epoch, int(seen["allowed_epoch"] or 0)))
        if target == "breqd":
            assert around.look()["incarnation"] != seen["incarnation"]
        assert session["epoch"] > epoch
        around.writer.wait_more(100)
        around.until_redirtied()
        around.prove()


@pytest.fixture()
def no_watchdog(rig: Rig) -> Iterator[None]:
    """breqd without a watchdog, so that it may be stopped for long; both back as they were afterwards."""
    primary = rig.primary()
    rig.run(primary, "mkdir", "-p", DROP_IN.rsplit("/", 1)[0])
    rig.run(primary, "sh", "-c", f"printf '[Service]\\nWatchdogSec=0\\n' > {DROP_IN}")
    restart_breqd(rig, primary)
    yield
    rig.run(primary, "rm", DROP_IN)
    restart_breqd(rig, primary)


def restart_breqd(rig: Rig, host: str) -> None:
    """Restart it in good order, and wait for a session with the new one."""
    epoch = int(rig.shipping(host)["epoch"] or 0)
    rig.run(host, "systemctl", "daemon-reload")
    rig.run(host, "systemctl", "restart", UNITS["breqd"])

    def again() -> bool:
        now = rig.shipping(host)
        return int(now["epoch"] or 0) > epoch and now["state"] == "in_step"

    wait(again, LIMIT_SECONDS, f"a session with the breqd that was started on {host}", 0.3)


def overflow(rig: Rig, host: str) -> dict[str, int]:
    """The kernel's counters of the fault volume's attachment."""
    number = rig.run(host, "stat", "-L", "-c", "%Hr:%Lr", rig.device(host)).strip()
    (found,) = [item for item in rig.agents[host].call("reqlog") if f"{item['major']}:{item['minor']}" == number]
    return dict(found)


def test_stopped_until_the_overflow_is_full(rig: Rig, no_watchdog: None) -> None:
    """breqd sleeps until 1,000 regions of the overflow map are set: wider marks, and no difference."""
    everywhere = {"window_bytes": 1 << 40, "hot_percent": 25, "top_class": 3}
    with Round(rig, "overflow", operations_per_second=3000, bytes_per_second=16 << 20, **everywhere) as around:
        primary = around.primary
        around.until_redirtied()
        breqd = main_process(rig, primary, "breqd")
        who = {"pid": breqd["pid"], "ticks": breqd["ticks"]}
        before = overflow(rig, primary)
        # Small rings, so that they are full at once: whatever comes then goes to the map of regions.
        rig.run(primary, "sh", "-c", f"echo 64 > {RING_LIMIT}")
        rig.agents[primary].call("signal", number=int(signal.SIGSTOP), **who)
        try:
            wait(
                lambda: overflow(rig, primary)["regions_set"] - before["regions_set"] >= 1000,
                LIMIT_SECONDS,
                "1,000 regions of the overflow map to be set",
                0.2,
                lambda: f"before: {before}, now: {overflow(rig, primary)}",
            )
        finally:
            rig.agents[primary].call("signal", number=int(signal.SIGCONT), **who)
            rig.run(primary, "sh", "-c", f"echo 0 > {RING_LIMIT}")
        full = overflow(rig, primary)
        around.writer.wait_more(100)
        around.prove()
        after = overflow(rig, primary)
        print(f"overflow: {full['regions_set'] - before['regions_set']} regions set, {after}", flush=True)
        assert full["regions_set"] - before["regions_set"] >= 1000
        assert after["regions_harvested"] - before["regions_harvested"] >= 1000
        # The last region of the disk is a short one, and may be among them.
        assert around.widened.total >= 999 * 65536, "the regions did not come out as wide marks"


def test_watchdog_kill_loses_nothing(rig: Rig) -> None:
    """A breqd that hangs is killed by its watchdog, started again, and goes on with what it had."""
    with Round(rig, "watchdog") as around:
        primary = around.primary
        around.until_redirtied()
        around.until_claims()
        before = around.look()
        epoch = around.epoch()
        breqd = main_process(rig, primary, "breqd")
        who = {"pid": breqd["pid"], "ticks": breqd["ticks"]}
        killed = int(rig.run(primary, "systemctl", "show", "-P", "NRestarts", UNITS["breqd"]))
        rig.agents[primary].call("signal", number=int(signal.SIGSTOP), **who)

        def restarted() -> bool:
            return int(rig.run(primary, "systemctl", "show", "-P", "NRestarts", UNITS["breqd"])) > killed

        wait(restarted, LIMIT_SECONDS, "the watchdog to end breqd", 0.5)
        around.until_new_session(epoch)
        assert around.look()["incarnation"] != before["incarnation"]
        assert around.look()["attachment_id"] == before["attachment_id"], "the kernel's attachment did not survive"
        around.writer.wait_more(100)
        around.prove()
