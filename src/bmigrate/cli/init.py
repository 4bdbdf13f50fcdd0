# SPDX-License-Identifier: GPL-3.0-or-later
"""bmigrate init: the first primary of a workload, generation 1."""

from __future__ import annotations

import argparse
from typing import Any

from bmigrate.cli import arguments as shared
from bmigrate.common import config as configs
from bmigrate.common import output

DESCRIPTION = """\
Makes this host the first primary of a workload: generation 1 with a random id. Its devices are
tracked from now on and every block counts as to be shipped. The workload may be running; nothing is
stopped, nothing is written to the devices. Repeating it changes nothing.

Refused on a host that is already standby: a standby becomes primary by a handover only.
"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """The sub-command's arguments."""
    parser = shared.add_command(subparsers, "init", "make this host the first primary of a workload", DESCRIPTION)
    shared.add_workload(parser)
    shared.add_json(parser)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    from bmigrate.handover import roles
    from bmigrate.handover.host import Host

    result, changed = roles.init(Host(configs.load(arguments.workload)))
    text = f"primary of generation {result['generation']['number']}"
    output.emit(result, changed=changed, workload=arguments.workload, as_json=arguments.json, text=text)
    return 0
