# SPDX-License-Identifier: GPL-3.0-or-later
"""How fast breqd takes in the kernel's log: read() to bitmap file, on one core, without a kernel under it.

The stream that /dev/bufflink/reqlog gives comes from a file in memory instead, batch by batch, through the daemon's own
reading, translation, maps and mapped bitmap files. The bare run reads the same stream and does nothing with it. Printed
are records per second, blocks per second where the records are longer, the share of a core that 100,000
requests a second would take with 1 and with 256 volumes, and the memory beside the maps.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bmigrate.breqd.bitmapfile import choose_granule
from bmigrate.breqd.records import RECORD
from bmigrate.breqd.tracker import Tracker
from bmigrate.kernel import abi
from bmigrate.kernel.channel import Channel, ChannelInfo
from tests.bench import command

TIB = 1 << 40
GRANULE = 4096
BATCH = 16384
REQUESTS_PER_SECOND = 100_000


class _Stream(Channel):
    """The channel, on a file instead of the device."""

    def __init__(self, fd: int, batch_records: int) -> None:
        self.path, self._fd = "memory", fd
        self.info = ChannelInfo(1, batch_records, 1, 1 << 16, 1 << 16)
        self._buffer = bytearray(ctypes.sizeof(abi.BatchHeader) + batch_records * abi.RECORD_BYTES)

    def _read(self, room: int) -> int | None:
        return super()._read(room) or None

    def consumed(self, seq: int) -> None:
        """The file forgets nothing."""


def stream(records: Any, batch: int) -> int:
    """A file in memory with these records in batches, as read() of the device gives them."""
    fd = os.memfd_create("records")
    with open(os.dup(fd), "wb") as out:
        for number, start in enumerate(range(0, len(records), batch)):
            part = records[start : start + batch]
            out.write(bytes(abi.BatchHeader(seq=number + 1, count=len(part))))
            out.write(part.tobytes())
    return fd


def uniform(count: int, volumes: int, size: int, longest: int, seed: int) -> Any:
    """Writes of one block, or of 1 to ``longest`` blocks, anywhere on any volume."""
    random = np.random.default_rng(seed)
    records = np.zeros(count, dtype=RECORD)
    blocks = random.integers(1, longest + 1, count) if longest > 1 else np.ones(count, dtype=np.int64)
    records["sector"] = random.integers(0, size // GRANULE - longest, count) * (GRANULE // 512)
    records["nr_sectors"] = blocks * (GRANULE // 512)
    records["slot"] = random.integers(0, volumes, count) if volumes > 1 else 0
    records["op"] = abi.OP_WRITE
    return records


def tracker(directory: Path, volumes: int, size: int, granule: int = GRANULE) -> Tracker:
    """Maps over mapped files, without bitmap headers and without a kernel."""
    made = Tracker()
    for number in range(volumes):
        length = -(-size // granule // 8)
        mirrors = []
        for kind in ("map", "failed"):
            path = directory / f"{number}.{kind}"
            with open(path, "wb") as out:
                os.posix_fallocate(out.fileno(), 0, length)
            mirrors.append(np.memmap(path, dtype=np.uint8, mode="r+", shape=(length,)))
        made.maps.add(("wl", f"v{number}"), size, granule, mirrors[0], mirrors[1], 0.0)
    for number in range(volumes):
        made.slots.put(number, 0, size, granule, made.maps.global_start(("wl", f"v{number}")))
    return made


def consume(fd: int, batch: int, apply: Callable[[Any], None]) -> float:
    """Processor seconds for the whole stream."""
    os.lseek(fd, 0, os.SEEK_SET)
    channel = _Stream(fd, batch)
    began = time.process_time()
    while True:
        got = channel.read_batch()
        if got is None:
            break
        apply(got.records)
        channel.consumed(got.seq)
    return time.process_time() - began


def rate(directory: Path, volumes: int, longest: int, count: int, rounds: int, batch: int, size: int) -> dict[str, Any]:
    """One case: records per second, marked and bare, alternating."""
    records = uniform(count, volumes, size // volumes, longest, 1)
    blocks = int(records["nr_sectors"].sum()) // (GRANULE // 512)
    made = tracker(directory, volumes, size // volumes)
    fd = stream(records, batch)
    expected = 0
    marked, bare = [], []
    for _ in range(rounds + 1):
        for key in made.maps.volumes:
            made.maps.clear_all(key)
        marked.append(consume(fd, batch, made.apply))
        bare.append(consume(fd, batch, lambda records: None))
    marked, bare = marked[1:], bare[1:]
    want = np.zeros(size // GRANULE, dtype=bool)
    start = records["slot"].astype(np.int64) * (size // volumes // GRANULE) + records["sector"].astype(np.int64) // 8
    for more in range(longest):
        want[(start + more)[records["nr_sectors"] // 8 > more]] = True
    expected = int(want.sum())
    found = sum(volume.dirty_blocks for volume in made.maps.volumes.values())
    stored = sum(int(np.unpackbits(volume.mirror).sum()) for volume in made.maps.volumes.values())
    if not expected == found == stored:
        raise SystemExit(f"marked {found}, in the files {stored}, expected {expected}: the maps are wrong")
    os.close(fd)
    return {
        "volumes": volumes,
        "longest_blocks": longest,
        "batch_records": batch,
        "records_per_second": [count / seconds for seconds in marked],
        "blocks_per_second": [blocks / seconds for seconds in marked],
        "bare_over_marked": [b / m for b, m in zip(bare, marked)],
    }


def share(directory: Path, volumes: int, rounds: int, pause_seconds: float) -> dict[str, Any]:
    """Processor share at REQUESTS_PER_SECOND, when the daemon takes what came in each of its pauses."""
    batch = max(1, int(REQUESTS_PER_SECOND * pause_seconds))
    result = rate(directory, volumes, 1, REQUESTS_PER_SECOND * 2, rounds, batch, TIB // 4)
    result["share_of_core"] = [REQUESTS_PER_SECOND / rate_ for rate_ in result["records_per_second"]]
    return result


def measure(count: int, rounds: int) -> dict[str, Any]:
    """All cases."""
    from bmigrate.breqd.loop import PAUSE_SECONDS

    cases: dict[str, Any] = {}
    for name, run in (
        ("uniform", lambda at: rate(at, 1, 1, count, rounds, BATCH, TIB)),
        ("mix", lambda at: rate(at, 1, 256, count // 32, rounds, BATCH, TIB)),
        ("share_1", lambda at: share(at, 1, rounds, PAUSE_SECONDS)),
        ("share_256", lambda at: share(at, 256, rounds, PAUSE_SECONDS)),
    ):
        with tempfile.TemporaryDirectory(prefix="bmigrate-bench-") as directory:
            cases[name] = run(Path(directory))
    return cases


def amplification(size: int, writes: int) -> dict[str, float]:
    """What is claimed for shipping over what was written: random writes of 4 KiB, each counted once, granule `auto`."""
    with tempfile.TemporaryDirectory(prefix="bmigrate-bench-") as name:
        made = tracker(Path(name), 1, size, choose_granule(size, None))
        records = uniform(writes, 1, size, 1, 3)
        written = len(np.unique(records["sector"])) * 4096
        consume(stream(records, BATCH), BATCH, made.apply)
        key, claimed, at = next(iter(made.maps.volumes)), 0, 0
        while True:
            taken = made.maps.claim(key, 64 << 20, at)
            if taken.number is None:
                return {"size_bytes": size, "written_bytes": written, "shipped_over_written": claimed / written}
            claimed, at = claimed + sum(length for _, length in taken.extents), taken.next_offset_bytes


def resident(array: Any) -> int:
    """Bytes of the pages of an array that this process has in memory.

    Source: Documentation/admin-guide/mm/pagemap.rst (64 bits a page; bit 63: it is present).
    """
    page = resource.getpagesize()
    first, end = array.ctypes.data // page, -(-(array.ctypes.data + array.nbytes) // page)
    with open("/proc/self/pagemap", "rb", buffering=0) as file:
        entries = np.frombuffer(os.pread(file.fileno(), (end - first) * 8, first * 8), dtype=np.uint64)
    return int((entries >> np.uint64(63)).sum()) * page


def memory() -> dict[str, int]:
    """Resident bytes of a process that holds the maps of one volume of 1 TiB, and what the maps take of it."""
    with tempfile.TemporaryDirectory(prefix="bmigrate-bench-") as name:
        made = tracker(Path(name), 1, TIB)
        fd = stream(uniform(1 << 20, 1, TIB, 1, 2), BATCH)
        consume(fd, BATCH, made.apply)
        os.close(fd)
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        used = next(int(line.split()[1]) for line in lines if line.startswith("Rss:")) * 1024
        maps, volume = made.maps, made.maps.volumes["wl", "v0"]
        # Nothing was claimed: that map is the kernel's page of zeroes all over, present and not counted as Rss.
        held = (maps.dirty, maps.failed, volume.mirror, volume.failed_mirror)
        return {"resident_bytes": used, "maps_bytes": sum(map(resident, held))}


def memory_alone() -> dict[str, int]:
    """The same in a process that has done nothing else."""
    program = "import json; from tests.bench import records; print(json.dumps(records.memory()))"
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, int] = json.loads(done.stdout)
    return found


def _lines(cases: dict[str, Any], wide: list[dict[str, float]], used: dict[str, int]) -> Iterator[str]:
    def line(values: list[float], digits: int) -> str:
        return (
            f"median {statistics.median(values):,.{digits}f} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"
        )

    yield f"NumPy {np.__version__}"
    yield f"one block each, 1 TiB: {line(cases['uniform']['records_per_second'], 0)} records/s"
    yield f"  bare read() / that:  {line(cases['uniform']['bare_over_marked'], 3)} of its time"
    yield f"1 block to 1 MiB:      {line(cases['mix']['blocks_per_second'], 0)} blocks/s,"
    yield f"                       {line(cases['mix']['records_per_second'], 0)} records/s"
    for volumes in (1, 256):
        shares = [100 * value for value in cases[f"share_{volumes}"]["share_of_core"]]
        yield f"{REQUESTS_PER_SECOND:,} requests/s, {volumes:3} volumes: {line(shares, 2)} % of a core"
    for item in wide:
        yield f"{int(item['size_bytes']) >> 40} TiB: shipped / written {item['shipped_over_written']:.3f}"
    yield f"memory: {used['resident_bytes'] >> 20} MiB resident, {used['maps_bytes'] >> 20} MiB of it maps of 1 TiB"


def main() -> int:
    """Command line."""
    parser = command.parser("records", __doc__, rounds=5, of="of each side")
    parser.add_argument("--records", type=int, default=4 << 20, help="records in a round (%(default)s)")
    arguments = command.parse(parser)
    cases = measure(arguments.records, arguments.rounds)
    used = memory_alone()
    wide = [amplification(size * TIB, 1 << 18) for size in (1, 4)]
    result = {"cases": cases, "memory": used, "amplification": wide}
    return command.tell(arguments.json, result, _lines(cases, wide, used))


if __name__ == "__main__":
    sys.exit(main())
