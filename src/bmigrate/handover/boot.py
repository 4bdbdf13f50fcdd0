# SPDX-License-Identifier: GPL-3.0-or-later
"""What a booting host may start: the durable role decides, nothing else does.

Promise: a demoted host and a standby start nothing. A source that finds a handover open and not
committed abandons its candidate durably first, so that the commit can no longer happen while the
service runs here. An error of one workload never keeps another one from starting.
"""

from __future__ import annotations

from typing import Any

from bmigrate.common import config as configs
from bmigrate.common import state as states
from bmigrate.common.errors import BmigrateError
from bmigrate.handover import machine, source
from bmigrate.handover.host import Host, tolerate
from bmigrate.handover.store import Store, opened

Fields = dict[str, Any]


def boot_all() -> list[Fields]:
    """Decide and act for every workload of this host; one result each, errors in it."""
    results = []
    for item in states.load_all():
        try:
            host = Host(configs.load(item.workload, validated=False))
            with opened(item.workload) as store:
                results.append(boot(store, host))
        except BmigrateError as error:
            results.append({"workload": item.workload, "action": "failed", "error": error.to_dict()})
    return results


def boot(store: Store, host: Host) -> Fields:
    """Start one workload if its role here allows it.

    Raises:
        BmigrateError: what did not start.
    """
    action, why = machine.boot_decision(store.state)
    result: Fields = {"workload": host.workload, "action": action, "why": why, "problems": []}
    if action == "stay":
        host.clear_marker()
        return result
    problems: list[str] = result["problems"]
    _track(host, problems)
    if action == "resume":
        run_id = str((store.state.handover or {})["run_id"])
        result["resume"] = source.resume(store, host, run_id, "boot")
        return result
    host.set_marker()
    host.start_mounts()
    for service in host.config.services:
        host.start_service(service)
    return result


def _track(host: Host, problems: list[str]) -> None:
    """Have every volume tracked before the workload starts; where that fails it starts all the same.

    breqd attaches a primary's volumes by itself, but not those of a promotion that was cut short.
    A volume that is written untracked becomes suspect, which costs a comparison; the service comes first.
    """
    try:
        status = host.breqd("status", workload=host.workload)
    except BmigrateError as error:
        tolerate(problems, error)
        return
    attached = {entry["volume"] for entry in status.get("volumes", []) if entry.get("attached")}
    for volume in host.config.volumes:
        if volume.name in attached:
            continue
        try:
            host.breqd("attach", workload=host.workload, volume=volume.name, mode="resume")
        except BmigrateError as error:
            problems.append(f"volume {volume.name} is not tracked and becomes suspect: {error}")
