# SPDX-License-Identifier: GPL-3.0-or-later
"""How fast two hosts compare a volume: a verify, and a resync of a suspect volume of which little differs.

Native, with the processes and the sshd of shipping.py. The bound is the lower of two speeds, measured in the same
session: reading the volume from one end to the other as both sides read it, and the hash itself (BLAKE2b, 128 bits) on
the two cores that the two ends have here, where each byte is hashed twice, once on each side.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from bmigrate.common import blockdev, paths, rpc
from lab.waiting import wait
from tests.bench.figures import spread
from tests.bench.shipping import MIB, Bench

GRANULE = 4096


def _hash(seconds: float) -> float:
    """Bytes per second of one process that hashes pieces of 1 MiB."""
    data, done, began = os.urandom(MIB), 0, time.monotonic()
    while time.monotonic() - began < seconds:
        hashlib.blake2b(data, digest_size=16).digest()
        done += MIB
    return done / (time.monotonic() - began)


def hash_speed(pool: Any) -> float:
    """Bytes of a volume per second, each hashed on both ends at once: the mean of two processes side by side."""
    return sum(pool.map(_hash, [1.0, 1.0])) / 2


def read_speed(path: Path) -> float:
    """Bytes per second of reading it in order, 1 MiB at a time, past the cache as the data path does."""
    fd = blockdev.open_direct(path)
    try:
        size = os.fstat(fd).st_size
        reader = blockdev.DirectReader(fd, MIB)
        began = time.monotonic()
        for offset in range(0, size, MIB):
            reader.read(offset, MIB)
        return size / (time.monotonic() - began)
    finally:
        os.close(fd)


def verify(bench: Bench) -> float:
    """Bytes per second of an on-line verify."""
    began = time.monotonic()
    answer = rpc.call(paths.ship_socket(), "verify", 600.0, workload="wl")
    if answer["different_bytes"] or answer["compared_bytes"] != bench.size:
        raise SystemExit(f"the verify found what is not there: {answer}")
    return bench.size / (time.monotonic() - began)


def resync(bench: Bench, differ: float) -> float:
    """Bytes per second of a resync of which a share of the granules differs."""
    world = bench.world
    blocks = world.random.sample(range(bench.size // GRANULE), int(differ * bench.size / GRANULE))
    fd = os.open(world.source(), os.O_WRONLY)
    try:
        for block in blocks:
            os.pwrite(fd, os.urandom(GRANULE), block * GRANULE)
    finally:
        os.close(fd)
    record = world.breqd.items["wl", "data"].record
    began = time.monotonic()
    world.breqd._op_suspect({"workload": "wl", "volume": "data", "reason": "benchmark"})
    # An idle shipper looks once a second; it is woken, so that the comparison is what is measured.
    rpc.call(paths.ship_socket(), "reload", 30.0)
    wait(lambda: record.suspect is None, 600, "the end of the resync", 0.005)
    seconds = time.monotonic() - began
    bench.until("in_step")
    world.check_equal()
    return bench.size / seconds


def measure(directory: Path, size: int, rounds: int) -> dict[str, Any]:
    """All, in alternating rounds."""
    found: dict[str, list[float]] = {
        name: [] for name in ("read", "hash", "verify", "resync_equal", "resync_1_percent")
    }
    with pytest.MonkeyPatch.context() as monkeypatch, multiprocessing.get_context("spawn").Pool(2) as pool:
        pool.map(_hash, [0.01, 0.01])
        bench = Bench(directory, size, "random", monkeypatch, "")
        try:
            process = bench.start()
            verify(bench)
            for _ in range(rounds):
                found["read"].append(read_speed(bench.world.source()))
                found["hash"].append(hash_speed(pool))
                found["verify"].append(verify(bench))
                found["resync_equal"].append(resync(bench, 0.0))
                found["resync_1_percent"].append(resync(bench, 0.01))
            process.terminate()
            process.wait()
        finally:
            bench.close()
    bound = [min(pair) for pair in zip(found["read"], found["hash"])]
    ratios = {
        name: [one / other for one, other in zip(found[name], bound)] for name in found if name[0] in "v" or "_" in name
    }
    return {"size_bytes": size, "bytes_per_second": found, "ratios": ratios}


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python3 -m tests.bench.resync", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="of everything (%(default)s)")
    parser.add_argument("--mib", type=int, default=1024, help="size of the volume in MiB (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    if arguments.rounds < 2:
        parser.error("at least 2 rounds")
    directory = Path(tempfile.mkdtemp(prefix="bmigrate-bench-", dir="/dev/shm"))
    try:
        result = measure(directory, arguments.mib * MIB, arguments.rounds)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    if arguments.json:
        print(json.dumps(result))
        return 0
    for name, rates in result["bytes_per_second"].items():
        print(f"{name}: {' '.join(f'{rate / MIB:.0f}' for rate in rates)} MiB/s")
    for name, ratios in result["ratios"].items():
        print(f"{name} / the lower of read and hash: {spread(ratios)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
