# SPDX-License-Identifier: GPL-3.0-or-later
"""bmigrate status: what every workload of this host is doing; from the three daemons and the state on disk.

It changes nothing and needs no daemon to answer: one that is down is shown as down.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

from bmigrate.cli import arguments as shared
from bmigrate.cli import bars
from bmigrate.common import output, paths, rpc, state
from bmigrate.common.errors import BmigrateError, UsageError
from bmigrate.kmod import kernels

DESCRIPTION = """\
Shows the workloads of this host: role and generation, what the shipper is doing and what limits it, how
much is left, how far behind the standby is, and how long a drain would take now.

states:  idle          nothing to ship from here (standby, or shipping not allowed yet)
         seeding       the first complete copy is on its way
         catching_up   passes go on, and help
         in_step       a drain now would be shorter than limits.max_drain_seconds
         losing_ground two passes in a row did not help; the reason says what limits
         suspect       tracking may have missed writes; a comparison by checksum is due
         resyncing     that comparison is going on
         disconnected  no session with the standby; the reason says why; it tries again by itself
         paused        by `bmigrate pause`
         draining, sealed   the last pass of a handover, and after it

--watch draws bars, and a map of each tracked device with its dirty regions, when python3-rich is
installed and stdout is a terminal; otherwise it prints the table once a second. Ctrl-C ends it.
"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """The sub-command's arguments."""
    text = "what every workload of this host is doing, live with --watch"
    parser = shared.add_command(subparsers, "status", text, DESCRIPTION)
    parser.add_argument("--workload", "-w", type=shared.workload_name, metavar="W", help="only this workload")
    parser.add_argument("--watch", action="store_true", help="show it again every second until interrupted")
    shared.add_json(parser)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    if arguments.watch and arguments.json:
        raise UsageError("--watch and --json do not go together", hint="call it again instead", reason="usage")
    if arguments.watch:
        return _watch(arguments.workload)
    data = collect(arguments.workload)
    output.emit(data, workload=arguments.workload, as_json=arguments.json, text=render(data))
    return 0


def _watch(workload: str | None) -> int:
    """Until interrupted: drawn by rich where it is installed and there is a terminal, else the table once a second."""
    from bmigrate.cli import watch

    try:
        live = watch.Live(lambda: collect(workload), notes, _picture) if sys.stdout.isatty() else None
    except ImportError:
        live = None
    try:
        if live is not None:
            live.run()
        while True:
            clear = "\x1b[H\x1b[2J" if sys.stdout.isatty() else ""
            sys.stdout.write(f"{clear}{render(collect(workload))}\n")
            sys.stdout.flush()
            time.sleep(1.0)
    except KeyboardInterrupt:
        return 0


def _picture(workload: str, volume: str, cells: int) -> dict[str, Any] | None:
    """breqd's map of a volume; None when it does not answer or does not track it."""
    try:
        return rpc.call(paths.breqd_socket(), "map", 5.0, workload=workload, volume=volume, cells=cells)
    except BmigrateError:
        return None


def _ask(path: Any, key: str) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """What a daemon says, and the error when it does not answer."""
    try:
        return list(rpc.call(path, "status", 5.0)[key]), None
    except BmigrateError as error:
        return [], error.to_dict()


