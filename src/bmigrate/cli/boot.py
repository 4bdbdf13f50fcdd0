# SPDX-License-Identifier: GPL-3.0-or-later
"""bmigrate boot: what a booting host may start."""

from __future__ import annotations

import argparse
from typing import Any

from bmigrate.cli import arguments as shared
from bmigrate.common import errors, output

DESCRIPTION = """\
Run by bmigrate-boot.service, after breqd and bmigrate-hold. Starts the workloads whose durable role
on this host is primary. A host that was demoted, or is standby, starts nothing. A handover that is
open here and not committed is abandoned first, durably, and then the workload starts.
"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """The sub-command's arguments."""
    parser = shared.add_command(subparsers, "boot", "start at boot what this host's role allows", DESCRIPTION)
    shared.add_json(parser)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Run the command; the exit code is that of the first workload that failed."""
    from bmigrate.handover import boot

    results = boot.boot_all()
    failed = next((errors.from_dict(item["error"]) for item in results if item.get("error")), None)
    lines = []
    for item in results:
        lines.append(f"{item['workload']}: {item['action']} ({item.get('why', '')})")
        lines += [f"  {problem}" for problem in item.get("problems", [])]
    changed = any(item["action"] in ("start", "resume") for item in results)
    if not arguments.json and lines:
        output.progress("\n".join(lines))
    output.emit({"workloads": results}, changed=changed, error=failed, as_json=arguments.json)
    return failed.exit_code if failed else 0
