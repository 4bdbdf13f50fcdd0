# SPDX-License-Identifier: GPL-3.0-or-later
"""bmigrate adopt: this host becomes the standby of a workload's primary."""

from __future__ import annotations

import argparse
from typing import Any

from bmigrate.cli import arguments as shared
from bmigrate.common import config as configs
from bmigrate.common import output

DESCRIPTION = """\
Makes this host the standby of a workload: it takes over the primary's generation and holds the
devices exclusively from now on, also after a reboot. WHAT THE DEVICES HOLD WILL BE OVERWRITTEN by
the shipper; therefore a device with any signature, or with anything but zeroes in its first MiB, is
refused unless --overwrite names the workload.

Refused always: a device that is mounted, in use, missing, smaller than the source's or with larger
logical blocks; a host that is primary. Repeating it changes nothing.
"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """The sub-command's arguments."""
    parser = shared.add_command(subparsers, "adopt", "make this host the standby of a workload", DESCRIPTION)
    shared.add_workload(parser)
    parser.add_argument(
        "--generation",
        required=True,
        metavar="JSON",
        help='the primary\'s {"number": N, "id": "...", "history": [...], "volumes": [{"name", "size_bytes", '
        '"logical_block_size"}]}; history and volumes may be left out',
    )
    parser.add_argument("--overwrite", metavar="W", help="the workload's name again: its devices may hold data")
    shared.add_json(parser)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    from bmigrate.handover import roles
    from bmigrate.handover.host import Host

    source = shared.json_value("--generation", arguments.generation, dict)
    host = Host(configs.load(arguments.workload))
    result, changed = roles.adopt(host, source, arguments.overwrite or None, source.get("volumes") or [])
    text = f"standby of generation {result['generation']['number']}"
    output.emit(result, changed=changed, workload=arguments.workload, as_json=arguments.json, text=text)
    return 0
