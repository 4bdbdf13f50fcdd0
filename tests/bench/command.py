# SPDX-License-Identifier: GPL-3.0-or-later
"""What the command lines of the benchmarks share: how often, of what size, on which disk, for people or as JSON."""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

#: In memory: what is measured there is not the disk of this machine.
MEMORY = "/dev/shm"


def parser(
    name: str, text: str | None, rounds: int, mib: int | None = None, of: str = "of each"
) -> argparse.ArgumentParser:
    """The parser of ``python3 -m tests.bench.NAME``, with --rounds, --json, and --mib where a size in MiB is given.

    Args:
        text: the benchmark's docstring. of: what there are so many rounds of.
    """
    made = argparse.ArgumentParser(prog=f"python3 -m tests.bench.{name}", description=text)
    made.add_argument("--rounds", type=int, default=rounds, help=f"{of} (%(default)s)")
    if mib is not None:
        made.add_argument("--mib", type=int, default=mib, help="size of the volume in MiB (%(default)s)")
    made.add_argument("--json", action="store_true", help="print the result as JSON")
    return made


def parse(made: argparse.ArgumentParser, least: int = 2) -> argparse.Namespace:
    """What was asked for; fewer rounds than `least` end the process with a word to the user: they show no spread."""
    arguments = made.parse_args()
    if arguments.rounds < least:
        made.error(f"--rounds: at least {least}")
    return arguments


@contextmanager
def scratch(root: str = MEMORY) -> Iterator[Path]:
    """A directory to measure in, gone afterwards."""
    directory = Path(tempfile.mkdtemp(prefix="bmigrate-bench-", dir=root))
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def tell(as_json: bool, result: object, lines: Iterable[str]) -> int:
    """Print the result, as JSON or by its lines; returns the exit status."""
    for line in [json.dumps(result)] if as_json else lines:
        print(line)
    return 0
