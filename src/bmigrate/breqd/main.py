# SPDX-License-Identifier: GPL-3.0-or-later
"""The command line of breqd: run the daemon, or print what a running one says."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from bmigrate import __version__
from bmigrate.common import errors, log, output, paths, rpc

_DESCRIPTION = """\
breqd keeps, for every volume of a workload that is primary on this host, a bitmap
file of the blocks that may differ from the replica. The kernel module reqlog tells
it of each completed write; 'bmigrate ship' claims dirty blocks from it over
/run/bmigrate/breqd.sock, ships them, and hands back acknowledgements.

It runs under systemd (breqd.service), before the volumes are mounted. Killing or
restarting it loses nothing: volumes stay attached in the kernel, and records that
were not consumed come again. Stopping it never ends the tracking.
"""

_EPILOG = """\
examples:
  systemctl status breqd             is it up, how many volumes, how many suspect
  breqd status                       one line per volume
  breqd status --json                the same for machines
  breqd selftest                     are writes really seen? (passive, harmless)
  journalctl -u breqd                why a volume is suspect or not tracked

files:
  /etc/bmigrate/WORKLOAD.yml                       volumes, granule, bitmap_directory
  /var/lib/bmigrate/WORKLOAD/VOLUME.bitmap         the map (docs/on-disk.md)
  /var/lib/bmigrate/WORKLOAD/VOLUME.track.json     attachment, suspicion, counters
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="breqd",
        description=_DESCRIPTION,
        epilog=_EPILOG + "\n" + errors.exit_code_table(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"breqd {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    run = commands.add_parser("run", help="run the daemon in the foreground (what breqd.service does)")
    run.add_argument("--verbose", action="store_true", help="log more")
    test = commands.add_parser(
        "selftest",
        help="prove that writes are seen",
        description="Flush each tracked volume and compare what the kernel counted for the device with what it "
        "recorded for us. Exit code 0: proven. 3: no write could be compared yet. 5: the tracker is blind, "
        "and the volume is suspect from now on.",
    )
    test.add_argument("--workload", metavar="NAME", help="only this workload (default: all)")
    test.add_argument(
        "--active",
        action="store_true",
        help="write the last block of each volume back as it was read; refused unless nobody else has the device",
    )
    test.add_argument("--json", action="store_true", help="one JSON object on stdout")
    status = commands.add_parser("status", help="ask the running daemon")
    status.add_argument("--workload", metavar="NAME", help="only this workload (default: all)")
    status.add_argument("--json", action="store_true", help="one JSON object on stdout")
    return parser


def _run(verbose: bool) -> int:
    from bmigrate.breqd import loop  # NumPy: only where the maps are

    log.setup("breqd", verbose)
    with loop.only_one(paths.run()):
        return loop.Daemon().run()


def _status(workload: str | None, as_json: bool) -> int:
    with rpc.Client(paths.breqd_socket()) as client:
        answer = client.call("status", **({} if workload is None else {"workload": workload}))
    data = {key: value for key, value in answer.items() if key not in ("v", "id", "ok")}
    output.emit(data, workload=workload, as_json=as_json, text=_table(data))
    return 0


def _table(data: dict[str, Any]) -> str:
    lines = []
    if data.get("kernel_problem"):
        lines.append(f"NOT TRACKING: {data['kernel_problem']['message']} -- {data['kernel_problem']['hint']}")
    for item in data["volumes"]:
        if not item["attached"]:
            state = item["suspect"] or "not tracked"
        else:
            state = f"SUSPECT: {item['suspect']}" if item["suspect"] else "tracked"
            state += f", self test: {item['self_test']['state']}"
        lines.append(
            f"{item['workload']}/{item['volume']}  dirty {item['dirty_bytes']} B  claimed {item['claimed_bytes']} B  "
            f"oldest {item['oldest_dirty_age_seconds']:.1f} s  {state}"
        )
    return "\n".join(lines) or "no volume is configured on this host"


def main(arguments: Sequence[str]) -> int:
    """Run breqd; returns the exit code.

    Args:
        arguments: without the program's name.
    """
    parsed = _parser().parse_args(list(arguments))
    as_json = bool(getattr(parsed, "json", False))
    if parsed.command == "status":
        return output.run_main(lambda: _status(parsed.workload, as_json), as_json=as_json, workload=parsed.workload)
    if parsed.command == "selftest":
        from bmigrate.breqd import selftest_command

        return output.run_main(
            lambda: selftest_command.run(parsed.workload, parsed.active, as_json),
            as_json=as_json,
            workload=parsed.workload,
        )
    return output.run_main(lambda: _run(bool(getattr(parsed, "verbose", False))), as_json=False)
