# SPDX-License-Identifier: GPL-3.0-or-later
"""What a campaign does to the hosts: each fault is a function on a Stage that returns whether it happened.

A fault happens under load, at a moment that comes from the seed. When it returns, whatever it took away is back
(power, link, room on the disk), so that the judge may wait for everything to be in step by itself.
"""

from __future__ import annotations

import itertools
import random
import signal
import time
from collections.abc import Iterator
from typing import Callable, NamedTuple

from bmigrate.ship.passes import LANE_BYTES
from lab import LabError, wait
from tests.campaign import judge
from tests.campaign.stage import Stage
from tests.vm.processes import ON_STANDBY, find, is_receiver
from tests.vm.rig import LIMIT_SECONDS, UNITS, WORKLOAD, Refused

NOT_REACHED_SECONDS = 45.0
#: Three connections of an emulated guest on a busy machine take half a minute.
SESSION_SECONDS = 120.0
#: How often the receivers that are to die find enough for two streams, and how long that is waited for.
BACKLOGS = 0.4
BACKLOG_BYTES, BACKLOG_SECONDS = 2 * LANE_BYTES, 90.0
#: How often a power cut of the standby meets flushes that are late.
SLOW_FLUSHES = 0.6
FILLER = "/var/lib/bmigrate/.campaign-filler"
SSHD = "/etc/ssh/sshd_config.d/00-campaign.conf"

#: Points of a comparison by checksum: the volume is made suspect first.
RESYNC_POINTS = ("ship.resync_compared", "ship.resync_done")
RESYNC_SECONDS = 240.0

#: Fault points by program, and up to which visit of it the kill may come: as many as an emulated guest reaches in time.
POINTS: dict[str, dict[str, int]] = {
    "breqd": {
        "breqd.batch": 40, "breqd.marked": 40, "breqd.consumed": 40, "breqd.claimed": 8, "breqd.acknowledged": 8,
        "breqd.fenced": 1, "breqd.track_replace": 2, "breqd.track_replaced": 2,
    },
    "ship": {
        "ship.claimed": 8, "ship.read": 60, "ship.payload": 8, "ship.send": 8, "ship.sent": 8, "ship.synced": 8,
        "ship.acked": 8,
    },
    "hold": {"hold.save": 2, "hold.saved": 2, "hold.admitted": 1, "hold.granted": 1, "hold.joined": 2},
    "breceive": {
        "receive.frame": 60, "receive.write": 60, "receive.fdatasync": 8, "receive.synced": 4, "receive.noted": 4,
        "receive.ack_written": 4, "receive.mark": 1,
    },
}  # fmt: skip


class Fault(NamedTuple):
    """A kind of fault, how often it is in a deck, and what it does."""

    name: str
    weight: int
    act: Callable[[Stage], bool]


def _send(stage: Stage, target: str, number: signal.Signals) -> dict[str, int] | None:
    """Signal a process of the data path; None when there was none just then."""
    host = stage.standby if target in ON_STANDBY else stage.primary
    who: dict[str, int] = {}

    def sent() -> bool:
        # There may be none for a moment, between two sessions.
        try:
            victim = find(stage.rig, host, target, stage.random)
            if not victim:
                return False
            who.update(pid=victim["pid"], ticks=victim["ticks"])
            stage.rig.agents[host].call("signal", number=int(number), **who)
        except LabError as error:
            if "ProcessLookupError" not in str(error):
                raise
            return False
        return True

    return who if _reached(sent) else None


