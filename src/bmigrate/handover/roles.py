# SPDX-License-Identifier: GPL-3.0-or-later
"""How a workload gets its first primary and its standby: init and adopt.

Promise: nothing that looks like data is overwritten unless the operator has named the workload for
it, and everything is checked before anything is changed. Data itself is moved by the shipper later.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bmigrate.common import atomic, paths
from bmigrate.common import state as states
from bmigrate.common.errors import BmigrateError, RefusedError, UsageError
from bmigrate.handover import machine, probe
from bmigrate.handover.host import Host, tolerate

Fields = dict[str, Any]


def init(host: Host) -> tuple[Fields, bool]:
    """Make this host the first primary: generation 1, tracked, every block to be shipped.

    The workload may be running. Returns the result and whether anything changed.

    Raises:
        RefusedError: device missing or not trackable, or the host is a standby.
    """
    with states.locked(host.workload, host=host.config.host) as item:
        if item.role == "standby":
            raise RefusedError(
                f"workload {host.workload} is standby on this host",
                hint="a standby becomes primary by failover.yml only",
                reason="wrong_role",
            )
        changed = item.role == "none"
        if changed:
            for volume in host.config.volumes:
                refuse_device(host, volume.name)
            first = {"number": 1, "id": states.new_id()}
            item.role, item.generation, item.history, item.shipping = "primary", first, [first], True
            # The role before the tracking: breqd attaches by role again after its own restart.
            states.save(item)
        tracked = [attach(host, volume.name, "seed" if changed else "resume") for volume in host.config.volumes]
        host.set_marker()
        problems = reload_shipper(host)
        return (
            {"generation": item.generation, "history": item.history, "volumes": tracked, "problems": problems},
            changed or any(entry["attached_now"] for entry in tracked),
        )


def attach(host: Host, volume: str, mode: str) -> Fields:
    """Have breqd track a volume: ``seed`` makes every block dirty, ``resume`` goes on where it was."""
    answer = host.breqd("attach", workload=host.workload, volume=volume, mode=mode)
    changed = bool(answer.get("changed", True))
    return {"volume": volume, "attached_now": changed, "suspect": answer.get("suspect")}


def reload_shipper(host: Host) -> list[str]:
    """Tell the shipper that the role has changed; it reads the state anyway when it starts."""
    problems: list[str] = []
    try:
        host.ship("reload")
    except BmigrateError as error:
        tolerate(problems, error)
    return problems


def adopt(
    host: Host, source: Mapping[str, Any], overwrite: str | None, peer: Sequence[Fields] = ()
) -> tuple[Fields, bool]:
    """Make this host the standby of the primary's generation, its devices held.

    Args:
        source: the primary's {number, id, history?}. overwrite: the workload's name when its devices
            may hold data. peer: the primary's volumes, {name, size_bytes, logical_block_size} each.

    Raises:
        RefusedError: mounted, held, foreign data, too small, larger logical block, primary here.
        UsageError: ``--overwrite`` names another workload.
    """
    generation = machine.bare(source)
    history = [machine.bare(entry) for entry in source.get("history") or [generation]]
    if overwrite is not None and overwrite != host.workload:
        raise UsageError(
            f"--overwrite names {overwrite}, the workload is {host.workload}",
            hint=f"say --overwrite {host.workload} only if its devices on this host may be overwritten",
            reason="bad_overwrite",
        )
    with states.locked(host.workload, host=host.config.host) as item:
        if item.role == "primary":
            raise RefusedError(
                f"workload {host.workload} is primary on this host",
                hint="two primaries are never made; see discover on both hosts",
                reason="wrong_role",
            )
        changed, found = False, {}
        if item.role == "standby" and not machine.same(item.generation, generation):
            fork = machine.fork_of(item.history, history)
            raise RefusedError(
                f"this host is standby of another generation of workload {host.workload}"
                + (f", and the histories have forked: {fork}" if fork else ""),
                hint="what the primary has still to ship was counted against another copy; bringing a host back "
                "that missed a generation is not supported yet",
                reason="wrong_generation",
            )
        if item.role == "none":
            for volume in host.config.volumes:
                refuse_device(host, volume.name)
                refuse_geometry(host, volume.name, peer)
                refuse_used(host, volume.name)
                found[volume.name] = probe.contents(host.config.device(volume.name), host.attempt)
                if found[volume.name] and overwrite is None:
                    raise RefusedError(
                        f"device {host.config.device(volume.name)} is not empty: {'; '.join(found[volume.name])}",
                        volume=volume.name,
                        hint=f"if all of it may be overwritten: --overwrite {host.workload} "
                        f"(sync.yml: -e bmigrate_overwrite={host.workload})",
                        reason="foreign_data",
                    )
            item.role, item.generation, item.history = "standby", generation, history
            item.shipping, item.demoted, item.candidate = False, None, None
            # The role before the hold: a reboot in between must find a standby, whose devices are held.
            states.save(item)
            changed = True
        for volume in host.config.volumes:
            atomic.unlink_durably(paths.clean_flag(host.workload, volume.name))
        host.clear_marker()
        host.hold("hold", workload=host.workload)
        host.hold("reload")
        return {"generation": generation, "overwritten": found}, changed


def refuse_device(host: Host, volume: str) -> None:
    """Refuse a device that is missing, no block device, or of a kind that cannot be tracked."""
    facts = probe.facts(host.config.device(volume))
    if not facts["present"]:
        raise RefusedError(
            facts["problem"],
            volume=volume,
            hint="check 'devices' of the volume in the configuration, and ls -l /dev/disk/by-id",
            reason=facts.get("reason"),
        )
    if facts.get("untrackable"):
        raise RefusedError(
            f"device {facts['path']} is {facts['untrackable']}: not all writes could be recorded",
            volume=volume,
            hint="use a disk, or a partition of one",
            reason="untrackable",
        )


def refuse_used(host: Host, volume: str) -> None:
    """Refuse a device that is mounted, part of something, or open in a process."""
    holders = host.holders(volume)
    if holders:
        mounted = any(text.startswith("mounted") for text in holders)
        raise RefusedError(
            f"device {host.config.device(volume)} is in use: {'; '.join(holders)}",
            volume=volume,
            hint="unmount it, or name another device",
            reason="mounted" if mounted else "device_busy",
        )


def refuse_geometry(host: Host, volume: str, peer: Sequence[Fields]) -> None:
    """Refuse a device that cannot hold the source's blocks."""
    theirs = next((entry for entry in peer if entry.get("name") == volume), None)
    if theirs is None:
        return
    facts = probe.facts(host.config.device(volume))
    if not facts["present"]:
        raise RefusedError(facts["problem"], volume=volume, reason=facts.get("reason"))
    if facts["size_bytes"] < int(theirs["size_bytes"]):
        raise RefusedError(
            f"device {facts['path']} has {facts['size_bytes']} bytes, the source's has {theirs['size_bytes']}",
            volume=volume,
            hint="name a device at least as large as the source's",
            reason="too_small",
        )
    if facts["logical_block_size"] > int(theirs["logical_block_size"]):
        raise RefusedError(
            f"device {facts['path']} has logical blocks of {facts['logical_block_size']} bytes, "
            f"the source's has {theirs['logical_block_size']}",
            volume=volume,
            hint="name a device whose logical block size is not larger than the source's",
            reason="logical_block_size",
        )
