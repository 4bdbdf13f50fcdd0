# SPDX-License-Identifier: GPL-3.0-or-later
"""Runs in a guest: rounds of requests, each in several states of the tracker. Prints one JSON object a run.

usage: session.py PLAN, a JSON object:

    requests, modules, reader  the programs and the directory of the modules
    rounds                     how often each case is run in each state
    cases                      [{name, depth, states: {STATE: {device, count}}}]

States: `bare` (no module loaded), `loaded` (nothing attached), `attached` (the device is attached and its log is read),
and any other name: as bare, for devices that somebody else replicates. All states of a round follow each other closely,
and their order turns from round to round, so that what drifts does so in all of them. A run in state `attached` of
which not every request was recorded ends the session. One round more, the first, is run and not told.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

SEED = 88172645463325252


class Tracker:
    """The modules and the reader, as far as a state wants them."""

    def __init__(self, modules: str, reader: str) -> None:
        self._modules = Path(modules)
        argv = [sys.executable, reader]
        self._reader = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        # Its start costs more than many requests.
        self._answer()

    def load(self, wanted: bool) -> None:
        """Load or unload both modules."""
        loaded = Path("/sys/module/reqlog").exists()
        if wanted and not loaded:
            for name in ("bufflink", "reqlog"):
                subprocess.run(["insmod", str(self._modules / f"{name}.ko")], check=True)
            subprocess.run(["udevadm", "settle"], check=True)
        if loaded and not wanted:
            subprocess.run(["rmmod", "reqlog", "bufflink"], check=True)

    def ask(self, command: str) -> str:
        """A command for the reader, and its answer."""
        assert self._reader.stdin
        self._reader.stdin.write(command + "\n")
        self._reader.stdin.flush()
        return self._answer()

    def _answer(self) -> str:
        assert self._reader.stdout
        answer = self._reader.stdout.readline().strip()
        if not answer:
            raise SystemExit(f"the reader ended: {self._reader.wait()}")
        return answer

    @property
    def pid(self) -> int:
        """The reader's process."""
        return self._reader.pid

    def reader_ns(self) -> int:
        """Processor time that the reader has had."""
        return int(Path(f"/proc/{self.pid}/schedstat").read_text().split()[0])

    def end(self) -> None:
        """No module, no reader."""
        assert self._reader.stdin
        self._reader.stdin.close()
        self._reader.wait()
        self.load(False)


def run(requests: str, case: dict[str, Any], where: dict[str, Any], *pids: int) -> dict[str, Any]:
    """One run of the requests."""
    argv = [requests, where["device"], str(case["depth"]), str(where["count"]), str(SEED), *map(str, pids)]
    done = subprocess.run(argv, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(argv)}: {done.stderr}")
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def run_tracked(tracker: Tracker, requests: str, case: dict[str, Any], where: dict[str, Any]) -> dict[str, Any]:
    """The same with the device attached; the reader's share is added, up to its last record."""
    if tracker.ask(f"attach {where['device']}") != "ready":
        raise SystemExit("the reader is not ready")
    before = tracker.reader_ns()
    told = run(requests, case, where, tracker.pid)
    sectors, told["records"], told["batches"], told["widened"] = map(int, tracker.ask("detach").split())
    told["reader_all_ns"] = tracker.reader_ns() - before
    if sectors < where["count"] * 8:
        raise SystemExit(f"{case['name']}: only {sectors} sectors of {where['count'] * 8} were recorded")
    return told


def main() -> None:
    """All rounds."""
    plan = json.loads(sys.argv[1])
    tracker = Tracker(plan["modules"], plan["reader"])
    names = list(dict.fromkeys(state for case in plan["cases"] for state in case["states"]))
    for number in range(-1, plan["rounds"]):
        turn = number % len(names)
        for state in names[turn:] + names[:turn]:
            tracker.load(state in ("loaded", "attached"))
            for case in plan["cases"]:
                where = case["states"].get(state)
                if where is None:
                    continue
                if state == "attached":
                    told = run_tracked(tracker, plan["requests"], case, where)
                else:
                    told = run(plan["requests"], case, where)
                if number < 0:
                    continue
                print(json.dumps({"round": number, "case": case["name"], "state": state, **where, **told}), flush=True)
    tracker.end()


if __name__ == "__main__":
    main()
