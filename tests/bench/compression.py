# SPDX-License-Identifier: GPL-3.0-or-later
"""That `compression: zstd` never makes a seed slower, and that it helps where the link is what limits.

Native, with the processes and the sshd of shipping.py. Two cases, each with zstd and without it in alternating rounds
over the same two hosts: random data, of which nothing can be saved, as fast as it goes; and text under a bandwidth
limit, which counts what goes over the link. Each round compares the replica byte by byte. A ratio is the rate with zstd
over the rate without it in the same round.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bmigrate.wire import packing
from tests.bench import command
from tests.bench.figures import spread
from tests.bench.shipping import MIB, Bench

LIMIT = 32 * MIB
CHOICES = ("none", "zstd")


def case(directory: Path, size: int, kind: str, limit: int, rounds: int) -> dict[str, Any]:
    """One kind of data under one limit, 0 for none; the first round is not counted."""
    directory.mkdir()
    seconds: dict[str, list[float]] = {name: [] for name in CHOICES}
    limits = f"limits: {{bandwidth_bytes_per_second: {limit}}}\n" if limit else ""
    with pytest.MonkeyPatch.context() as monkeypatch:
        bench = Bench(directory, size, kind, monkeypatch, "")
        try:
            for number in range(rounds + 1):
                for name in CHOICES if number % 2 else reversed(CHOICES):
                    bench.extra = f"compression: {name}\n{limits}"
                    taken = bench.shipped()
                    if number:
                        seconds[name].append(taken)
        finally:
            bench.close()
    shutil.rmtree(directory)
    return {
        "kind": kind,
        "size_bytes": size,
        "limit_bytes_per_second": limit,
        "bytes_per_second": {name: [size / value for value in values] for name, values in seconds.items()},
        "ratios": [off / on for on, off in zip(seconds["zstd"], seconds["none"])],
    }


def measure(directory: Path, size: int, limited_size: int, rounds: int) -> dict[str, Any]:
    """Both cases."""
    return {
        "random": case(directory / "random", size, "random", 0, rounds),
        "text": case(directory / "text", limited_size, "text", LIMIT, rounds),
    }


def _lines(result: dict[str, Any]) -> Iterator[str]:
    for found in result.values():
        limit = found["limit_bytes_per_second"]
        yield f"{found['kind']}, {f'limit {limit / MIB:.0f} MiB/s' if limit else 'no limit'}:"
        for name, rates in found["bytes_per_second"].items():
            yield f"  {name}: {' '.join(f'{rate / MIB:.0f}' for rate in rates)} MiB/s"
        yield f"  zstd / none: {spread(found['ratios'])}"


def main() -> int:
    """Command line."""
    parser = command.parser("compression", __doc__, rounds=5, mib=1024, of="with and without")
    parser.add_argument("--limited-mib", type=int, default=192, help="text under the limit, in MiB (%(default)s)")
    arguments = command.parse(parser)
    if not packing.available():
        # Both sides would ship plainly, and the ratios be those of nothing to itself.
        parser.error("python3-zstandard is not installed here")
    with command.scratch() as directory:
        result = measure(directory, arguments.mib * MIB, arguments.limited_mib * MIB, arguments.rounds)
    return command.tell(arguments.json, result, _lines(result))


if __name__ == "__main__":
    sys.exit(main())
