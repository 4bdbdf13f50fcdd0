# SPDX-License-Identifier: GPL-3.0-or-later
"""The source's steps of a handover, each in the order that saves data.

Promise: until ``commit`` has saved its state, every failure leaves a host that can put the workload
back, and the dead-man timer does so when nobody else does; once it has saved, this host never
starts the workload again. No step may act before the state that permits the act is durable.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from bmigrate.common import faults
from bmigrate.common.errors import (
    BmigrateError,
    PhaseError,
    RefusedError,
    RolledBackError,
    SuspectError,
    UnreachableError,
)
from bmigrate.common.state import new_id
from bmigrate.handover import machine
from bmigrate.handover.clock import Stopwatch
from bmigrate.handover.host import Host, tolerate
from bmigrate.handover.store import Store

Fields = dict[str, Any]

#: How long a device that was just unmounted may stay busy, seconds.
BUSY_SECONDS = 3.0


def begin(store: Store, host: Host, run_id: str) -> Fields:
    """Open the handover and make the candidate. Starts and stops nothing.

    Raises:
        RefusedError, PhaseError: see ``machine.check``.
    """
    watch = Stopwatch()
    after = machine.begin(store.state, run_id, host.config.peer.name, new_id(), watch.result())
    store.save(after)
    return dict(after.handover["results"]["begin"]) if after.handover else {}


def converge(store: Store, host: Host, run_id: str) -> Fields:
    """Wait until the predicted drain is short enough; nothing is stopped.

    Raises:
        RefusedError: reason ``not_converging``.
    """
    watch, limits = Stopwatch(), host.config.limits
    answer = host.ship(
        "converge",
        wait_seconds=limits.converge_timeout_seconds + 30,
        workload=host.workload,
        run_id=run_id,
        max_drain_seconds=limits.max_drain_seconds,
        timeout_seconds=limits.converge_timeout_seconds,
    )
    result = watch.result(
        predicted_drain_seconds=answer.get("predicted_drain_seconds"), bytes_left=answer.get("bytes_left")
    )
    store.save(machine.done(store.state, "converge", run_id, result))
    return result


def quiesce(store: Store, host: Host, run_id: str) -> Fields:
    """Stop the workload and take its devices. Puts everything back by itself when that fails.

    Raises:
        RolledBackError: something was in the way (named); the workload runs here again.
    """
    watch, limits = Stopwatch(), host.config.limits
    before = (store.state.handover or {}).get("doing") or {}
    note = {"since": before.get("since", watch.started_at)}
    store.save(machine.doing(store.state, "quiesce", note))
    # Armed before the first stop: from here on nobody else has to be alive for the service to come back.
    with watch.part("arm dead-man"):
        host.arm_dead_man(run_id, limits.dead_man_seconds)
    faults.point("handover.quiesce.armed")
    try:
        with watch.part("hooks"):
            host.run_hooks(host.config.before_quiesce)
        # An attempt that was killed may have stopped the service long ago: the first time counts.
        stopped_at = float(before.get("stopped_at", host.now()))
        store.save(machine.doing(store.state, "quiesce", dict(note, stopped_at=stopped_at)))
        # Permission goes before the stop: what is stopped then cannot be started again behind our back.
        host.clear_marker()
        faults.point("handover.quiesce.stopping")
        with watch.part("stop services"):
            for service in reversed(host.config.services):
                host.stop_service(service)
        faults.point("handover.quiesce.stopped")
        with watch.part("unmount"):
            host.stop_mounts()
            _refuse_mounted(host)
        with watch.part("flush"):
            host.flush_devices()
        # Exclusive before the drain: unmount writes, and so may a file system that lives on in another
        # namespace; a drain that reads before them would miss them.
        with watch.part("hold"):
            _take(host)
            _refuse_writers(host)
    except BmigrateError as error:
        _back_out(store, host, run_id, error)
    except OSError as exc:  # a flush that fails is the usual one: then nothing may leave this host
        _back_out(store, host, run_id, RefusedError(f"a device or file failed: {exc}", reason="os_error"))
    faults.point("handover.quiesce.held")
    result = watch.result(
        stopped_at=stopped_at,
        dead_man_at=note["since"] + limits.dead_man_seconds,
        max_downtime_seconds=limits.max_downtime_seconds,
    )
    store.save(machine.done(store.state, "quiesce", run_id, result))
    return result


def _take(host: Host) -> None:
    """Have hold take the devices; the kernel may let go of an unmounted one a moment later."""
    deadline = host.now() + BUSY_SECONDS
    while True:
        try:
            host.hold("hold", workload=host.workload)
            return
        except RefusedError as error:
            if error.reason != "device_busy" or host.now() >= deadline:
                raise
        host.pause(0.1)


def _refuse_mounted(host: Host) -> None:
    for volume, where in host.mounted().items():
        if where:
            raise RefusedError(
                f"still mounted after the stop of its mount unit, by process: {', '.join(where)}",
                volume=volume,
                hint="a mount in another namespace keeps the file system alive; end that process or unmount there",
                reason="device_busy",
            )


def _refuse_writers(host: Host) -> None:
    for volume, who in host.writers().items():
        if who:
            raise RefusedError(
                f"open for writing in {', '.join(who)}: an exclusive open does not stop these",
                volume=volume,
                hint="stop them, or add their service to the workload",
                reason="device_busy",
            )


def _back_out(store: Store, host: Host, run_id: str, error: BmigrateError) -> NoReturn:
    """Resume because of an error, and say both; the dead-man timer stays when even that fails."""
    resume(store, host, run_id, error.reason or error.code)
    raise RolledBackError(
        f"quiesce was given up and workload {host.workload} runs here again: {error.message}",
        volume=error.volume,
        host=error.host,
        hint=error.hint,
        reason=error.reason or error.code,
    ) from error


def drain(store: Store, host: Host, run_id: str) -> Fields:
    """Ship what is left over the session that is open; both devices are then the same.

    Raises:
        RefusedError: ``digest_mismatch`` and others of the shipper; nothing else has happened.
        PhaseError: ``too_late`` when the dead-man timer is due before a drain could end.
    """
    watch = Stopwatch()
    quiesced = store.state.handover["results"]["quiesce"] if store.state.handover else {}
    left = float(quiesced.get("dead_man_at", 0)) - host.now()
    if left <= 0:
        raise PhaseError(
            f"the time of workload {host.workload} is over; the dead-man timer puts it back within max_downtime",
            hint="begin a new handover; raise limits.max_downtime_seconds if the drain needs longer",
            reason="too_late",
        )
    faults.point("handover.drain.begin")
    answer = host.ship("drain", wait_seconds=left, workload=host.workload, run_id=run_id)
    faults.point("handover.drain.done")
    keys = ("bytes_left_at_start", "bytes_shipped", "barrier_seconds", "digest", "epoch")
    result = watch.result(drain_seconds=answer.get("seconds"), **{key: answer.get(key) for key in keys})
    if not isinstance(result["digest"], str) or not result["digest"]:
        raise RefusedError(f"the drain of workload {host.workload} answered without a digest", reason="no_digest")
    store.save(machine.done(store.state, "drain", run_id, result))
    return result


def commit(store: Store, host: Host, run_id: str, candidate: Mapping[str, Any]) -> Fields:
    """The commit point: one save, after which this host never runs the workload again.

    Raises:
        PhaseError: the candidate was abandoned, or is another one.
        RefusedError: reason ``written_after_drain``. SuspectError: a volume became suspect.
    """
    watch = Stopwatch()
    drained = store.state.handover["results"].get("drain", {}) if store.state.handover else {}
    after = machine.commit(store.state, run_id, candidate, str(drained.get("digest", "")), host.now(), {})
    with watch.part("check"):
        _refuse_dirty(host, run_id)
    if after.handover:
        after.handover["results"]["commit"].update(watch.result())
    faults.point("handover.commit.before")
    # This save is the commit: rename and fsync in it are one fact for everybody who reads after a power
    # cut. Answering before it is durable would let the target start and a rebooted source start as well.
    store.save(after)
    faults.point("handover.commit.after")
    problems: list[str] = []
    try:
        host.disarm_dead_man()
    except BmigrateError as error:
        tolerate(problems, error)  # when it fires it finds the commit and does nothing
    result = dict(after.handover["results"]["commit"]) if after.handover else {}
    return dict(result, problems=problems)


def _refuse_dirty(host: Host, run_id: str) -> None:
    """Nothing may have been written since the drain: that write would exist on neither host later."""
    host.breqd("barrier", workload=host.workload, drain=run_id)
    status = host.breqd("status", workload=host.workload)
    seen = set()
    for volume in status.get("volumes", []):
        seen.add(volume["volume"])
        if volume.get("suspect"):
            raise SuspectError(
                f"became suspect after the drain: {volume['suspect']}", volume=volume["volume"], reason="suspect"
            )
        left = int(volume.get("dirty_bytes", 0)) + int(volume.get("claimed_bytes", 0))
        if left:
            raise RefusedError(
                f"{left} bytes were written after the drain",
                volume=volume["volume"],
                hint="resume, find the writer with fuser, and begin a new handover",
                reason="written_after_drain",
            )
    missing = {volume.name for volume in host.config.volumes} - seen
    if missing:
        raise RefusedError(
            f"breqd does not track {', '.join(sorted(missing))}", hint="see: bmigrate status", reason="not_tracked"
        )


def resume(store: Store, host: Host, run_id: str, reason: str) -> Fields:
    """Put the workload back on this host: X is abandoned, devices are let go, everything starts.

    May be repeated until it succeeds; each part of it is harmless when already done.

    Raises:
        PhaseError: reason ``committed``: too late, only forward.
        RefusedError: something does not start again; the dead-man timer goes on trying.
    """
    watch = Stopwatch()
    stopped = _stopped_at(store)
    # Abandoned first, and durably: otherwise a commit that is still under way elsewhere could succeed
    # after the service runs here, and both hosts would run it.
    store.save(machine.abandon(store.state, run_id, reason))
    faults.point("handover.resume.abandoned")
    problems: list[str] = []
    with watch.part("release"):
        try:
            host.hold("release", workload=host.workload)
        except UnreachableError as error:
            tolerate(problems, error)  # a hold that is down holds nothing, or the mount below says so
    faults.point("handover.resume.released")
    host.set_marker()
    with watch.part("mount"):
        host.start_mounts()
    with watch.part("start services"):
        for service in host.config.services:
            host.start_service(service)
    try:
        host.ship("unseal", workload=host.workload)
    except BmigrateError as error:
        tolerate(problems, error)  # shipping can wait, the service cannot
    faults.point("handover.resume.started")
    now = host.now()
    result = watch.result(
        reason=reason, problems=problems, downtime_seconds=round(now - stopped, 3) if stopped is not None else 0.0
    )
    store.save(machine.resumed(store.state, run_id, result))
    try:
        host.disarm_dead_man()
    except BmigrateError as error:
        tolerate(problems, error)  # it will find the run over and do nothing
    return result


def _stopped_at(store: Store) -> float | None:
    """When the first service was told to stop, as far as is known."""
    record = store.state.handover or {}
    quiesced = record.get("results", {}).get("quiesce")
    if quiesced:
        return float(quiesced["stopped_at"])
    stopped_at = (record.get("doing") or {}).get("stopped_at")
    return float(stopped_at) if stopped_at is not None else None


def finish(store: Store, host: Host, run_id: str) -> Fields:
    """After the target has started: this host becomes the standby of the new generation.

    Raises:
        PhaseError: not committed.
    """
    watch = Stopwatch()
    problems: list[str] = []
    # Checked before anything is touched; the save comes last, so that a repeat does all of it again.
    machine.check(store.state, "finish", run_id)
    for volume in host.config.volumes:
        try:
            host.breqd("detach", workload=host.workload, volume=volume.name)
        except BmigrateError as error:
            if error.reason != "not_attached":
                tolerate(problems, error)
    store.save(machine.finish(store.state, run_id, watch.result(problems=problems)))
    for daemon in (host.ship, host.hold):
        try:
            daemon("reload")
        except BmigrateError as error:
            tolerate(problems, error)  # both look at the role by themselves now and then
    return watch.result(problems=problems)
