# SPDX-License-Identifier: GPL-3.0-or-later
"""``make bench-kernel``: what a 4 KiB write costs with and without tracking, and with what one would use instead.

Instructions are counted in a guest of one processor under QEMU's `-icount`, where the guest's clock advances by a
nanosecond for each instruction: they depend neither on this machine nor on its load. Wall-clock ratios come from a
guest of one processor, emulated as usual, and are worth what their intervals say. docs/kernel-cost.md tells how to read
the table; with --write-docs it is written there, together with the plot.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from lab import Lab
from tests.bench import costtable, peers
from tests.vm.kernel_bench import DIRECTORY, PYTHON, ROOT, Bench, unpack

PRIMARY, REPLICA = peers.PRIMARY, peers.REPLICA
DEPTHS = (1, 32)
RESULT = ROOT / "artifacts" / "kernel-cost.json"
GUEST = f"{DIRECTORY}/tests/bench/guest"


@contextmanager
def environment(**values: str) -> Iterator[None]:
    """Variables for the guests that are booted meanwhile."""
    before = {key: os.environ.get(key) for key in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value


class Guests:
    """The primary, whose requests are measured, and the replica."""

    def __init__(self, lab: Lab, scratch: Path) -> None:
        self.lab, self.scratch = lab, scratch
        self.disks: dict[str, dict[str, str]] = {}

    def boot(self, counting: bool) -> None:
        """The primary, counting instructions or not, and ready to run rounds."""
        self.lab.up([REPLICA])
        with environment(BMIGRATE_LAB_CPUS="1", BMIGRATE_LAB_ICOUNT="1" if counting else ""):
            self.lab.up([PRIMARY])
        bench = Bench(self.lab, Path(tempfile.mkdtemp(dir=self.scratch)))
        bench.set_up()
        bench.unload()
        program = self.scratch / "requests"
        source = ROOT / "tests" / "bench" / "guest" / "requests.c"
        argv = ["gcc", "-O2", "-static", "-Wall", "-Wextra", "-Werror", "-o", str(program), str(source)]
        subprocess.run(argv, check=True)
        files = {str(path.relative_to(ROOT / "src")): path for path in (ROOT / "src" / "bmigrate").rglob("*.py")}
        for pattern in ("tests/bench/guest/*.py", "tests/vm/kernel_guest/*.py"):
            files.update({str(path.relative_to(ROOT)): path for path in ROOT.glob(pattern)})
        unpack(self.lab, {**files, "requests": program}, DIRECTORY)
        unpack(self.lab, files, DIRECTORY, REPLICA)

    def make_disks(self, host: str, *names: str) -> dict[str, str]:
        """RAM-backed disks instead of those that are there; their paths by name."""
        program = f"cd {DIRECTORY} && {PYTHON} -m tests.bench.guest.disks {' '.join(names)}"
        made: dict[str, str] = json.loads(self.lab.ssh(host, program, timeout=600).stdout)
        return made

    def session(self, rounds: int, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """All runs of a session in the primary; see guest/session.py."""
        plan = {
            "requests": f"{DIRECTORY}/requests",
            "modules": f"{DIRECTORY}/modules",
            "reader": f"{GUEST}/reader.py",
            "rounds": rounds,
            "cases": cases,
        }
        (self.scratch / "plan.json").write_text(json.dumps(plan))
        unpack(self.lab, {"plan.json": self.scratch / "plan.json"}, DIRECTORY)
        command = f'cd {DIRECTORY} && {PYTHON} {GUEST}/session.py "$(cat plan.json)"'
        done = self.lab.ssh(PRIMARY, command, timeout=7200)
        return [json.loads(line) for line in done.stdout.splitlines()]

    def off(self) -> None:
        """Cut the primary's power."""
        self.lab.kill(PRIMARY)


def tracking(disks: dict[str, str], states: tuple[str, ...], count: int) -> list[dict[str, Any]]:
    """Cases of the same disk in several states of the tracker."""
    return [
        {"name": f"{name} {depth}", "depth": depth, "states": {s: {"device": path, "count": count} for s in states}}
        for name, path in disks.items()
        for depth in DEPTHS
    ]


def against(name: str, bare: str, device: str, bare_count: int, count: int) -> list[dict[str, Any]]:
    """Cases of a bare disk and of a device that is replicated."""
    states = {"bare": {"device": bare, "count": bare_count}, "peer": {"device": device, "count": count}}
    return [{"name": f"{name} {depth}", "depth": depth, "states": states} for depth in DEPTHS]


