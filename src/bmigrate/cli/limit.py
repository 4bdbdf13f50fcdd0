# SPDX-License-Identifier: GPL-3.0-or-later
"""bmigrate limit: how fast a workload may be shipped, from now on."""

from __future__ import annotations

import argparse
import re
from typing import Any

from bmigrate.cli import arguments as shared
from bmigrate.common import output, paths, rpc

DESCRIPTION = """\
Sets the bandwidth limit of a workload that is shipped from this host, effective within a second and
without a new connection. It survives restarts and stands above limits.bandwidth_bytes_per_second of
the configuration until --reset. A handover that converges or drains is never limited.
"""
MIN_BYTES_PER_SECOND = 64 << 10
_UNITS = {"": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def rate(text: str) -> int:
    """Bytes per second of ``20MiB``, ``1.5GB`` or a plain number.

    Raises:
        argparse.ArgumentTypeError: it is none, or so low that nothing would ever be in step.
    """
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([A-Za-z]*)(?:/s)?", text.strip())
    unit = _UNITS.get(found.group(2).upper()) if found else None
    if found is None or unit is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no rate: a number with KiB, MiB or GiB, in bytes per second")
    value = int(float(found.group(1)) * unit)
    if value < MIN_BYTES_PER_SECOND:
        raise argparse.ArgumentTypeError(f"{text!r} is below 64KiB a second; to stop shipping: bmigrate pause")
    return value


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Arguments of ``limit``."""
    parser = shared.add_command(subparsers, "limit", "how fast a workload may be shipped, from now on", DESCRIPTION)
    shared.add_workload(parser)
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--bandwidth", type=rate, metavar="RATE", help="bytes per second, as 20MiB; at least 64KiB")
    how.add_argument("--unlimited", action="store_true", help="no limit, whatever the configuration says")
    how.add_argument("--reset", action="store_true", help="what the configuration says")
    shared.add_json(parser)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    wanted = None if arguments.reset else 0 if arguments.unlimited else arguments.bandwidth
    answer = rpc.call(paths.ship_socket(), "limit", workload=arguments.workload, bandwidth_bytes_per_second=wanted)
    limit = int(answer["bandwidth_bytes_per_second"])
    said = f"{limit} bytes per second" if limit else "no limit"
    where = "as configured" if answer["bandwidth_source"] == "config" else "set here; --reset takes it back"
    text = f"workload {arguments.workload}: {said} ({where})"
    data = {key: answer[key] for key in ("bandwidth_bytes_per_second", "bandwidth_source")}
    changed = bool(answer["changed"])
    output.emit(data, changed=changed, workload=arguments.workload, as_json=arguments.json, text=text)
    return 0