def _reached(condition: Callable[[], bool], seconds: float = NOT_REACHED_SECONDS) -> bool:
    """Whether it became true in time; False is no failure: the fault did not happen, and does not count."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.1)
    return False


def kill(target: str) -> Callable[[Stage], bool]:
    """SIGKILL to one process."""

    def act(stage: Stage) -> bool:
        stage.until_claims()
        return _send(stage, target, signal.SIGKILL) is not None

    return act


def stop(target: str) -> Callable[[Stage], bool]:
    """SIGSTOP to one process for a while; some watchdogs end it meanwhile."""

    def act(stage: Stage) -> bool:
        stage.until_claims()
        who = _send(stage, target, signal.SIGSTOP)
        if who is None:
            return False
        stage.outage(stage.random.uniform(0.5, 20.0))
        host = stage.standby if target in ON_STANDBY else stage.primary
        try:
            stage.rig.agents[host].call("signal", number=int(signal.SIGCONT), **who)
        except LabError as error:
            if "ProcessLookupError" not in str(error):
                raise
            stage.details["ended"] = True
        return True

    return act


def at_point(program: str, name: str) -> Callable[[Stage], bool]:
    """SIGKILL of a program to itself at a fault point, at a visit that comes from the seed."""

    def act(stage: Stage) -> bool:
        plan = f"{name}=kill@{stage.random.randint(1, POINTS[program][name])}"
        stage.details["plan"] = plan
        if program != "breceive":
            return _unit_dies(stage, program, plan)
        # A further stream writes, and so is asked for a mark, only where much is left.
        return _receiver_dies(stage, plan, name == "receive.mark" or stage.random.random() < BACKLOGS)

    return act


def at_point_of_resync(name: str) -> Callable[[Stage], bool]:
    """SIGKILL of the shipper to itself when all of a suspect volume was compared."""

    def act(stage: Stage) -> bool:
        stage.details["plan"] = plan = f"{name}=kill@1"
        reason = "the campaign wants it compared"
        stage.rig.breqd(stage.primary, "suspect", workload=WORKLOAD, volume=stage.rig.volume, reason=reason)
        return _unit_dies(stage, "ship", plan, RESYNC_SECONDS)

    return act


def at_attach(stage: Stage) -> bool:
    """SIGKILL of breqd to itself when it has attached a volume in the kernel and nobody knows: after a power cut.

    Only after a boot has the kernel no attachment. The plan stays until it is seen to have killed: it may kill again.
    """
    host, rig = stage.primary, stage.rig
    unit = UNITS["breqd"]
    drop_in = f"/etc/systemd/system/{unit}.d/campaign.conf"
    stage.details["plan"] = plan = "breqd.attached=kill@1"
    rig.run(host, "mkdir", "-p", drop_in.rsplit("/", 1)[0])
    rig.run(
        host, "sh", "-c", f"printf '[Service]\\nEnvironment=BMIGRATE_FAULTS={plan}\\n' > {drop_in}; sync -f {drop_in}"
    )
    rig.power_cut(host)
    stage.lost()
    try:
        rig.lab.start(host)
        reached = _reached(lambda: stage.properties(host, "breqd")["NRestarts"] not in ("", "0"))
    finally:
        rig.run(host, "sh", "-c", f"rm {drop_in}; sync -f /etc; systemctl daemon-reload")
    rig.wait_breqd(host)
    return reached


def _unit_dies(stage: Stage, program: str, plan: str, seconds: float = NOT_REACHED_SECONDS) -> bool:
    host = stage.standby if program == "hold" else stage.primary
    unit, rig = UNITS[program], stage.rig
    drop_in = f"/run/systemd/system/{unit}.d/campaign.conf"
    # Also how often it was restarted: what an earlier fault did is no sign of this one.
    rig.run(host, "systemctl", "reset-failed", unit)
    before = stage.properties(host, program)["MainPID"]
    rig.run(host, "mkdir", "-p", drop_in.rsplit("/", 1)[0])
    rig.run(host, "sh", "-c", f"printf '[Service]\\nEnvironment=BMIGRATE_FAULTS={plan}\\n' > {drop_in}")
    rig.run(host, "systemctl", "daemon-reload")
    rig.run(host, "systemctl", "restart", "--no-block", unit)

    def started() -> bool:
        now = stage.properties(host, program)
        return now["MainPID"] not in ("0", before) or now["NRestarts"] != "0"

    wait(started, LIMIT_SECONDS, f"{unit} to be started with a plan", 0.05)
    # Whatever is started from now on has no plan: it dies once.
    rig.run(host, "rm", drop_in)
    rig.run(host, "systemctl", "daemon-reload")
    if program == "hold":
        rig.ship(stage.primary, "reconnect", workload=WORKLOAD)
    return _reached(lambda: stage.properties(host, program)["NRestarts"] != "0", seconds)


def _receiver_dies(stage: Stage, plan: str, backlog: bool) -> bool:
    epoch = stage.epoch_on_disk()
    # It may die before it was seen; the epoch tells.
    stage.details["seen"] = _receivers_get(stage, plan, lambda: stage.epoch_on_disk() >= epoch + 2, backlog)
    return _reached(lambda: stage.epoch_on_disk() >= epoch + 2)


def _receivers_get(stage: Stage, plan: str, enough: Callable[[], bool] = lambda: False, backlog: bool = False) -> bool:
    """Begin a session all receivers of which have a plan; whether that was seen, or ``enough``, in time.

    sshd gives a receiver its environment; its configuration says nothing any more once they have started.

    Args:
        backlog: let so much become dirty before that further streams of the session take part.
    """
    rig, host = stage.rig, stage.standby
    # One that is just being opened would go on without the plan: its receivers have started.
    _reached(lambda: bool(stage.status_of_session()["epoch"]), SESSION_SECONDS)
    if backlog:
        rig.ship(stage.primary, "pause", workload=WORKLOAD)
    try:
        if backlog:
            _reached(lambda: rig.tracked(stage.primary)["dirty_bytes"] >= BACKLOG_BYTES, BACKLOG_SECONDS)
            stage.details["backlog"] = rig.tracked(stage.primary)["dirty_bytes"]
        rig.run(host, "sh", "-c", f"echo 'SetEnv BMIGRATE_FAULTS={plan}' > {SSHD} && systemctl reload ssh")
    finally:
        if backlog:
            rig.ship(stage.primary, "resume", workload=WORKLOAD)
    try:
        if not backlog:
            rig.ship(stage.primary, "reconnect", workload=WORKLOAD)

        def with_plan() -> bool:
            count = 0
            for process in filter(is_receiver, rig.agents[host].call("processes")):
                done = rig.agents[host].call("run", argv=["cat", f"/proc/{process['pid']}/environ"])
                count += plan in done["stdout"]
            return count >= rig.streams

        return _reached(lambda: with_plan() or enough(), SESSION_SECONDS)
    finally:
        # Durable, so that a power cut right afterwards does not bring it back.
        rig.run(host, "sh", "-c", f"rm {SSHD} && sync -f /etc && systemctl reload ssh")


def cut_link(stage: Stage) -> bool:
    """The network goes away for a while, and the devices are judged before it is back."""
    stage.until_claims()
    stage.rig.lab.link(False, stage.random.choice((None, stage.primary, stage.standby)))
    try:
        stage.outage(stage.random.uniform(0.5, 25.0))
        stage.quiet()
        judge.nothing_is_missing(stage)
    finally:
        stage.rig.lab.link(True)
    return True


def cut_link_and_kill(target: str) -> Callable[[Stage], bool]:
    """The network goes away, and a process dies before it is back."""

    def act(stage: Stage) -> bool:
        stage.until_claims()
        stage.rig.lab.link(False)
        try:
            stage.outage(stage.random.uniform(0.1, 3.0))
            hit = _send(stage, target, signal.SIGKILL) is not None
            stage.outage(stage.random.uniform(0.1, 10.0))
        finally:
            stage.rig.lab.link(True)
        return hit

    return act


def cut_power_of_standby(stage: Stage) -> bool:
    """It loses what it had not flushed; what is missing must be dirty or claimed, before it is back.

    More often than not each flush begins late, so that what was written is only written for long, and the power goes
    while a flush is pending: an acknowledgement that came before it would show.
    """
    if stage.random.random() < SLOW_FLUSHES:
        plan = f"receive.fdatasync=delay:{stage.random.uniform(0.3, 1.0):.1f}"
        stage.details["slow"] = plan if _receivers_get(stage, plan) else None
        _reached(lambda: bool(stage.status_of_session()["epoch"]), SESSION_SECONDS)
        stage.writer.wait_more(stage.random.randrange(50, 300))
        time.sleep(stage.random.uniform(0.0, 1.0))
        _reached(lambda: stage.unflushed(stage.standby) > 0)
        stage.details["unflushed"] = stage.unflushed(stage.standby)
    else:
        stage.until_claims()
    stage.rig.power_cut(stage.standby)
    stage.outage(stage.random.uniform(0.1, 3.0))
    if stage.random.random() < 0.3:
        stage.details["and"] = "breqd"
        _send(stage, "breqd", signal.SIGKILL)
    stage.quiet()
    judge.nothing_is_missing(stage)
    stage.rig.power_on(stage.standby)
    return True


def cut_power_of_primary(stage: Stage) -> bool:
    """It comes back suspect; nobody is asked to compare anything."""
    stage.until_claims()
    stage.rig.power_cut(stage.primary)
    stage.lost()
    stage.rig.power_on(stage.primary)
    stage.details["suspect"] = stage.rig.tracked(stage.primary)["suspect"]
    return True


def cut_power_of_both(stage: Stage) -> bool:
    """The whole site."""
    stage.until_claims()
    hosts = [stage.primary, stage.standby]
    stage.random.shuffle(hosts)
    for host in hosts:
        stage.rig.power_cut(host)
    stage.lost()
    stage.random.shuffle(hosts)
    for host in hosts:
        stage.rig.power_on(host)
    return True


def fill_disk(side: str) -> Callable[[Stage], bool]:
    """No room under the state, and a process dies meanwhile."""

    def act(stage: Stage) -> bool:
        host = stage.primary if side == "primary" else stage.standby
        # What fallocate leaves goes to small files, down to the last block.
        script = (
            f"fallocate -l $(df --output=avail -B1 /var/lib/bmigrate | tail -1) {FILLER} 2>/dev/null; "
            f"dd if=/dev/zero of={FILLER}.rest bs=64k 2>/dev/null; dd if=/dev/zero of={FILLER}.end bs=512 2>/dev/null; "
            "df --output=avail -B1 /var/lib/bmigrate | tail -1"
        )
        stage.details["left_bytes"] = int(stage.rig.run(host, "sh", "-c", script, timeout_seconds=300).strip())
        try:
            targets = ("breqd", "bmigrate") if side == "primary" else ("hold", "breceive")
            hit = _send(stage, stage.random.choice(targets), signal.SIGKILL) is not None
            stage.outage(stage.random.uniform(1.0, 10.0))
        finally:
            stage.rig.run(host, "sh", "-c", f"rm -f {FILLER} {FILLER}.rest {FILLER}.end")
        return hit

    return act


def disk_errors(side: str, command: str) -> Callable[[Stage], bool]:
    """The fault disk of one side answers some commands with EIO."""

    def act(stage: Stage) -> bool:
        host = stage.primary if side == "primary" else stage.standby
        count = stage.random.randint(1, 4)
        stage.disk_fails(host, command, count)
        try:
            # Each ends a session: on a slow machine not all of them come in time, and one is a fault already.
            _reached(lambda: stage.disk_failures_left(host) == 0)
            stage.details["failures"] = count - stage.disk_failures_left(host)
            return bool(stage.details["failures"])
        finally:
            stage.disk_fails(host, command, 0)

    return act


def reconnect(stage: Stage) -> bool:
    """The operator asks for new sessions, one after the other."""
    for _ in range(stage.random.randint(1, 4)):
        stage.until_claims()
        try:
            stage.rig.ship(stage.primary, "reconnect", workload=WORKLOAD)
        except Refused:
            return False
    return True


FAULTS: tuple[Fault, ...] = (
    *(Fault(f"kill {target}", 2, kill(target)) for target in ("breqd", "bmigrate", "breceive", "hold")),
    *(Fault(f"kill {target}", 1, kill(target)) for target in ("ssh-client", "ssh-server")),
    *(Fault(f"stop {target}", 1, stop(target)) for target in ("breqd", "bmigrate", "breceive", "hold", "ssh-client")),
    *(Fault(f"kill at {name}", 1, at_point(program, name)) for program, names in POINTS.items() for name in names),
    *(Fault(f"kill at {name}", 1, at_point_of_resync(name)) for name in RESYNC_POINTS),
    Fault("kill at breqd.attached", 1, at_attach),
    Fault("link", 4, cut_link),
    *(Fault(f"link and kill {target}", 1, cut_link_and_kill(target)) for target in ("breqd", "bmigrate", "hold")),
    Fault("power of the standby", 5, cut_power_of_standby),
    Fault("power of the primary", 4, cut_power_of_primary),
    Fault("power of both", 2, cut_power_of_both),
    Fault("full disk, primary", 2, fill_disk("primary")),
    Fault("full disk, standby", 2, fill_disk("standby")),
    Fault("read errors, primary", 2, disk_errors("primary", "read")),
    Fault("write errors, standby", 2, disk_errors("standby", "write")),
    Fault("flush errors, standby", 2, disk_errors("standby", "flush")),
    Fault("new sessions", 1, reconnect),
)


def schedule(seed: int) -> Iterator[Fault]:
    """The faults of a seed, without end: decks of all kinds, each shuffled."""
    for number in itertools.count():
        deck = [fault for fault in FAULTS for _ in range(fault.weight)]
        random.Random(f"{seed}/deck/{number}").shuffle(deck)
        yield from deck
