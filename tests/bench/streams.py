# SPDX-License-Identifier: GPL-3.0-or-later
"""What several streams bring a seed: 1, 2 and 4 ssh connections of one session, on two kinds of link.

Native, with the processes and the sshd of shipping.py, random data. On the loopback as it is, one connection is limited
by the core that encrypts it. On a link with delay it is limited by its window: an ssh channel has two MiB under way at
most, whatever TCP would allow. This machine's kernel may lack netem, so a relay between ssh and sshd makes the delay
(relay.py), a fixed one in each direction; it knows no loss, no queue and no congestion, and leaves TCP's own windows
out of it. In alternating rounds; each round compares the replica byte by byte. A ratio is the seed's rate
with that many streams over the rate with one in the same round.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.bench import command
from tests.bench.figures import spread
from tests.bench.shipping import MIB, Bench

STREAMS = (1, 2, 4)
DELAY_SECONDS = 0.02


@contextmanager
def relay(port: int, delay_seconds: float) -> Iterator[int]:
    """A port that leads to that one with a delay."""
    argv = [sys.executable, "-m", "tests.bench.relay", str(delay_seconds), str(port)]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield int(process.stdout.readline())
    finally:
        process.kill()
        process.communicate()


def seeds(bench: Bench, rounds: int) -> dict[int, list[float]]:
    """Seconds of a seed for each number of streams, round by round; the first round of all is not counted."""
    found: dict[int, list[float]] = {count: [] for count in STREAMS}
    for number in range(rounds + 1):
        turn = number % len(STREAMS)
        for count in STREAMS[turn:] + STREAMS[:turn]:
            bench.extra = f"streams: {count}\n"
            seconds = bench.shipped()
            if number:
                found[count].append(seconds)
    return found


def measure(directory: Path, size: int, delayed_size: int, rounds: int, delay_seconds: float) -> dict[str, Any]:
    """Both links."""
    cases = {}
    for name, size_, delay in (("loopback", size, 0.0), ("delay", delayed_size, delay_seconds)):
        where = directory / name
        where.mkdir()
        with pytest.MonkeyPatch.context() as monkeypatch:
            bench = Bench(where, size_, "random", monkeypatch, "")
            try:
                if delay:
                    with relay(bench.server.port, delay) as bench.port:
                        seconds = seeds(bench, rounds)
                else:
                    seconds = seeds(bench, rounds)
            finally:
                bench.close()
        shutil.rmtree(where)
        cases[name] = {
            "size_bytes": size_,
            "delay_seconds": delay,
            "bytes_per_second": {str(count): [size_ / value for value in seconds[count]] for count in STREAMS},
            "ratios": {
                str(count): [one / many for one, many in zip(seconds[1], seconds[count])] for count in STREAMS[1:]
            },
        }
    return cases


def _lines(result: dict[str, Any]) -> Iterator[str]:
    for name, case in result.items():
        yield f"{name}, {1000 * case['delay_seconds']:.0f} ms each direction:"
        for count, rates in case["bytes_per_second"].items():
            ratio = f"; over one: {spread(case['ratios'][count])}" if count in case["ratios"] else ""
            yield f"  streams {count}: {' '.join(f'{rate / MIB:.0f}' for rate in rates)} MiB/s{ratio}"


def main() -> int:
    """Command line."""
    parser = command.parser("streams", __doc__, rounds=4, mib=1024, of="of each number of streams")
    parser.add_argument("--delayed-mib", type=int, default=512, help="the same on the link with delay (%(default)s)")
    parser.add_argument("--delay", type=float, default=DELAY_SECONDS, help="seconds, each direction (%(default)s)")
    arguments = command.parse(parser)
    with command.scratch() as directory:
        sizes = arguments.mib * MIB, arguments.delayed_mib * MIB
        result = measure(directory, *sizes, arguments.rounds, arguments.delay)
    return command.tell(arguments.json, result, _lines(result))


if __name__ == "__main__":
    sys.exit(main())