def collect(workload: str | None) -> dict[str, Any]:
    """Everything that is known of one workload, or of all.

    Raises:
        UsageError: there is no such workload on this host.
    """
    ship, ship_error = _ask(paths.ship_socket(), "workloads")
    tracked, breqd_error = _ask(paths.breqd_socket(), "volumes")
    held, hold_error = _ask(paths.hold_socket(), "volumes")
    configured = {path.stem for path in paths.etc().glob("*.yml")}
    states: dict[str, dict[str, Any]] = {}
    damaged: dict[str, dict[str, Any]] = {}
    roots = paths.state().iterdir() if paths.state().is_dir() else ()
    for name in sorted(configured | {item.name for item in roots if (item / "state.json").exists()}):
        try:
            found = state.load(name)
        except BmigrateError as error:
            damaged[name] = error.to_dict()
            continue
        states[name] = found.to_dict() if found is not None else {}
    names = sorted({*configured, *states, *damaged})
    if workload is not None:
        if workload not in names:
            raise UsageError(
                f"workload {workload} is not known on this host",
                hint=f"known workloads: {', '.join(names) or 'none'}",
                reason="unknown_workload",
            )
        names = [workload]
    entries = []
    for name in names:
        mine = states.get(name, {})
        handover = mine.get("handover")
        entries.append(
            {
                "workload": name,
                "role": mine.get("role", "none"),
                "generation": mine.get("generation"),
                "handover": {key: handover.get(key) for key in ("run_id", "phase", "side")} if handover else None,
                "state_error": damaged.get(name),
                "ship": next((item for item in ship if item["workload"] == name), None),
                "tracking": [item for item in tracked if item["workload"] == name],
                "hold": [item for item in held if item["workload"] == name],
            }
        )
    daemons = {"bmigrate-ship": ship_error, "breqd": breqd_error, "bmigrate-hold": hold_error}
    return {
        "workloads": entries,
        "daemons": {name: {"up": error is None, "error": error} for name, error in daemons.items()},
        "kernel": kernels.report(),
    }


def render(data: dict[str, Any]) -> str:
    """The table for people."""
    rows = [
        [
            "WORKLOAD",
            "ROLE",
            "GEN",
            "STATE",
            "DURABLE ON STANDBY",
            "LEFT",
            "DIRTY",
            "SHIPS",
            "LAG",
            "DRAIN",
            "LIMITED BY",
        ]
    ]
    for item in data["workloads"]:
        ship = item["ship"] or {}
        generation = item["generation"]
        rows.append(
            [
                item["workload"],
                item["role"],
                str(generation["number"]) if generation else "-",
                ship.get("state", "-"),
                bars.progress_of(ship) or "-",
                bars.size(ship.get("bytes_left")),
                bars.rate(ship.get("dirty_rate_bytes_per_second")),
                bars.rate(ship.get("ship_rate_bytes_per_second")),
                bars.seconds(ship.get("lag_seconds")),
                bars.seconds(ship.get("predicted_drain_seconds")),
                ship.get("limiter") or "-",
            ]
        )
    lines = notes(data)
    return bars.table(rows) + ("\n\n" + "\n".join(lines) if lines else "")


def notes(data: dict[str, Any]) -> list[str]:
    """What is not as it should be, in sentences."""
    found = [f"{item['workload']}: {text}" for item in data["workloads"] for text in _notes(item)]
    for name, daemon in data["daemons"].items():
        if not daemon["up"]:
            found.append(f"{name} is down: {daemon['error']['message']} ({daemon['error']['hint']})")
    kernel = data["kernel"]
    found += [f"{item['message']} ({item['hint']})" for item in kernel["warnings"]]
    if kernel["trust"]["signatures_required"]:
        found.append(f"this kernel loads signed modules only: {kernel['secure_boot']}")
    return found


def _notes(item: dict[str, Any]) -> list[str]:
    notes = []
    ship = item["ship"] or {}
    if item["state_error"]:
        notes.append(item["state_error"]["message"])
    if ship.get("reason") and ship.get("state") != "idle":
        notes.append(f"{ship['state']}: {ship['reason']}")
    rude = [volume for volume in ship.get("volumes", []) if volume.get("idle_class_honoured") is False]
    if rude and item["role"] == "primary":
        names, schedulers = (sorted({volume[key] for volume in rude}) for key in ("volume", "scheduler"))
        notes.append(
            f"the I/O scheduler {', '.join(schedulers)} of {', '.join(names)} does not honour the idle class: "
            "only resting keeps the workload first"
        )
    if item["handover"]:
        notes.append("handover {run_id} is open: {side} in phase {phase}".format(**item["handover"]))
    for volume in item["tracking"]:
        if volume.get("suspect"):
            notes.append(f"volume {volume['volume']} is suspect: {volume['suspect']}")
    for volume in item["hold"]:
        if volume.get("suspect"):
            notes.append(f"replica {volume['volume']} is suspect: {volume['suspect']}")
        if item["role"] == "standby" and not volume.get("held"):
            notes.append(f"replica {volume['volume']} is not held exclusively")
    return notes
