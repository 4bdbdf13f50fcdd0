# SPDX-License-Identifier: GPL-3.0-or-later
"""May a handover begin, and what will it cost? Facts of one or both hosts in, blockers out. Pure.

Promise: every known obstacle is named before anything is changed, each with what to do; a blocker
would make the handover fail or lose data, a warning would not. It changes nothing, anywhere.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bmigrate.common import paths
from bmigrate.common.blockdev import LARGEST_BLOCK_BYTES
from bmigrate.common.config import Config
from bmigrate.handover import discover, judge, probe
from bmigrate.kmod import kernels

Fields = dict[str, Any]

#: What the steps in the downtime window call, beside our own programs.
TOOLS = ("systemctl", "systemd-run", "udevadm", "blkid", "wipefs")
#: Seconds for stopping, mounting and starting where no earlier handover is on record to measure by.
UNMEASURED_SECONDS = 10.0
#: Steps during which the workload is down, the drain apart.
STOPPED_STEPS = ("quiesce", "prepare", "commit", "promote", "start")
OWN_START = ("enabled", "enabled-runtime", "linked", "alias")


def check(config: Config, mine: Mapping[str, Any], peer: Mapping[str, Any] | None = None) -> Fields:
    """Judge a handover of the workload.

    Args:
        config: as installed here. mine: ``discover.facts`` of this host. peer: of the other, if known.

    Returns:
        {blockers: [...], warnings: [...], verdict, prediction: {...}, kernel: {...}}; each problem is
        {reason, message, volume, host, hint}; kernel is of this host, see ``kernels.report``.
    """
    problems = _Problems()
    verdict = judge.verdict(mine, peer) if peer is not None else None
    if verdict and verdict["problem"]:
        problems.block("roles", verdict["problem"], hint="see bmigrate handover discover on both hosts")
    for facts in [mine] if peer is None else [mine, peer]:
        _host(problems, facts)
    _local(problems, config, mine)
    kernel = _kernels(problems, config)
    source = next((facts for facts in (mine, peer) if facts and facts.get("role") == "primary"), None)
    target = next((facts for facts in (mine, peer) if facts and facts.get("role") == "standby"), None)
    if source is not None:
        _source(problems, source, fresh=verdict is None or bool(verdict["fresh"]))
    if target is not None:
        _target(problems, target)
    if source is not None and target is not None:
        _pair(problems, source, target)
    return {
        "blockers": problems.blockers,
        "warnings": problems.warnings,
        "verdict": verdict,
        "prediction": predict(config, source, target),
        "kernel": kernel,
    }


class _Problems:
    def __init__(self) -> None:
        self.blockers: list[Fields] = []
        self.warnings: list[Fields] = []

    def block(self, reason: str, message: str, **fields: Any) -> None:
        self.blockers.append(_problem(reason, message, fields))

    def warn(self, reason: str, message: str, **fields: Any) -> None:
        self.warnings.append(_problem(reason, message, fields))


def _problem(reason: str, message: str, fields: Fields) -> Fields:
    return {
        "reason": reason,
        "message": message,
        "volume": fields.get("volume"),
        "host": fields.get("host"),
        "hint": fields.get("hint"),
    }


def _host(problems: _Problems, facts: Mapping[str, Any]) -> None:
    """What must hold on either host."""
    host = str(facts["host"])
    for daemon, unit in (("breqd", "breqd"), ("hold", "bmigrate-hold"), ("ship", "bmigrate-ship")):
        if not facts[daemon].get("running"):
            problems.block("daemon_down", f"{unit} does not answer", host=host, hint=f"see: systemctl status {unit}")
    if not facts["module"]["loaded"]:
        missing = ", ".join(name for name, loaded in facts["module"]["modules"].items() if not loaded)
        problems.block(
            "module_not_loaded",
            f"kernel module {missing} is not loaded (kernel {facts['module']['kernel']})",
            host=host,
            hint="run install.yml: it builds the module for the running kernel and loads it",
        )
    for name, volume in facts["volumes"].items():
        if not volume["present"]:
            problems.block(
                volume.get("reason") or "device_missing",
                volume["problem"],
                volume=name,
                host=host,
                hint="check 'devices' in the configuration, and ls -l /dev/disk/by-id",
            )
        elif volume.get("untrackable"):
            problems.block(
                "untrackable",
                f"{volume['path']} is {volume['untrackable']}: not all writes could be recorded",
                volume=name,
                host=host,
                hint="use a disk, or a partition of one",
            )
    for service, enabled in facts["units"].items():
        if enabled == "missing":
            problems.block("service_missing", f"{service} does not exist", host=host, hint="install it on both hosts")
        elif enabled in OWN_START:
            problems.warn(
                "service_enabled",
                f"{service} is enabled at boot on its own ({enabled})",
                host=host,
                hint=f"systemctl disable {service}: bmigrate-boot starts it where the role is primary",
            )


def _local(problems: _Problems, config: Config, mine: Mapping[str, Any]) -> None:
    """What only the host itself can see."""
    host = config.host
    for tool in TOOLS:
        if shutil.which(tool, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin") is None:
            problems.block(
                "tool_missing", f"{tool} is not installed", host=host, hint="install systemd, udev, util-linux"
            )
    devices = [volume for volume in mine["volumes"].values() if volume["present"]]
    sources = [volume["path"] for volume in devices] + [volume["real_path"] for volume in devices]
    try:
        fstab = Path("/etc/fstab").read_text()
    except FileNotFoundError:
        fstab = ""
    for line in probe.fstab_entries(fstab, [mount.path for mount in config.mounts], sources):
        problems.block(
            "fstab",
            f"/etc/fstab mounts it: {line}",
            host=host,
            hint="remove the line: bmigrate mounts it where the role is primary",
        )
    for mount in config.mounts:
        if not os.path.isdir(mount.path):
            problems.warn(
                "mount_point",
                f"mount point {mount.path} does not exist yet",
                volume=mount.volume,
                host=host,
                hint="systemd creates it at the first mount",
            )
    directory = os.path.realpath(config.bitmap_directory or str(paths.state_dir(config.workload)))
    for mount in config.mounts:
        if (directory + "/").startswith(mount.path + "/"):
            problems.block(
                "bitmap_on_volume",
                f"the bitmap directory {directory} is on the protected volume",
                volume=mount.volume,
                host=host,
                hint="set bitmap_directory to a place on another device",
            )


def _kernels(problems: _Problems, config: Config) -> Fields:
    """What a reboot of this host would do to the tracking, and whether it takes unsigned modules.

    Never a blocker: the workload moves and runs either way, and what a boot without the modules has not recorded is
    compared afterwards. Refusing would keep a workload on a host that its operator wants to leave.
    """
    found = kernels.report()
    for item in found["warnings"]:
        problems.warn(item["reason"], item["message"], host=config.host, hint=item["hint"])
    return found


def _source(problems: _Problems, facts: Mapping[str, Any], fresh: bool) -> None:
    host = str(facts["host"])
    for name in facts["volumes"]:
        status = discover.volume_status(dict(facts), "breqd", name)
        if not facts["breqd"].get("running"):
            continue
        if not status.get("attached"):
            problems.block(
                "not_tracked",
                "its writes are not tracked",
                volume=name,
                host=host,
                hint="see: bmigrate status; systemctl restart breqd",
            )
        if status.get("suspect"):
            problems.block(
                "suspect",
                f"suspect: {status['suspect']}",
                volume=name,
                host=host,
                hint="run sync.yml: it compares by checksum and ships what differs",
            )
    session = discover.session(dict(facts))
    if fresh and facts["ship"].get("running"):
        state = session["state"] if session else "idle"
        why = (session or {}).get("reason") or (session or {}).get("last_error")
        if state in ("disconnected", "paused", "idle"):
            problems.block(
                "not_shipping",
                f"the shipper is {state}: {why or 'no session'}",
                host=host,
                hint="run sync.yml and wait until it is in step",
            )
        elif state not in ("in_step", "catching_up"):
            problems.block(
                "not_in_step",
                f"the replica is {state}: {(session or {}).get('reason') or 'not in step yet'}",
                host=host,
                hint="run sync.yml and wait until it is in step",
            )
    for service, active in facts["services"].items():
        if fresh and active != "active":
            problems.warn(
                "service_not_running",
                f"{service} is {active} on the primary",
                host=host,
                hint="it is started on the target, and on the source if the handover is given up",
            )
    if facts.get("dead_man_armed") and fresh:
        problems.block(
            "dead_man_armed",
            "a dead-man timer of an earlier handover is armed",
            host=host,
            hint="let it fire, or find out who armed it",
        )


def _target(problems: _Problems, facts: Mapping[str, Any]) -> None:
    host = str(facts["host"])
    for name, volume in facts["volumes"].items():
        if volume.get("mounted"):
            problems.block(
                "mounted",
                f"{volume['path']} is mounted on the standby: {', '.join(volume['mounted'])}",
                volume=name,
                host=host,
                hint="unmount it; then run sync.yml: the volume is suspect now",
            )
        status = discover.volume_status(dict(facts), "hold", name)
        if facts["hold"].get("running"):
            if not status.get("held"):
                problems.block(
                    "not_held",
                    "the standby does not hold its device",
                    volume=name,
                    host=host,
                    hint="see: journalctl -u bmigrate-hold; who uses it: "
                    + ("; ".join(volume.get("holders") or []) or "nobody"),
                )
            if status.get("suspect"):
                problems.block(
                    "suspect",
                    f"the replica is suspect: {status['suspect']}",
                    volume=name,
                    host=host,
                    hint="run sync.yml: it compares by checksum and ships what differs",
                )
    for service, active in facts["services"].items():
        if active == "active":
            problems.block(
                "service_runs", f"{service} runs on the standby", host=host, hint=f"systemctl stop {service}"
            )


def _pair(problems: _Problems, source: Mapping[str, Any], target: Mapping[str, Any]) -> None:
    if source["version"] != target["version"]:
        problems.block(
            "version",
            f"bmigrate {source['version']} on {source['host']}, {target['version']} on {target['host']}",
            hint="run install.yml",
        )
    mine, theirs = source.get("generation"), target.get("generation")
    if source["phase"] == target["phase"] == "idle" and mine != theirs:
        problems.block(
            "wrong_generation",
            f"{source['host']} is of generation {mine}, {target['host']} of {theirs}",
            hint="run sync.yml: the standby must adopt the primary's generation",
        )
    for name, volume in source["volumes"].items():
        other = target["volumes"].get(name)
        if other is None:
            problems.block(
                "unknown_volume", "not configured there", volume=name, host=str(target["host"]), hint="run install.yml"
            )
        elif volume["present"] and other["present"]:
            if volume["logical_block_size"] > LARGEST_BLOCK_BYTES:
                problems.block(
                    "logical_block_size",
                    f"logical blocks of {volume['logical_block_size']} bytes",
                    volume=name,
                    host=str(source["host"]),
                    hint=f"devices with blocks of up to {LARGEST_BLOCK_BYTES} bytes are supported",
                )
            if other["size_bytes"] < volume["size_bytes"]:
                problems.block(
                    "too_small",
                    f"{other['size_bytes']} bytes, the source has {volume['size_bytes']}",
                    volume=name,
                    host=str(target["host"]),
                    hint="use a device at least as large",
                )
            if other["logical_block_size"] > volume["logical_block_size"]:
                problems.block(
                    "logical_block_size",
                    f"logical blocks of {other['logical_block_size']} bytes, the source's "
                    f"have {volume['logical_block_size']}",
                    volume=name,
                    host=str(target["host"]),
                    hint="use a device whose logical block size is not larger",
                )
            if volume["size_bytes"] < other["size_bytes"]:
                problems.warn(
                    "way_back_too_small",
                    f"the target's device is larger ({other['size_bytes']} bytes than "
                    f"{volume['size_bytes']}): the way back would be refused",
                    volume=name,
                    host=str(source["host"]),
                    hint="use devices of the same size",
                )


def predict(config: Config, source: Mapping[str, Any] | None, target: Mapping[str, Any] | None = None) -> Fields:
    """Predicted downtime in seconds: the shipper's drain, and what the other steps took the last time.

    Args:
        source, target: facts of both; the steps of the last handover are recorded on the two hosts.

    Returns:
        ``measured`` is False when no whole handover is on record; the time between the steps, which
        the controller takes, is never part of it.
    """
    session = discover.session(dict(source)) if source else None
    drain = (session or {}).get("predicted_drain_seconds")
    steps = _last_steps(source, target)
    rest = sum(steps.values()) if len(steps) == len(STOPPED_STEPS) else None
    return {
        "drain_seconds": drain,
        "other_phases_seconds": round(rest, 3) if rest is not None else None,
        "downtime_seconds": round(float(drain) + (UNMEASURED_SECONDS if rest is None else rest), 3)
        if drain is not None
        else None,
        "measured": rest is not None,
        "lag_seconds": (session or {}).get("lag_seconds"),
        "bytes_left": (session or {}).get("bytes_left"),
        "max_downtime_seconds": config.limits.max_downtime_seconds,
    }


def _last_steps(source: Mapping[str, Any] | None, target: Mapping[str, Any] | None) -> dict[str, float]:
    """Seconds that each step took in the last handover that both hosts finished."""
    records = [((facts or {}).get("state") or {}).get("last_handover") or {} for facts in (source, target)]
    if len({record.get("run_id") for record in records}) != 1:
        return {}
    found = {}
    for record in records:
        for step in STOPPED_STEPS:
            seconds = (record.get("results", {}).get(step) or {}).get("seconds")
            if seconds is not None:
                found[step] = float(seconds)
    return found
