# SPDX-License-Identifier: GPL-3.0-or-later
"""bmigrate early: takes the clean flags away before anything can be mounted.

Needs neither module nor daemon nor configuration, and imports almost nothing: it runs before
local-fs.target.
"""

from __future__ import annotations

import argparse
from typing import Any

from bmigrate.cli import arguments as shared
from bmigrate.common import output
from bmigrate.common.errors import RefusedError

DESCRIPTION = """\
Run by bmigrate-early.service, before any volume can be mounted. Moves each durable clean flag into
/run, with the id of this boot: a boot that then writes without tracking (no module, no daemon)
cannot be taken for a clean one by the next. The closing notes of replicas are stamped with the id of this
boot for the same reason: they are believed in no later one.
"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """The sub-command's arguments."""
    parser = shared.add_command(subparsers, "early", "take the clean flags away before any mount", DESCRIPTION)
    shared.add_json(parser)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    from bmigrate.handover import early

    try:
        taken = early.retire_all()
    except OSError as exc:
        raise RefusedError(
            f"what an earlier boot vouched for cannot be taken away: {exc}",
            hint="make room under /var/lib/bmigrate and run 'bmigrate early' again; no workload is started while a "
            "clean flag (/var/lib/bmigrate/*/*.clean) is there, which may also be removed by hand",
            reason="os_error",
        ) from exc
    text = "; ".join(f"{item['workload']}/{item['volume']}" for item in taken) or "no clean flag"
    output.emit({"taken": taken}, changed=bool(taken), as_json=arguments.json, text=text)
    return 0