def peer_sessions(guests: Guests, rounds: int, bare_count: int, count: int) -> Iterator[list[dict[str, Any]]]:
    """The peers, one after the other, each against a bare disk in alternating rounds; gives all runs so far."""
    here = guests.make_disks(PRIMARY, "bare", "drbd", "raid")
    there = guests.make_disks(REPLICA, "drbd", "raid")
    lab, runs = guests.lab, list[dict[str, Any]]()
    drbd_disks = {REPLICA: there["drbd"], PRIMARY: here["drbd"]}
    for protocol in ("C", "A"):
        with peers.drbd(lab, protocol, drbd_disks) as device:
            say(f"DRBD protocol {protocol}")
            runs += guests.session(rounds, against(f"drbd-{protocol}", here["bare"], device, bare_count, count))
        yield runs
    with peers.raid1_over_nbd(lab, {REPLICA: there["raid"], PRIMARY: here["raid"]}) as device:
        say("md raid1 over nbd")
        runs += guests.session(rounds, against("raid1-nbd", here["bare"], device, bare_count, count))
    yield runs


def commit() -> str:
    """What is measured."""
    argv = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout.strip()


def say(text: str) -> None:
    """Progress."""
    print(f"bench-kernel: {text}", file=sys.stderr, flush=True)


PHASES = ("instructions", "peer_instructions", "wall", "peer_wall")


def measure(guests: Guests, options: argparse.Namespace) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The phases that are asked for, and their runs; a phase comes again with more of them."""
    quick = options.quick
    for counting, phases in ((True, PHASES[:2]), (False, PHASES[2:])):
        wanted = [phase for phase in phases if phase in (options.only or PHASES)]
        if not wanted:
            continue
        say(f"the guests boot, {'counting instructions' if counting else 'for the wall clock'}")
        guests.boot(counting)
        for phase in wanted:
            say(phase)
            if phase == "instructions":
                disks = guests.make_disks(PRIMARY, "null", "linear-null")
                cases = tracking(disks, ("bare", "loaded", "attached", "again"), 1000 if quick else 10000)
                yield phase, guests.session(options.rounds, cases)
            elif phase == "wall":
                disks = guests.make_disks(PRIMARY, "null")
                cases = tracking(disks, ("bare", "attached", "again"), 2000 if quick else 10000)
                yield phase, guests.session(options.pairs, cases)
            else:
                rounds = max(3, options.rounds // 2) if counting else options.pairs
                for runs in peer_sessions(guests, rounds, 1000 if counting else 5000, 300 if quick else 500):
                    yield phase, runs
        guests.off()


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python3 -m tests.bench.kernel", description=__doc__)
    parser.add_argument("--rounds", type=int, default=12, help="rounds in which instructions are counted (%(default)s)")
    parser.add_argument("--pairs", type=int, default=20, help="alternating pairs on the wall clock (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="few requests a run, to try the bench itself")
    parser.add_argument("--only", action="append", choices=PHASES, help="measure this again, the rest stays as it was")
    parser.add_argument("--from", dest="source", type=Path, metavar="FILE", help="measure nothing, show this result")
    parser.add_argument("--write-docs", action="store_true", help="put table and plot into docs/")
    options = parser.parse_args()
    if options.rounds < 2 or options.pairs < 2:
        parser.error("at least 2 rounds and 2 pairs")
    result: dict[str, Any] = {"host_cpus": os.cpu_count()}
    if options.source or (options.only and RESULT.exists()):
        result = json.loads((options.source or RESULT).read_text())
    if not options.source:
        lab = Lab(os.environ.get("BMIGRATE_LAB", "bench"))
        RESULT.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="bmigrate-bench-") as scratch:
            try:
                for phase, runs in measure(Guests(lab, Path(scratch)), options):
                    result[phase] = runs
                    result.setdefault("commits", {})[phase] = commit()
                    result["kernel"] = lab.ssh(PRIMARY, "uname -r").stdout.strip()
                    result["date"] = datetime.now(timezone.utc).strftime("%Y-%m-%d")
                    RESULT.write_text(json.dumps(result) + "\n")
            finally:
                lab.down()
        say(f"all runs are in {RESULT.relative_to(ROOT)}")
    missing = [phase for phase in PHASES if phase not in result]
    if missing:
        raise SystemExit(f"nothing to show: {', '.join(missing)} have not been measured")
    print(costtable.text(result))
    if options.write_docs:
        costtable.write_docs(result, ROOT / "docs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
