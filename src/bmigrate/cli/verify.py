# SPDX-License-Identifier: GPL-3.0-or-later
"""bmigrate verify: compare both sides by checksum while everything runs; exit code 3 when they differ."""

from __future__ import annotations

import argparse
import threading
from typing import Any

from bmigrate.cli import arguments as shared
from bmigrate.cli import bars
from bmigrate.cli.sync import entry_of
from bmigrate.common import output, paths, rpc
from bmigrate.common.errors import BmigrateError, RefusedError

DESCRIPTION = """\
Reads every block of a workload on both hosts and compares by checksum, while the workload runs. What
was just written and is still on its way is looked at again until it arrived; only blocks that differ
without such an explanation are reported, with their offsets.

Run it on the primary. Nothing is changed; with --mark the blocks that differ are marked dirty, so that the
shipper sends them again.
"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """The sub-command's arguments."""
    text = "compare every block of a workload on both hosts by checksum"
    parser = shared.add_command(subparsers, "verify", text, DESCRIPTION)
    shared.add_workload(parser)
    shared.add_json(parser)
    parser.add_argument("--mark", action="store_true", help="have the blocks that differ shipped again")
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Run the command.

    Raises:
        RefusedError: reason ``different``, or ``incomplete``: too much may differ to say.
    """
    workload = arguments.workload
    over = threading.Event()
    shower = threading.Thread(target=_show, args=(workload, over), daemon=True)
    shower.start()
    try:
        answer = rpc.call(paths.ship_socket(), "verify", None, workload=workload, mark=arguments.mark)
    finally:
        over.set()
        shower.join(2.0)
    data = {key: value for key, value in answer.items() if key not in ("v", "id", "ok")}
    compared = bars.size(data["compared_bytes"])
    complete = data.get("complete", True)
    at_least = "" if complete else "at least "
    if not complete and not data["different_bytes"]:
        error = RefusedError(
            f"after {compared} there were more places that may differ than fit in memory: not all was compared",
            hint="wait until the workload is in step, and verify again",
            reason="incomplete",
        )
        output.emit(data, workload=workload, error=error, as_json=arguments.json)
        return error.exit_code
    if not data["different_bytes"]:
        busy = f" ({bars.size(data['busy_bytes'])} never stood still)" if data["busy_bytes"] else ""
        text = f"workload {workload}: {compared} compared, equal{busy}"
        output.emit(data, workload=workload, as_json=arguments.json, text=text)
        return 0
    places = ", ".join(
        f"{item['volume']} {item['offset_bytes']}+{item['length_bytes']}" for item in data["different_blocks"][:8]
    )
    marked = bool(data["marked"])
    error = RefusedError(
        f"{at_least}{bars.size(data['different_bytes'])} of {compared} differ: {places}",
        volume=data["different_blocks"][0]["volume"],
        hint="they are marked and will be shipped again; find out who wrote to the standby's device"
        if marked
        else "ship them again with: bmigrate verify --mark; find out who wrote to the standby's device",
        reason="different",
    )
    output.emit(data, changed=marked, workload=workload, error=error, as_json=arguments.json)
    return error.exit_code


def _show(workload: str, over: threading.Event) -> None:
    """Progress on stderr until the answer is there."""
    while not over.wait(2.0):
        try:
            own = entry_of(workload).get("progress")
        except BmigrateError:
            continue  # the call that waits for the answer reports what is wrong
        if own:
            output.progress(f"{workload}: comparing {bars.bar(own['done_bytes'], own['total_bytes'])}")
