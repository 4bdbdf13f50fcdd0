# SPDX-License-Identifier: GPL-3.0-or-later
"""``make bench``: what tracking costs the writer, as a ratio to the same writer untracked.

In one guest, on one disk, in one session: random 4 KiB writes by fio, in pairs of rounds, one with
nothing attached and one with the disk attached and a reader that consumes the log; the order within
a pair alternates. Printed are the median of the pairs' ratios and their spread, and the same for
pairs in which both rounds are untracked (A/A): what the machine itself makes of equal rounds. Guests
are emulated; a difference smaller than the A/A spread means nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

from lab import Lab
from tests.bench.figures import spread
from tests.vm.kernel_bench import DIRECTORY, DISK, PYTHON, ROOT, Bench

FIO = (
    f"fio --name=bench --filename={DISK} --rw=randwrite --bs=4k --iodepth=16 --ioengine=libaio --direct=1 "
    "--time_based --runtime={seconds} --output-format=json"
)


class Rounds:
    """Runs rounds of the writer, bare or tracked."""

    def __init__(self, bench: Bench, seconds: int) -> None:
        self.bench = bench
        self.seconds = seconds

    def writes_per_second(self) -> float:
        """One round of fio."""
        done = self.bench.ssh(FIO.format(seconds=self.seconds), timeout=self.seconds + 300)
        return float(json.loads(done.stdout)["jobs"][0]["write"]["iops"])

    def bare(self) -> float:
        """Modules loaded, nothing attached."""
        return self.writes_per_second()

    def tracked(self) -> float:
        """The disk attached and its log consumed; the number of records is checked, so that tracking did happen."""
        unit = "bench-reader"
        self.bench.ssh(
            f"systemd-run --quiet --unit={unit} --property=RemainAfterExit=yes --setenv=PYTHONPATH={DIRECTORY} "
            f"python3 {DIRECTORY}/tests/bench/reader.py {DISK} && "
            f"for i in $(seq 300); do journalctl -b -u {unit} -o cat -n 1 | grep -q attached && exit 0; "
            "sleep 0.1; done; exit 1"
        )
        rate = self.writes_per_second()
        said = self.bench.ssh(
            f"systemctl stop {unit}; journalctl -b -u {unit} -o cat | grep ^records | tail -n 1; "
            f"systemctl reset-failed {unit} 2>/dev/null; true"
        ).stdout.split()
        if len(said) != 2 or int(said[1]) < rate:
            raise SystemExit(f"the reader saw {said}: these rounds were not tracked")
        return rate


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python3 -m tests.bench", description=__doc__)
    parser.add_argument("--pairs", type=int, default=8, help="pairs of rounds of each kind (%(default)s)")
    parser.add_argument("--seconds", type=int, default=5, help="length of one round (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    if arguments.pairs < 2 or arguments.seconds < 1:
        parser.error("at least 2 pairs of at least 1 second")
    box = Lab(os.environ.get("BMIGRATE_LAB", "bench"))
    box.up()
    bench = Bench(box, Path(tempfile.mkdtemp(prefix="bmigrate-bench-")))
    try:
        bench.set_up()
        reader = (ROOT / "tests" / "bench" / "reader.py").read_text()
        box.ssh("beta", f"mkdir -p {DIRECTORY}/tests/bench; cat > {DIRECTORY}/tests/bench/reader.py", input_text=reader)
        bench.ssh(f"{PYTHON} -c 'import bmigrate.kernel.channel'")
        rounds = Rounds(bench, arguments.seconds)
        rounds.bare()  # warms up
        tracked, same = [], []
        for number in range(arguments.pairs):
            kinds = ["bare", "tracked"] if number % 2 else ["tracked", "bare"]
            rates = {kind: getattr(rounds, kind)() for kind in kinds}
            tracked.append(rates["tracked"] / rates["bare"])
            first, second = rounds.bare(), rounds.bare()
            same.append(second / first)
            print(
                f"pair {number + 1}: tracked/bare {tracked[-1]:.3f}, bare/bare {same[-1]:.3f}",
                file=sys.stderr,
                flush=True,
            )
        if arguments.json:
            print(json.dumps({"tracked": tracked, "bare": same}))
            return 0
        kind = f"{arguments.pairs} pairs of {arguments.seconds} s"
        print(f"4 KiB random writes, depth 16, {kind}, ratio of writes per second")
        print(f"tracked / bare  {spread(tracked)}")
        print(f"bare / bare     {spread(same)}")
    finally:
        box.down()
    return 0


if __name__ == "__main__":
    sys.exit(main())
