# SPDX-License-Identifier: GPL-3.0-or-later
"""How fast two hosts compare a volume: a verify, and a resync of a suspect volume of which little differs.

Native, with the processes and the sshd of shipping.py. What it is held against is the lower of two speeds, measured
right before each run: reading the volume from one end to the other, and the hash of the session itself on the two
cores that the two ends have here, where each byte is hashed twice, once on each side.

In three places, because each shows something else:

- On two disks of a known speed: files on a file system, read past the cache, and a limit on how much each end may
  read per second, so that each has a disk of its own whose speed does not vary (readlimit.py). The bound is what one
  reader gets under that limit, or the hash, whichever is lower. This is the one that is judged.
- On a disk as it is. Both ends have the same disk here, so the read speed is that
  of two readers side by side, the source's file and the replica's; the slower counts. The source reads in the idle
  class, and so does the receiver here: else a scheduler that honours it would serve one end before the other, as two
  disks would not. The ratio against one reader that
  has the disk to itself, which is what two hosts with a disk each would have, is printed too.
- In memory. There a read is a copy by the same two cores that hash, and takes from the hash what a disk would not. The
  ratio against the hash alone is printed, and one against what cannot be saved: two processes, one for each end, that
  do nothing but read and hash every byte once.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bmigrate.common import blockdev, paths, rpc
from bmigrate.wire import hashing
from lab.waiting import wait
from tests.bench import command
from tests.bench.figures import spread
from tests.bench.readlimit import ReadLimit
from tests.bench.shipping import MIB, Bench

GRANULE = 4096
PLACES = {"limited": "/var/tmp", "disk": "/var/tmp", "memory": command.MEMORY}
LIMIT_BYTES_PER_SECOND = 160 * MIB
SIZES_MIB = {"limited": 512, "disk": 1024, "memory": 2048}
BOUNDS = {
    "side_by_side": ("read", "hash"),
    "alone": ("read_alone", "hash"),
    "work": ("work",),
}
"""What a rate is held against: the lowest of these."""


def _hash(name: str, seconds: float) -> float:
    """Bytes per second of one process that hashes pieces of 1 MiB."""
    data, done, began = os.urandom(MIB), 0, time.monotonic()
    while time.monotonic() - began < seconds:
        hashing.digests(name, data, MIB)
        done += MIB
    return done / (time.monotonic() - began)


def _read(path: Path, name: str | None = None) -> float:
    """Bytes per second of reading it in order, 1 MiB at a time, past the cache as the data path does.

    Args:
        name: of a hash: each piece is hashed too.
    """
    fd = blockdev.open_direct(path)
    try:
        size = os.fstat(fd).st_size
        reader = blockdev.DirectReader(fd, MIB)
        began = time.monotonic()
        for offset in range(0, size, MIB):
            data = reader.read(offset, MIB)
            if name:
                hashing.digests(name, data, MIB)
        return size / (time.monotonic() - began)
    finally:
        os.close(fd)


def _read_limited(path: Path, limit: ReadLimit) -> float:
    """The same under a limit."""
    limit.enter(os.getpid())
    try:
        return _read(path)
    finally:
        limit.leave(os.getpid())


def bounds(pool: Any, bench: Bench, name: str) -> dict[str, float]:
    """Bytes of the volume per second that both ends could read, hash, or read and hash, beside each other."""
    ends = (bench.world.source(), bench.world.replica())
    return {
        "read": min(pool.map(_read, ends, 1)),
        "read_alone": _read(ends[0]),
        "hash": sum(pool.starmap(_hash, [(name, 0.5)] * 2, 1)) / 2,
        "work": min(pool.starmap(_read, [(end, name) for end in ends], 1)),
    }


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


def measure(directory: Path, size: int, rounds: int, force: str, limited: bool) -> dict[str, Any]:
    """All in one place, in alternating rounds; the bounds are measured before each run.

    Args:
        force: a hash that the receiver finds faster whatever it measures, or "". limited: a disk of its own for each.
    """
    if not limited:
        return _measure(directory, size, rounds, force, None)
    limits = [ReadLimit(name, directory, LIMIT_BYTES_PER_SECOND) for name in ("source", "standby")]
    try:
        return _measure(directory, size, rounds, force, limits)
    finally:
        for limit in limits:
            limit.close()


def _measure(directory: Path, size: int, rounds: int, force: str, limits: list[ReadLimit] | None) -> dict[str, Any]:
    runs = {
        "verify": verify,
        "resync_equal": lambda bench: resync(bench, 0.0),
        "resync_1_percent": lambda bench: resync(bench, 0.01),
    }
    found: dict[str, list[float]] = {}
    held_against = BOUNDS if limits is None else {"alone": BOUNDS["alone"]}
    ratios: dict[str, dict[str, list[float]]] = {bound: {name: [] for name in runs} for bound in held_against}
    before = "ionice -c 3 -p $$" if limits is None else f"echo $$ > {limits[1].procs}"
    name = force or hashing.preferred()
    with pytest.MonkeyPatch.context() as monkeypatch, multiprocessing.get_context("spawn").Pool(2) as pool:
        forced = {"BMIGRATE_TEST_HASH": force} if force else {}
        bench = Bench(directory, size, "random", monkeypatch, "", forced, before)
        try:
            process = bench.start()
            if limits is not None:
                limits[0].enter(process.pid)
            verify(bench)
            for _ in range(rounds):
                for what, run in runs.items():
                    if limits is None:
                        bound = bounds(pool, bench, name)
                    else:
                        bound = {
                            "read_alone": pool.apply(_read_limited, (bench.world.source(), limits[0])),
                            "hash": sum(pool.starmap(_hash, [(name, 0.5)] * 2, 1)) / 2,
                        }
                    rate = run(bench)
                    for key, value in (*bound.items(), (what, rate)):
                        found.setdefault(key, []).append(value)
                    for key, parts in held_against.items():
                        ratios[key][what].append(rate / min(bound[part] for part in parts))
            process.terminate()
            process.wait()
        finally:
            bench.close()
    return {"hash": name, "size_bytes": size, "bytes_per_second": found, "ratios": ratios}


def _lines(result: dict[str, Any]) -> Iterator[str]:
    for place, found in result.items():
        yield f"{place}, compared by {found['hash']}:"
        for name, rates in found["bytes_per_second"].items():
            yield f"  {name}: {' '.join(f'{rate / MIB:.0f}' for rate in rates)} MiB/s"
        for bound, measured in found["ratios"].items():
            for name, ratios in measured.items():
                yield f"  {name} / {' or '.join(BOUNDS[bound])}: {spread(ratios)}"


def main() -> int:
    """Command line."""
    parser = command.parser("resync", __doc__, rounds=5, of="of everything")
    parser.add_argument("--mib", type=int, help=f"size of the volume in MiB ({SIZES_MIB})")
    parser.add_argument("--place", choices=sorted(PLACES), action="append", help="only this one; may be repeated")
    parser.add_argument("--disk", help="directory on the disk to measure on (%(default)s)", default=PLACES["disk"])
    parser.add_argument("--hash", choices=hashing.NAMES, default="", help="compare by this one (the faster one)")
    arguments = command.parse(parser)
    result = {}
    for place, root in {**PLACES, "disk": arguments.disk, "limited": arguments.disk}.items():
        if arguments.place and place not in arguments.place:
            continue
        with command.scratch(root) as directory:
            size = (arguments.mib or SIZES_MIB[place]) * MIB
            result[place] = measure(directory, size, arguments.rounds, arguments.hash, place == "limited")
    return command.tell(arguments.json, result, _lines(result))


if __name__ == "__main__":
    sys.exit(main())
