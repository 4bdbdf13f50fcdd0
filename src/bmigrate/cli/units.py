# SPDX-License-Identifier: GPL-3.0-or-later
"""bmigrate units: brings the systemd units of a workload in line with its configuration."""

from __future__ import annotations

import argparse
import subprocess
from pathlib import Path
from typing import Any

from bmigrate.cli import arguments as shared
from bmigrate.common import config as configs
from bmigrate.common import output
from bmigrate.common.errors import RefusedError

DEFAULT_DIRECTORY = "/etc/systemd/system"

DESCRIPTION = """\
Writes the mount units of a workload (noauto, by device path, started only where the host is primary)
and a drop-in for each of its services (the same condition, and after the mounts). Files with our
header that are no longer wanted are removed; files of others are never touched. systemd is reloaded
when something changed. Nothing is started or stopped.
"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """The sub-command's arguments."""
    parser = shared.add_command(subparsers, "units", "write the mount units and service drop-ins", DESCRIPTION)
    shared.add_workload(parser)
    parser.add_argument("--directory", default=DEFAULT_DIRECTORY, metavar="D", help="default: %(default)s")
    parser.add_argument("--check", action="store_true", help="only say what would change")
    parser.add_argument("--diff", action="store_true", help="show the differences")
    parser.add_argument("--remove", action="store_true", help="remove all units of the workload (uninstall)")
    shared.add_json(parser)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    from bmigrate.handover import units

    config = configs.load(arguments.workload)
    result = units.bring_in_line(config, Path(arguments.directory), check=arguments.check, remove=arguments.remove)
    changed = bool(result["changed"])
    if changed and not arguments.check and arguments.directory == DEFAULT_DIRECTORY:
        done = subprocess.run(["systemctl", "daemon-reload"], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RefusedError(f"systemctl daemon-reload failed: {done.stderr.strip()}", reason="command_failed")
    text = units.as_text(result["diff"]) if arguments.diff else ""
    text = text or ("changed: " + ", ".join(result["written"] + result["removed"]) if changed else "nothing to change")
    if not arguments.diff:
        result.pop("diff")
    output.emit(result, changed=changed, workload=arguments.workload, as_json=arguments.json, text=text)
    return 0
