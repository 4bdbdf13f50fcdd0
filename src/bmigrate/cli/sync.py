# SPDX-License-Identifier: GPL-3.0-or-later
"""bmigrate sync: have the shipper look now, and wait until the standby is in step if asked to.

It changes no role and starts no copy by itself: the shipper does that for every primary. What it
adds is a point in time, an exit code, and progress.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from bmigrate.cli import arguments as shared
from bmigrate.cli import bars
from bmigrate.common import errors, output, paths, rpc
from bmigrate.common.errors import BmigrateError, RefusedError, SuspectError, UnreachableError

DESCRIPTION = """\
Tells where the replica of a workload stands, on its primary; with --wait it returns when the standby
is in step, with progress on stderr. Seeding the first time takes as long as the link needs; later
only what changed is shipped. A suspect volume is compared by checksum first, by itself.

A wait ends early where waiting cannot help: the workload is paused or has no primary here, or the
standby refuses (wrong host key, wrong generation, device gone).
"""
POLL_SECONDS = 1.0
REFUSED_FOR_SECONDS = 10.0
GONE_FOR_SECONDS = 30.0


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """The sub-command's arguments."""
    parser = shared.add_command(subparsers, "sync", "wait until the standby is in step, with progress", DESCRIPTION)
    shared.add_workload(parser)
    shared.add_json(parser)
    parser.add_argument("--wait", action="store_true", help="return when in step, not at once")
    parser.add_argument(
        "--timeout", type=float, default=0.0, metavar="S", help="wait at most S seconds (default: no limit)"
    )
    return parser


def entry_of(workload: str) -> dict[str, Any]:
    """The shipper's status entry of a workload.

    Raises:
        BmigrateError: the shipper is down, or does not know the workload.
    """
    entry: dict[str, Any] = rpc.call(paths.ship_socket(), "status", workload=workload)["workloads"][0]
    return entry


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    workload = arguments.workload
    _reload(GONE_FOR_SECONDS if arguments.wait else 0.0)
    first = entry_of(workload)
    _refuse_hopeless(first, 0.0)
    last = first
    if arguments.wait:
        last = _wait(workload, arguments.timeout)
    elif first["state"] == "disconnected" and not first["last_error"]:
        last = entry_of(workload)
    changed = bool(arguments.wait and first["state"] != "in_step")
    output.emit(last, changed=changed, workload=workload, as_json=arguments.json, text=bars.line_of(last))
    return 0


def _reload(patience_seconds: float) -> None:
    """Have the shipper read configuration and state; while it is being started, wait for it."""
    deadline = time.monotonic() + patience_seconds
    while True:
        try:
            rpc.call(paths.ship_socket(), "reload")
            return
        except UnreachableError:
            if time.monotonic() >= deadline:
                raise
        time.sleep(0.2)


def _wait(workload: str, timeout_seconds: float) -> dict[str, Any]:
    began = time.monotonic()
    bad_since = gone_since = 0.0
    shown = ""
    shown_at = 0.0
    while True:
        now = time.monotonic()
        try:
            entry = entry_of(workload)
            gone_since = 0.0
        except UnreachableError:
            # the shipper may be restarting; its unit starts it again
            gone_since = gone_since or now
            if now - gone_since > GONE_FOR_SECONDS:
                raise
            time.sleep(POLL_SECONDS)
            continue
        line = bars.line_of(entry)
        if line != shown and (entry["state"] != shown.split("  ")[0] or now - shown_at >= 5.0):
            output.progress(f"{workload}: {line}")
            shown, shown_at = line, now
        if entry["state"] == "in_step":
            return entry
        failing = entry["state"] == "disconnected" and (entry["last_error"] or {}).get("code") == "refused"
        bad_since = (bad_since or now) if failing else 0.0
        _refuse_hopeless(entry, now - bad_since if bad_since else 0.0)
        if timeout_seconds and now - began > timeout_seconds:
            raise _late(entry, timeout_seconds)
        time.sleep(POLL_SECONDS)


def _refuse_hopeless(entry: dict[str, Any], refused_for_seconds: float) -> None:
    """Raise where waiting cannot help."""
    workload, state, reason = entry["workload"], entry["state"], entry["reason"]
    if state in ("idle", "paused", "sealed"):
        hints = {
            "idle": "run this on the primary; see: bmigrate status",
            "paused": f"bmigrate resume --workload {workload}",
            "sealed": "finish the open handover (run failover.yml again), or give it up",
        }
        raise RefusedError(
            f"workload {workload} is not being shipped from this host: {reason or state}",
            hint=hints[state],
            reason=state,
        )
    if refused_for_seconds >= REFUSED_FOR_SECONDS:
        raise errors.from_dict(entry["last_error"])


def _late(entry: dict[str, Any], timeout_seconds: float) -> BmigrateError:
    state, workload = entry["state"], entry["workload"]
    if state == "disconnected" and entry["last_error"]:
        return errors.from_dict(entry["last_error"])
    kind = SuspectError if state in ("suspect", "resyncing") else RefusedError
    return kind(
        f"workload {workload} is not in step after {timeout_seconds:g} s: {bars.line_of(entry)}",
        hint="wait longer (--timeout), or see what limits it: bmigrate status --watch",
        reason="not_in_step",
    )
