# SPDX-License-Identifier: GPL-3.0-or-later
"""How much so many passes ship while the volume is written to, and what they leave for the drain.

Native, as in shipping.py: a writer of random 4 KiB blocks at a fixed ratio to the ship rate, which the bandwidth limit
holds. The model is that of passes over a bitmap taken at once: of d(0) = 1 the next pass finds d(k+1) = 1 - e^(-r d(k))
dirty, r being the ratio. A walk that claims piece by piece ships less than it: a block that is written before the
walk has come to it is shipped once in that pass, not again in the next; that walk is simulated beside the model.
"""

from __future__ import annotations

import math
import os
import random
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bmigrate.common import paths, rpc
from lab.waiting import wait
from tests.bench import command
from tests.bench.shipping import MIB, Bench

RATIOS = (0.25, 0.5, 0.75)
BLOCK = 4096
RATE = 16 * MIB
MAX_DRAIN_SECONDS = 0.001
PASSES = 6


def model(ratio: float, passes: int) -> tuple[float, float]:
    """What so many passes ship in all, and what they leave, in volumes: each pass over a bitmap taken at its begin."""
    share, total = 1.0, 0.0
    for _ in range(passes):
        total, share = total + share, 1 - math.exp(-ratio * share)
    return total, share


def model_curve(ratio: float, passes: int, steps: int = 16) -> list[tuple[float, float]]:
    """(shipped, left) in volumes, while so many passes of the model go on.

    The bitmap of a pass is taken at its begin: what the pass has not come to yet is left, and what was written since.
    """
    points, total, share = [], 0.0, 1.0
    for _ in range(passes):
        for step in range(steps):
            part = share * step / steps
            points.append((total + part, share - part + 1 - math.exp(-ratio * part)))
        total, share = total + share, 1 - math.exp(-ratio * share)
    points.append((total, share))
    return points


def walk(ratio: float, passes: int, blocks: int = 1 << 14) -> tuple[float, float]:
    """The same for a walk that takes each block as it comes to it, by simulation."""
    place = random.Random(2)
    dirty = bytearray(b"\x01") * blocks
    shipped, due = 0, 0.0
    for _ in range(passes):
        at = dirty.find(1)
        while at >= 0:
            dirty[at] = 0
            shipped, due = shipped + 1, due + ratio
            while due >= 1:
                due -= 1
                dirty[place.randrange(blocks)] = 1
            at = dirty.find(1, at + 1)
    return shipped / blocks, sum(dirty) / blocks


class Writer(threading.Thread):
    """Random blocks at a rate, behind by a hundredth of a second at most when the machine has time."""

    def __init__(self, bench: Bench, bytes_per_second: float) -> None:
        super().__init__(daemon=True)
        self.written = 0
        self.seconds = 0.0
        self._bench, self._rate = bench, bytes_per_second
        self._halt = threading.Event()

    def run(self) -> None:
        """Until ``stop``."""
        place = random.Random(1)
        fd = os.open(self._bench.world.source(), os.O_WRONLY)
        data = os.urandom(1 << 20)
        began = time.monotonic()
        while not self._halt.wait(0.005):
            while self.written < self._rate * (time.monotonic() - began):
                offset = place.randrange(self._bench.size // BLOCK) * BLOCK
                start = place.randrange(len(data) - BLOCK)
                os.pwrite(fd, data[start : start + BLOCK], offset)
                self._bench.world.breqd.log.append(("data", offset, BLOCK))
                self.written += BLOCK
        self.seconds = time.monotonic() - began
        os.close(fd)

    def stop(self) -> None:
        """Stop writing."""
        self._halt.set()
        self.join()


def one(directory: Path, size: int, ratio: float, limit_seconds: float) -> dict[str, Any]:
    """PASSES under writes, then a drain."""
    extra = f"limits: {{bandwidth_bytes_per_second: {RATE}, max_drain_seconds: {MAX_DRAIN_SECONDS}}}\n"
    with pytest.MonkeyPatch.context() as monkeypatch:
        bench = Bench(directory, size, "random", monkeypatch, extra)
        try:
            bench.begin()
            writer = Writer(bench, ratio * RATE)
            began = time.monotonic()
            writer.start()
            bench.go()
            curve: list[tuple[float, int, int]] = []

            def done() -> bool:
                entry = bench.status()
                curve.append((time.monotonic() - began, entry["shipped_bytes_total"], entry["bytes_left"] or 0))
                return bool(entry["passes"] >= PASSES)

            wait(done, limit_seconds, f"{PASSES} passes", 0.02)
            entry = bench.status()
            shipped = entry["shipped_bytes_total"]
            seconds = time.monotonic() - began
            writer.stop()
            drained = rpc.call(paths.ship_socket(), "drain", 120.0, workload="wl", run_id="run")
            bench.world.check_equal()
        finally:
            bench.close()
    total, left = model(ratio, entry["passes"])
    walked, walked_left = walk(ratio, entry["passes"])
    return {
        "ratio_wanted": ratio,
        "ratio": writer.written / writer.seconds / (shipped / seconds),
        "seconds": seconds,
        "passes": entry["passes"],
        "shipped_volumes": shipped / size,
        "model_volumes": total,
        "walk_volumes": walked,
        "residual_bytes": drained["bytes_left_at_start"],
        "model_residual_bytes": left * size,
        "walk_residual_bytes": walked_left * size,
        "drain_seconds": drained["seconds"],
        "curve": curve,
        "model_curve": [(gone * size / RATE, rest * size) for gone, rest in model_curve(ratio, entry["passes"])],
    }


def _lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    for row in rows:
        yield (
            f"write rate {row['ratio_wanted']:.2f} of the limit, {row['ratio']:.2f} of what was shipped: "
            f"{row['passes']} passes in {row['seconds']:.1f} s shipped {row['shipped_volumes']:.2f} volumes "
            f"(model {row['model_volumes']:.2f}, walk {row['walk_volumes']:.2f}), "
            f"left {row['residual_bytes'] / MIB:.1f} MiB "
            f"(model {row['model_residual_bytes'] / MIB:.1f}, walk {row['walk_residual_bytes'] / MIB:.1f}), "
            f"drained in {row['drain_seconds']:.2f} s"
        )


def main() -> int:
    """Command line."""
    arguments = command.parse(command.parser("convergence", __doc__, rounds=1, mib=128, of="runs of each ratio"), 1)
    rows = []
    for _ in range(arguments.rounds):
        for ratio in RATIOS:
            with command.scratch() as directory:
                rows.append(one(directory, arguments.mib * MIB, ratio, 600.0))
    return command.tell(arguments.json, rows, _lines(rows))


if __name__ == "__main__":
    sys.exit(main())
