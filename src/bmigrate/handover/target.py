# SPDX-License-Identifier: GPL-3.0-or-later
"""The target's steps of a handover, each in the order that saves data.

Promise: this host starts the workload only after it has seen the source's durable ``demoted X`` for
the very candidate and digest that it noted, and tracks every write from before the first mount, so
that the way back needs no full copy. It never overwrites the source's copy: shipping back begins
with ``finish``, after the health verdict.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bmigrate.common import faults
from bmigrate.common.errors import BmigrateError, RefusedError, SuspectError
from bmigrate.handover import machine
from bmigrate.handover.clock import Stopwatch
from bmigrate.handover.host import Host, tolerate
from bmigrate.handover.store import Store

Fields = dict[str, Any]


def prepare(store: Store, host: Host, run_id: str, candidate: Mapping[str, Any], digest: str) -> Fields:
    """Note the candidate, durably, on a replica that nobody can write any more.

    Raises:
        RefusedError: a device is not held. SuspectError: a volume of the replica is suspect.
        PhaseError: the candidate does not follow the replica's generation.
    """
    watch = Stopwatch()
    machine.prepare(store.state, run_id, host.config.peer.name, candidate, digest, {})
    # One connection from the fence to the note: hold opens the door again should we die in between.
    with host.holding() as ask:
        # Receivers end before the note: one that is still writing would change the replica after its digest.
        with watch.part("fence"):
            answer = ask("fence", workload=host.workload)
        faults.point("handover.prepare.fenced")
        _refuse_unfit(host)
        result = watch.result(epoch=answer.get("epoch"), boot_id=host.boot_id(), digest=digest)
        store.save(machine.prepare(store.state, run_id, host.config.peer.name, candidate, digest, result))
        faults.point("handover.prepare.noted")
    return result


def _unseal(host: Host) -> None:
    """Hold refuses sessions from a fence on: tell it that no handover needs that any more."""
    host.hold("reload")


def _held(host: Host) -> dict[str, Fields]:
    answer = host.hold("status", workload=host.workload)
    return {item["volume"]: item for item in answer.get("volumes", [])}


def _refuse_unfit(host: Host) -> None:
    """A replica that is not held, or suspect, must not be promoted."""
    found = _held(host)
    for volume in host.config.volumes:
        status = found.get(volume.name, {})
        if not status.get("held"):
            raise RefusedError(
                f"its device {host.config.device(volume.name)} is not held on this host",
                volume=volume.name,
                hint="see: systemctl status bmigrate-hold",
                reason="not_held",
            )
        if status.get("suspect"):
            raise SuspectError(
                f"the replica is suspect: {status['suspect']}",
                volume=volume.name,
                hint="let the source resume and run sync.yml: it compares by checksum and ships what differs",
                reason="suspect",
            )


def promote(
    store: Store, host: Host, run_id: str, certificate: Mapping[str, Any], accept_unheld: bool = False
) -> Fields:
    """Become primary of the candidate, tracked from before anybody can write.

    Args:
        certificate: the source's ``demoted`` record, unchanged.
        accept_unheld: after a crash of this host between prepare and promote: go on although the
            device was not held for a while; the way back then compares everything by checksum.

    Raises:
        PhaseError: bad certificate. RefusedError: not held, stale cache, device not ready.
        SuspectError: the replica became suspect since prepare, and ``accept_unheld`` is not given.
    """
    watch = Stopwatch()
    after = machine.promote(store.state, run_id, certificate)
    fresh = machine.phase_of(store.state) == machine.PREPARED
    if fresh:
        with watch.part("check"):
            _refuse_lapse(host, accept_unheld)
    # The role first: tracking, release and mounts all follow from it, and a boot in between must find
    # either a standby that holds its device or a primary that tracks it.
    store.save(after)
    faults.point("handover.promote.role")
    with watch.part("attach"):
        _attach(store, host)
    faults.point("handover.promote.attached")
    if _is_held(host):
        with watch.part("refresh"):
            # Caches filled while the receivers wrote past them would show the mount an older device.
            host.hold("refresh", workload=host.workload)
        with watch.part("release"):
            host.hold("release", workload=host.workload)
    faults.point("handover.promote.released")
    with watch.part("settle"):
        host.settle_devices(wait=bool(host.config.mounts))
    host.set_marker()
    faults.point("handover.promote.marked")
    result = watch.result(tracking=dict((store.state.handover or {}).get("doing", {}).get("tracking", {})))
    store.save(machine.promoted(store.state, run_id, result))
    return result


def _refuse_lapse(host: Host, accept_unheld: bool) -> None:
    try:
        _refuse_unfit(host)
    except BmigrateError as error:
        if not accept_unheld:
            error.hint = (
                "this host lost hold of the device after prepare (crash or reboot); all that the drain sent had "
                "been durable before: if nothing else wrote to the device, repeat with --accept-unheld"
            )
            raise


def _is_held(host: Host) -> bool:
    return any(item.get("held") for item in _held(host).values())


def _attach(store: Store, host: Host) -> None:
    """Start tracking: with empty maps while the device is still held, else as suspect.

    What was attached is noted durably before the device is let go: a repeat after the release must
    not empty maps that may have marks by then.
    """
    record = store.state.handover or {}
    tracking: Fields = dict((record.get("doing") or {}).get("tracking", {}))
    boot_id, found = host.boot_id(), _held(host)
    for volume in host.config.volumes:
        if tracking.get(volume.name, {}).get("boot_id") == boot_id:
            continue
        status = found.get(volume.name, {})
        whole = bool(status.get("held")) and bool(status.get("continuous"))
        answer = host.breqd("attach", workload=host.workload, volume=volume.name, mode="promote" if whole else "resume")
        tracking[volume.name] = {
            "boot_id": boot_id,
            "mode": "promote" if whole else "resume",
            "attachment": answer.get("attachment"),
            "suspect": answer.get("suspect"),
        }
    store.save(machine.doing(store.state, "promote", {"tracking": tracking}))


def start(store: Store, host: Host, run_id: str) -> Fields:
    """Mount, start the services, wait for the health check.

    Raises:
        RefusedError: reason ``unhealthy``: the service did not come up; nothing is rolled back, the
            source's copy stays as it was at the commit.
    """
    watch = Stopwatch()
    store.save(machine.doing(store.state, "start", {"since": watch.started_at}))
    try:
        with watch.part("mount"):
            host.start_mounts()
        faults.point("handover.start.mounted")
        with watch.part("start services"):
            for service in host.config.services:
                host.start_service(service)
        running_at = host.now()
        with watch.part("health"):
            health = host.health_check()
        with watch.part("hooks"):
            host.run_hooks(host.config.after_start)
    except RefusedError as error:
        peer = host.config.peer.name
        raise RefusedError(
            f"workload {host.workload} is not healthy on the new primary: {error.message}",
            volume=error.volume,
            hint=(
                f"the copy on {peer} is untouched and stays so; correct what fails here, then run failover.yml "
                "again: it goes on with this step. Rolling back after the commit is not automatic"
            ),
            reason="unhealthy",
        ) from error
    faults.point("handover.start.healthy")
    result = watch.result(running_at=running_at, health=health)
    store.save(machine.done(store.state, "start", run_id, result))
    return result


def finish(store: Store, host: Host, run_id: str) -> Fields:
    """The target is healthy: it may ship back from now on.

    Raises:
        PhaseError: not started.
    """
    watch = Stopwatch()
    problems: list[str] = []
    store.save(machine.finish(store.state, run_id, watch.result()))
    try:
        host.ship("reload")
    except BmigrateError as error:
        tolerate(problems, error)  # the shipper reads the state when it starts
    return watch.result(problems=problems)


def cancel(store: Store, host: Host, run_id: str, abandoned: Sequence[Mapping[str, Any]]) -> Fields:
    """Forget a candidate that the source has abandoned; the host stays a standby.

    Also right when prepare died before it could note anything: sessions are then let in again.

    Raises:
        PhaseError: reason ``not_abandoned``.
    """
    result = Stopwatch().result()
    if store.state.handover is None and store.state.role == "standby":
        _unseal(host)
        return result
    store.save(machine.cancel(store.state, run_id, abandoned, result))
    faults.point("handover.cancel.noted")
    _unseal(host)
    return result
