# SPDX-License-Identifier: GPL-3.0-or-later
"""bmigrate: the command line. Finds the sub-command, imports only that one, runs it.

Promise: one JSON object on stdout with --json, the documented exit codes, errors with what to do
next. A sub-command is a module with ``add_parser(subparsers) -> parser`` and ``run(arguments) -> int``;
nothing is imported for those that are not used, because start-up time is downtime.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from bmigrate import __version__
from bmigrate.common import errors, output
from bmigrate.common.errors import UsageError

#: name -> (module in bmigrate.cli, one line of help)
COMMANDS: dict[str, tuple[str, str]] = {
    "status": ("status", "what every workload of this host is doing, live with --watch"),
    "sync": ("sync", "wait until the standby is in step, with progress"),
    "verify": ("verify", "compare every block of a workload on both hosts by checksum"),
    "handover": ("handover", "one step of moving a workload to the other host"),
    "init": ("init", "make this host the first primary of a workload"),
    "adopt": ("adopt", "make this host the standby of a workload"),
    "units": ("units", "write the mount units and service drop-ins of a workload"),
    "pause": ("pause", "stop shipping a workload for a while; tracking goes on"),
    "resume": ("resume", "go on shipping a workload that was paused"),
    "limit": ("limit", "how fast a workload may be shipped, from now on"),
    "metrics": ("metrics", "serve metrics for Prometheus (bmigrate-metrics.service)"),
    "ship": ("ship", "the shipping daemon (bmigrate-ship.service)"),
    "boot": ("boot", "start at boot what this host's role allows (bmigrate-boot.service)"),
    "early": ("early", "take the clean flags away before any mount (bmigrate-early.service)"),
    "shutdown": ("shutdown", "close the volumes cleanly at poweroff (bmigrate-shutdown.service)"),
}

DESCRIPTION = """\
Moves a running service, with the block devices under it, from this host to another one: every write
is tracked from the start, shipped in the background, and handed over in seconds.

A WORKLOAD is what moves as one: volumes (block devices with the same role on two hosts), their
mounts and services, as written in /etc/bmigrate/WORKLOAD.yml. One host is its PRIMARY and runs it,
the other its STANDBY and holds the replica. Who is which is a state of the hosts:
/var/lib/bmigrate/WORKLOAD/state.json, never a setting.
"""

EPILOG = """\
a workload's life, as the playbooks drive it:
  install.yml   puts these programs, the kernel module and the units on both hosts
  sync.yml      init on the first primary, adopt on the standby, then ships until in step
  status.yml    one table of all workloads; on a host: bmigrate status --watch
  failover.yml  the steps of `bmigrate handover`, in order, on both hosts

look first:
  bmigrate status                                  what is going on, and what limits it
  bmigrate handover discover --workload W --json   this host's role, generation and open handover
  bmigrate handover preflight --workload W         what stands in the way, and the predicted downtime

daemons: breqd tracks (breqd.service), bmigrate-hold keeps replicas exclusive (bmigrate-hold.service),
bmigrate ship sends (bmigrate-ship.service), breceive is started by ssh on the standby.

`bmigrate COMMAND --help` explains a command. With --json stdout is one object:
{schema, ok, changed, workload, data, error: {code, reason, message, volume, host, hint}}.

"""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are ours: same envelope, same exit code, with a hint."""

    def error(self, message: str) -> NoReturn:
        """Raise a UsageError in place of leaving the process."""
        raise UsageError(f"{self.prog}: {message}", hint=f"see: {self.prog} --help", reason="usage")


def build_parser(command: str | None) -> Parser:
    """The parser, with the arguments of one sub-command filled in.

    Args:
        command: the sub-command that is going to run; the others appear with their line of help only.
    """
    parser = Parser(
        prog="bmigrate",
        description=DESCRIPTION,
        epilog=EPILOG + errors.exit_code_table(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"bmigrate {__version__}")
    sub = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, (module, text) in COMMANDS.items():
        if name == command:
            loaded = importlib.import_module(f"bmigrate.cli.{module}")
            child = loaded.add_parser(sub)
            child.set_defaults(run=loaded.run)
            if not child.epilog:
                child.epilog = errors.exit_code_table()
                child.formatter_class = argparse.RawDescriptionHelpFormatter
        else:
            sub.add_parser(name, help=text, add_help=False)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (see ``errors.EXIT_CODES``)."""
    words: list[str] = list(sys.argv[1:] if argv is None else argv)
    command = next((word for word in words if not word.startswith("-")), None)

    def body() -> int:
        parser = build_parser(command if command in COMMANDS else None)
        arguments = parser.parse_args(words)
        if arguments.command is None:
            parser.print_help(sys.stderr)
            return UsageError.exit_code
        return int(arguments.run(arguments))

    return output.run_main(body, as_json="--json" in words, workload=_workload(words))


def _workload(words: Sequence[str]) -> str | None:
    """The workload that the command line names, for errors from before it is parsed."""
    for index, word in enumerate(words):
        if word == "--workload":
            return words[index + 1] if index + 1 < len(words) else None
        if word.startswith("--workload="):
            return word[len("--workload=") :]
    return None
