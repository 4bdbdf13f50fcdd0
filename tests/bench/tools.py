# SPDX-License-Identifier: GPL-3.0-or-later
"""The same work done by what Debian ships for it: rsync, for a first copy, and for a copy of which little differs.

Native, with the processes and the sshd of shipping.py, and Debian's rsync unpacked beside them, over the same sshd.
First copy: a seed against `rsync --whole-file --inplace`. One per cent of the blocks differs, at random, and nothing
says which: a resync against `rsync --no-whole-file --inplace` with blocks of the same size. rsync copies files here; it
flushes nothing at its end, the receiver does. A ratio is rsync's time over ours of the same round.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from tests.bench.figures import spread
from tests.bench.resync import GRANULE, resync
from tests.bench.shipping import MIB, Bench
from tests.sshd import library_path, unpacked

DIFFER = 0.01


class Rsync:
    """Debian's, on both ends, over the benchmark's sshd."""

    def __init__(self, bench: Bench) -> None:
        tree = unpacked("rsync", "libpopt0")
        self.program = tree / "usr" / "bin" / "rsync"
        self.libraries = library_path(tree)
        self.bench = bench
        self.target = bench.world.directory / "rsync"

    def copy(self, *options: str) -> float:
        """Seconds of one copy of the source; the copy is compared afterwards."""
        source = self.bench.world.source()
        remote = f"env LD_LIBRARY_PATH={self.libraries} {self.program}"
        argv = [str(self.program), "--inplace", "--ignore-times", *options, f"--rsync-path={remote}"]
        argv += ["-e", self.bench.ssh().replace(" root@127.0.0.1", ""), str(source), f"root@127.0.0.1:{self.target}"]
        environment = {**os.environ, "LD_LIBRARY_PATH": self.libraries}
        began = time.monotonic()
        subprocess.run(argv, check=True, env=environment)
        seconds = time.monotonic() - began
        subprocess.run(["cmp", "-s", str(source), str(self.target)], check=True)
        return seconds


def change(path: Path, size: int) -> None:
    """Make one per cent of the blocks of a file other ones."""
    fd = os.open(path, os.O_WRONLY)
    try:
        for _ in range(int(DIFFER * size / GRANULE)):
            block = int.from_bytes(os.urandom(6), "little") % (size // GRANULE)
            os.pwrite(fd, os.urandom(GRANULE), block * GRANULE)
    finally:
        os.close(fd)


def measure(directory: Path, size: int, rounds: int) -> dict[str, Any]:
    """Both kinds of work, in alternating rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in ("seed", "rsync_whole", "resync", "rsync_delta")}
    with pytest.MonkeyPatch.context() as monkeypatch:
        bench = Bench(directory, size, "random", monkeypatch, "")
        rsync = Rsync(bench)
        try:
            for number in range(rounds):
                rsync.target.unlink(missing_ok=True)
                steps = [
                    lambda: seconds["seed"].append(bench.shipped()),
                    lambda: seconds["rsync_whole"].append(rsync.copy("--whole-file")),
                ]
                for step in steps if number % 2 else reversed(steps):
                    step()
            process = bench.start()
            for number in range(rounds):

                def delta() -> None:
                    change(rsync.target, size)
                    seconds["rsync_delta"].append(rsync.copy("--no-whole-file", f"--block-size={GRANULE}"))

                steps = [lambda: seconds["resync"].append(size / resync(bench, DIFFER)), delta]
                for step in steps if number % 2 else reversed(steps):
                    step()
            process.terminate()
            process.wait()
        finally:
            bench.close()
    return {
        "size_bytes": size,
        "seconds": seconds,
        "ratios": {
            "seed": [theirs / ours for ours, theirs in zip(seconds["seed"], seconds["rsync_whole"])],
            "resync": [theirs / ours for ours, theirs in zip(seconds["resync"], seconds["rsync_delta"])],
        },
    }


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python3 -m tests.bench.tools", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="of each kind (%(default)s)")
    parser.add_argument("--mib", type=int, default=512, help="size of the volume in MiB (%(default)s)")
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
    for name, values in result["seconds"].items():
        print(f"{name}: {' '.join(f'{value:.2f}' for value in values)} s")
    print(f"rsync --whole-file / seed: {spread(result['ratios']['seed'])}")
    print(f"rsync by checksums / resync, 1 % differs: {spread(result['ratios']['resync'])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
