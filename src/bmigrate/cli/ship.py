# SPDX-License-Identifier: GPL-3.0-or-later
"""bmigrate ship: the shipping daemon in the foreground, as bmigrate-ship.service runs it."""

from __future__ import annotations

import argparse
from typing import Any

from bmigrate.cli import arguments as shared

DESCRIPTION = """\
The shipper: for every workload whose role on this host is primary, it keeps a session with the
standby open and sends what changes, pass after pass. A service of systemd (bmigrate-ship.service);
there is one per host. It may be stopped and killed at any time: what was not acknowledged stays
marked, and is sent by the next session.

Talk to it with: bmigrate status, sync, verify, pause, resume.
"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """The sub-command's arguments."""
    parser = shared.add_command(subparsers, "ship", "the shipping daemon (bmigrate-ship.service)", DESCRIPTION)
    parser.add_argument("--verbose", action="store_true", help="say more on stderr")
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Run the daemon until it is told to stop."""
    from bmigrate.ship.main import main

    return main(verbose=arguments.verbose)
