# SPDX-License-Identifier: GPL-3.0-or-later
"""The same work by what Debian ships for it, rsync and rdiff: a first copy, and a copy of which little differs.

Native, with the processes and the sshd of shipping.py, and Debian's tools unpacked beside them, over the same sshd.
First copy: a seed against `rsync --whole-file --inplace`. One per cent of the blocks differs, at random, and nothing
says which: a resync against `rsync --no-whole-file --inplace` with blocks of the same size, and against rdiff:
`rdiff signature` of the copy there, `rdiff delta` against it here, `rdiff patch` there into a new file. Both copy files
here, and neither flushes at its end, as the receiver does. A ratio is the tool's time over ours of the same round.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.bench import command
from tests.bench.figures import spread
from tests.bench.resync import GRANULE, resync
from tests.bench.shipping import MIB, Bench
from tests.sshd import library_path, unpacked

DIFFER = 0.01


class Tool:
    """A program of Debian's on both ends, over the benchmark's sshd."""

    def __init__(self, bench: Bench, name: str, *libraries: str) -> None:
        tree = unpacked(name, *libraries)
        self.program = tree / "usr" / "bin" / name
        self.libraries = library_path(tree)
        self.bench = bench
        self.target = bench.world.directory / name

    @property
    def there(self) -> str:
        """The program, in a command for the other end."""
        return f"env LD_LIBRARY_PATH={self.libraries} {self.program}"

    def timed(self, argv: list[str]) -> float:
        """Seconds of a command; the copy must be equal afterwards."""
        began = time.monotonic()
        subprocess.run(argv, check=True, env={**os.environ, "LD_LIBRARY_PATH": self.libraries})
        seconds = time.monotonic() - began
        subprocess.run(["cmp", "-s", str(self.bench.world.source()), str(self.target)], check=True)
        return seconds


class Rsync(Tool):
    """One process on each end."""

    def __init__(self, bench: Bench) -> None:
        super().__init__(bench, "rsync", "libpopt0")

    def copy(self, *options: str) -> float:
        """Seconds of one copy of the source."""
        argv = [str(self.program), "--inplace", "--ignore-times", *options, f"--rsync-path={self.there}"]
        argv += ["-e", self.bench.ssh().replace(" root@127.0.0.1", ""), str(self.bench.world.source())]
        return self.timed([*argv, f"root@127.0.0.1:{self.target}"])


class Rdiff(Tool):
    """Three steps, the middle one here; the signature must be whole before the delta can begin."""

    def __init__(self, bench: Bench) -> None:
        super().__init__(bench, "rdiff", "librsync2", "libb2-1", "libpopt0")
        self.signature = self.target.with_suffix(".signature")
        self.target.touch()

    def copy(self) -> float:
        """Seconds of making the copy equal to the source again, in a new file that takes its place."""
        new, ssh = self.target.with_suffix(".new"), self.bench.ssh()
        script = (
            f"{ssh} '{self.there} --block-size={GRANULE} signature {self.target} -' > {self.signature} && "
            f"{self.program} delta {self.signature} {self.bench.world.source()} - | "
            f"{ssh} '{self.there} patch {self.target} - {new} && mv {new} {self.target}'"
        )
        return self.timed(["bash", "-o", "pipefail", "-c", script])


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
    seconds: dict[str, list[float]] = {name: [] for name in ("seed", "rsync_whole", "resync", "rsync_delta", "rdiff")}
    with pytest.MonkeyPatch.context() as monkeypatch:
        bench = Bench(directory, size, "random", monkeypatch, "")
        rsync, rdiff = Rsync(bench), Rdiff(bench)
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
            shutil.copyfile(bench.world.source(), rdiff.target)
            for number in range(rounds):

                def by_rsync() -> None:
                    change(rsync.target, size)
                    seconds["rsync_delta"].append(rsync.copy("--no-whole-file", f"--block-size={GRANULE}"))

                def by_rdiff() -> None:
                    change(rdiff.target, size)
                    seconds["rdiff"].append(rdiff.copy())

                steps = [lambda: seconds["resync"].append(size / resync(bench, DIFFER)), by_rsync, by_rdiff]
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
            "rdiff": [theirs / ours for ours, theirs in zip(seconds["resync"], seconds["rdiff"])],
        },
    }


def _lines(result: dict[str, Any]) -> Iterator[str]:
    for name, values in result["seconds"].items():
        yield f"{name}: {' '.join(f'{value:.2f}' for value in values)} s"
    yield f"rsync --whole-file / seed: {spread(result['ratios']['seed'])}"
    yield f"rsync by checksums / resync, 1 % differs: {spread(result['ratios']['resync'])}"
    yield f"rdiff signature, delta, patch / resync, 1 % differs: {spread(result['ratios']['rdiff'])}"


def main() -> int:
    """Command line."""
    arguments = command.parse(command.parser("tools", __doc__, rounds=3, mib=512))
    with command.scratch() as directory:
        result = measure(directory, arguments.mib * MIB, arguments.rounds)
    return command.tell(arguments.json, result, _lines(result))


if __name__ == "__main__":
    sys.exit(main())
