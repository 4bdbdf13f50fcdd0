# SPDX-License-Identifier: GPL-3.0-or-later
"""bmigrate shutdown: closes the volumes cleanly while the host goes down."""

from __future__ import annotations

import argparse
from typing import Any

from bmigrate.cli import arguments as shared
from bmigrate.common import output

DESCRIPTION = """\
ExecStop of bmigrate-shutdown.service: after the workloads' mounts are gone and before breqd and
bmigrate-hold stop. Takes each primary volume exclusively, has breqd write its map and the clean
flag, lets go. A volume that is still in use gets no flag: the next boot compares it by checksum.
Refused while the host is not going down.
"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """The sub-command's arguments."""
    parser = shared.add_command(subparsers, "shutdown", "close the volumes cleanly at poweroff", DESCRIPTION)
    shared.add_json(parser)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Run the command; a volume without a flag is reported, and is no failure of the shutdown."""
    from bmigrate.handover import shutdown

    results = shutdown.close_all()
    lines = [
        f"{item['workload']}/{item['volume']}: "
        + ("clean" if item["clean"] else f"not clean: {item['error']['message']}")
        for item in results
    ]
    text = "\n".join(lines) or "no primary volume here"
    output.emit({"volumes": results}, changed=bool(results), as_json=arguments.json, text=text)
    return 0
