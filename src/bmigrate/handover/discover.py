# SPDX-License-Identifier: GPL-3.0-or-later
"""What one host knows of a workload: durable state and live facts, as one JSON object.

Promise: reads only, never waits long, never fails because something is missing: what cannot be
asked is in the answer as an error. Whoever decides gets the facts of both hosts and decides alone.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from bmigrate import __version__
from bmigrate.common import blockdev, paths, rpc
from bmigrate.common import state as states
from bmigrate.common.config import Config
from bmigrate.common.errors import BmigrateError
from bmigrate.handover import machine, probe, store
from bmigrate.handover.host import Host

Fields = dict[str, Any]

ASK_SECONDS = 5.0


def facts(config: Config) -> Fields:
    """The facts of this host: {host, version, boot_id, at, state, phase, marker, volumes, services, ...}."""
    host = Host(config)
    item = states.load(config.workload)
    if item is not None:
        # A commit that is visible and not yet safe (its process was killed between rename and fsync) must
        # not be shown: the target would be promoted by it, and a power cut here would take it back.
        store.make_durable(states.state_file(config.workload))
    result: Fields = {
        "host": config.host,
        "peer": config.peer.name,
        "workload": config.workload,
        "version": __version__,
        "boot_id": blockdev.boot_id(),
        "at": time.time(),
        "state": item.to_dict() if item else None,
        "role": item.role if item else "none",
        "generation": item.generation if item else None,
        "history": item.history if item else [],
        "abandoned": item.abandoned if item else [],
        "demoted": item.demoted if item else None,
        "candidate": item.candidate if item else None,
        "phase": machine.phase_of(item) if item else machine.IDLE,
        "run_id": item.handover["run_id"] if item and item.handover else None,
        "side": item.handover["side"] if item and item.handover else None,
        "shipping": item.shipping if item else False,
        "locked": item is not None and not store.lock_free(config.workload),
        "marker": host.marked(),
        "dead_man_armed": host.dead_man_armed(),
        "volumes": {volume.name: _volume(host, volume.name) for volume in config.volumes},
        "mounts": {mount.path: os.path.ismount(mount.path) for mount in config.mounts},
        "services": {service: host.service_state(service) for service in config.services},
        "units": {service: _enabled(host, service) for service in config.services},
        "module": _module(),
        "limits": dict(vars(config.limits)),
    }
    for name, path in (("breqd", paths.breqd_socket()), ("hold", paths.hold_socket()), ("ship", paths.ship_socket())):
        result[name] = _ask(path, config.workload)
    return result


def _volume(host: Host, volume: str) -> Fields:
    result = probe.facts(host.config.device(volume))
    if result["present"]:
        result["mounted"] = blockdev.mounts_of(result["path"])
        result["holders"] = host.holders(volume)
    return result


def _enabled(host: Host, service: str) -> str:
    """UnitFileState: enabled, disabled, static, generated, ... or ``missing``."""
    words = host.attempt(["systemctl", "show", "--property=LoadState,UnitFileState", service])[1]
    pairs = dict(line.split("=", 1) for line in words.splitlines() if "=" in line)
    if pairs.get("LoadState") == "not-found":
        return "missing"
    return pairs.get("UnitFileState") or "unknown"


def _module() -> Fields:
    loaded = {name: Path(f"/sys/module/{name}").is_dir() for name in ("bufflink", "reqlog")}
    return {"loaded": all(loaded.values()), "modules": loaded, "kernel": os.uname().release}


def _ask(path: Path, workload: str) -> Fields:
    """A daemon's status of the workload, or {error} in its place."""
    try:
        with rpc.Client(path, ASK_SECONDS) as client:
            answer = client.call("status", workload=workload)
    except BmigrateError as error:
        return {"running": False, "error": error.to_dict()}
    return dict({key: value for key, value in answer.items() if key not in ("v", "id", "ok")}, running=True)


def volume_status(found: Fields, daemon: str, volume: str) -> Fields:
    """One volume's entry in a daemon's status within facts; empty when there is none."""
    for entry in found.get(daemon, {}).get("volumes", []) or []:
        if entry.get("volume") == volume:
            return dict(entry)
    return {}


def session(found: Fields) -> Fields | None:
    """The shipper's entry of the workload within facts."""
    for entry in found.get("ship", {}).get("workloads", []) or []:
        if entry.get("workload") == found.get("workload"):
            return dict(entry)
    return None
