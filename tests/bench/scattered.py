# SPDX-License-Identifier: GPL-3.0-or-later
"""How fast blocks are shipped that lie scattered: every fourth block of 4 KiB, each a read here and a write there.

Native, with the processes and the sshd of shipping.py; files on a disk, read and written past the cache, because a disk
takes its time for each request and takes many at once, which memory does not. In alternating rounds with the same
programs told to do one block after the other; a ratio is the rate over that of the same round. Each round compares the
replica byte by byte. Both ends have the same disk here.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.bench import command
from tests.bench.figures import spread
from tests.bench.shipping import MIB, Bench

BLOCK = 4096
APART = 4
ONE_AT_A_TIME = "import math; from bmigrate.common import scatter; scatter.WORTH_SECONDS = math.inf; "


def seconds(bench: Bench, mark: Path, one_at_a_time: bool) -> float:
    """Write the blocks anew, and ship them."""
    blocks = [[offset, BLOCK] for offset in range(0, bench.size, APART * BLOCK)]
    with open(bench.world.source(), "r+b") as stream:
        for offset, length in blocks:
            stream.seek(offset)
            stream.write(os.urandom(length))
        stream.flush()
        os.fsync(stream.fileno())
    bench.world.prelude = ONE_AT_A_TIME if one_at_a_time else ""
    mark.unlink(missing_ok=True)
    if one_at_a_time:
        mark.touch()
    return bench.shipped(blocks)


def measure(directory: Path, size: int, rounds: int) -> dict[str, Any]:
    """Alternating rounds; the first of each is not counted."""
    mark = directory / "one-at-a-time"
    before = f"if [ -e {mark} ]; then export BMIGRATE_TEST_ONE_AT_A_TIME=1; fi"
    found: dict[bool, list[float]] = {False: [], True: []}
    with pytest.MonkeyPatch.context() as monkeypatch:
        bench = Bench(directory, size, "random", monkeypatch, "", None, before)
        try:
            bench.shipped()
            for number in range(rounds + 1):
                for one_at_a_time in (False, True) if number % 2 else (True, False):
                    took = seconds(bench, mark, one_at_a_time)
                    if number:
                        found[one_at_a_time].append(took)
        finally:
            bench.close()
    shipped = size // APART
    return {
        "size_bytes": size,
        "bytes_per_second": [shipped / took for took in found[False]],
        "one_at_a_time_bytes_per_second": [shipped / took for took in found[True]],
        "ratios": [one / many for one, many in zip(found[True], found[False])],
    }


def _lines(result: dict[str, Any]) -> Iterator[str]:
    for name in ("bytes_per_second", "one_at_a_time_bytes_per_second"):
        yield f"{name}: {' '.join(f'{rate / MIB:.1f}' for rate in result[name])} MiB/s"
    yield f"several at a time / one at a time: {spread(result['ratios'])}"


def main() -> int:
    """Command line."""
    parser = command.parser("scattered", __doc__, rounds=5, mib=1024)
    parser.add_argument("--disk", help="directory on the disk to measure on (%(default)s)", default="/var/tmp")
    arguments = command.parse(parser)
    with command.scratch(arguments.disk) as directory:
        result = measure(directory, arguments.mib * MIB, arguments.rounds)
    return command.tell(arguments.json, result, _lines(result))


if __name__ == "__main__":
    sys.exit(main())
