# SPDX-License-Identifier: GPL-3.0-or-later
"""bmigrate pause and bmigrate resume: stop shipping for a while, and go on."""

from __future__ import annotations

import argparse
from typing import Any

from bmigrate.cli import arguments as shared
from bmigrate.common import output, paths, rpc

PAUSE = """\
Stops shipping of a workload from this host. Tracking goes on: what is written meanwhile stays marked
and is shipped after `bmigrate resume`. The pause survives restarts. Repeating it changes nothing.
"""
RESUME = """\
Goes on shipping a workload that was paused. Repeating it changes nothing. (To put a workload back
during a handover, that is another command: bmigrate handover resume.)
"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Arguments of ``pause``."""
    return _parser(subparsers, "pause", "stop shipping a workload for a while; tracking goes on", PAUSE)


def add_resume(subparsers: Any) -> argparse.ArgumentParser:
    """Arguments of ``resume``."""
    return _parser(subparsers, "resume", "go on shipping a workload that was paused", RESUME)


def _parser(subparsers: Any, name: str, help_text: str, description: str) -> argparse.ArgumentParser:
    parser = shared.add_command(subparsers, name, help_text, description)
    shared.add_workload(parser)
    shared.add_json(parser)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Run either command; they differ in one word."""
    answer = rpc.call(paths.ship_socket(), arguments.command, workload=arguments.workload)
    changed = bool(answer["changed"])
    now = "paused" if arguments.command == "pause" else "shipping"
    text = f"workload {arguments.workload}: {now}" + ("" if changed else " already")
    output.emit({"state": now}, changed=changed, workload=arguments.workload, as_json=arguments.json, text=text)
    return 0
