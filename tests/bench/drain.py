# SPDX-License-Identifier: GPL-3.0-or-later
"""How long a drain takes with so much left: from its first barrier to the last durable acknowledgement.

Native, with the processes and the sshd of shipping.py, all of them resident, on an idle link. The bound is 300 ms and
the bytes left at the rate of the link, which is that of ``dd | ssh dd``, measured in the same session.
What is left is recorded and not consumed before the drain asks for its barrier, so that nothing is shipped ahead of it.
The proof that follows, every piece read back from the standby's device, is part of the downtime and shown apart.
"""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bmigrate.common import paths, rpc
from lab.waiting import wait
from tests.bench import command
from tests.bench.shipping import MIB, Bench

LEFT_MIB = (0, 1, 16, 64)
FIXED_SECONDS = 0.3


def one(bench: Bench, left: int, run_id: str) -> dict[str, float]:
    """One drain with ``left`` bytes."""
    world = bench.world
    world.breqd.hold_log.set()
    for offset in range(0, left, MIB):
        world.write(offset, os.urandom(MIB))
    answer = rpc.call(paths.ship_socket(), "drain", 120.0, workload="wl", run_id=run_id)
    if answer["bytes_left_at_start"] != left or answer["bytes_shipped"] != left:
        raise SystemExit(f"meant to drain {left} bytes: {answer}")
    world.check_equal()
    world.breqd.hold_log.clear()
    rpc.call(paths.ship_socket(), "unseal", 30.0, workload="wl")
    bench.until("in_step")
    return {
        "durable_seconds": answer["seconds"] - answer["reread_seconds"],
        "proved_seconds": answer["seconds"],
        "barrier_seconds": answer["barrier_seconds"],
    }


def measure(directory: Path, rounds: int) -> list[dict[str, object]]:
    """All amounts, in rounds that go through all of them."""
    size = 96 * MIB
    with pytest.MonkeyPatch.context() as monkeypatch:
        bench = Bench(directory, size, "random", monkeypatch, "")
        try:
            process = bench.start()
            rates = [size / bench.bare() for _ in range(3)]
            found: dict[int, list[dict[str, float]]] = {left: [] for left in LEFT_MIB}
            for number in range(rounds):
                for left in LEFT_MIB:
                    found[left].append(one(bench, left * MIB, f"run-{number}-{left}"))
            process.terminate()
            wait(lambda: process.poll() is not None, 60, "the shipper to end")
        finally:
            bench.close()
    rate = statistics.median(rates)
    return [
        {
            "left_bytes": left * MIB,
            "link_bytes_per_second": rate,
            "bound_seconds": FIXED_SECONDS + left * MIB / rate,
            **{name: [run[name] for run in runs] for name in runs[0]},
        }
        for left, runs in found.items()
    ]


def _lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    for row in rows:
        durable, bound = row["durable_seconds"], row["bound_seconds"]
        middle = statistics.median(durable)
        yield (
            f"{row['left_bytes'] >> 20:3} MiB left: durable after median {middle:.3f} s "
            f"({min(durable):.3f} to {max(durable):.3f}), {middle / bound:.2f} of the bound of {bound:.3f} s; "
            f"proved after median {statistics.median(row['proved_seconds']):.3f} s"
        )


def main() -> int:
    """Command line."""
    arguments = command.parse(command.parser("drain", __doc__, rounds=7, of="drains of each amount"))
    with command.scratch() as directory:
        rows = measure(directory, arguments.rounds)
    return command.tell(arguments.json, rows, _lines(rows))


if __name__ == "__main__":
    sys.exit(main())
