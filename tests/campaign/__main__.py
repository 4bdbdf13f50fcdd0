# SPDX-License-Identifier: GPL-3.0-or-later
"""The campaign: python -m tests.campaign

Boots two guests, installs by the shipped playbooks, and then breaks something at random again and again while a
workload writes: kills, stops, fault points, power cuts of either host, link cuts, full disks, disk errors. Each fault
is judged on the lab host by the raw files: while something is broken, a block that differs must be dirty or claimed or
its volume suspect; afterwards the hosts must get in step by themselves, and then the devices must be equal.

It goes on until as many faults have happened as were asked for; one whose point was not reached in time does not count.
Every choice comes from the seed and the number of the fault. Results are appended to build/campaign/SEED.jsonl as they
come; the same command goes on where it was ended. Exit status: 0 when all happened and none broke a rule.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lab import Lab, LabError
from tests.campaign import judge, tally
from tests.campaign.faults import FAULTS, Fault, schedule
from tests.campaign.judge import Violation
from tests.campaign.stage import Stage
from tests.mutants import tree
from tests.mutants.catalogue import MUTANTS
from tests.vm.rig import Rig

ROOT = Path(__file__).resolve().parents[2]
#: Of a session: whatever dies is one of several, and all that the others have under way must come to its end too.
STREAMS = 3
EPILOG = """\
environment:
  CAMPAIGN_FAULTS  how many faults must happen (200)
  CAMPAIGN_SEED    the seed (1)
  BMIGRATE_LAB     name of the instance of the lab (campaign)

examples:
  CAMPAIGN_FAULTS=20 python -m tests.campaign
  python -m tests.campaign --sabotage acknowledge-before-fsync --only 'power of the standby' --faults 5
      a negative control: with that rule taken out of the programs, the campaign must notice; exit status 1
"""


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.campaign",
        description=__doc__.partition("\n\n")[2] if __doc__ else "",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    environment = os.environ.get
    parser.add_argument("--faults", type=int, default=int(environment("CAMPAIGN_FAULTS", "200")), metavar="N")
    parser.add_argument("--seed", type=int, default=int(environment("CAMPAIGN_SEED", "1"), 0), metavar="S")
    parser.add_argument("--only", action="append", default=[], metavar="TEXT", help="only kinds with TEXT in the name")
    parser.add_argument("--sabotage", choices=[item.name for item in MUTANTS], help="break this rule first")
    parser.add_argument("--results", type=Path, metavar="FILE", help="instead of build/campaign/SEED.jsonl")
    parser.add_argument("--list", action="store_true", help="print how the schedule begins, and end")
    return parser.parse_args(argv)


class Campaign:
    """The faults of one seed, one after the other, on one instance of the lab.

    Args:
        faults: the schedule, as long as the campaign may become. wanted: how many must happen.
    """

    def __init__(self, seed: int, faults: Sequence[Fault], wanted: int, results: Path) -> None:
        self.seed, self.faults, self.wanted, self.results = seed, faults, wanted, results
        self.lab = Lab(os.environ.setdefault("BMIGRATE_LAB", "campaign"))
        self.rig: Rig | None = None

    def run(self) -> list[tally.Result]:
        """All that is left to do; returns the results up to the last fault that was asked for.

        Raises:
            tally.OtherSchedule: the results on file are not of this schedule.
        """
        text = self.results.read_text() if self.results.exists() else ""
        results = tally.read(text, [fault.name for fault in self.faults])
        self.results.parent.mkdir(parents=True, exist_ok=True)
        with open(self.results, "w") as file:
            for line in results:
                file.write(json.dumps(line) + "\n")
        try:
            while tally.happened(results) < self.wanted and len(results) < len(self.faults):
                result = self._one(len(results), self.faults[len(results)])
                results.append(result)
                with open(self.results, "a") as file:
                    file.write(json.dumps(result) + "\n")
                print(tally.progress(results, self.wanted), flush=True)
        finally:
            self._leave()
        return tally.until(results, self.wanted)

    def _hosts(self) -> Rig:
        if self.rig is None:
            self.lab.down()
            self.lab.up()
            self.rig = Rig(self.lab, STREAMS)
            self.rig.deploy()
        return self.rig

    def _leave(self) -> None:
        if self.rig is not None:
            self.rig.close()
            self.rig = None
        self.lab.down()

    def _one(self, number: int, fault: Fault) -> dict[str, Any]:
        began = time.monotonic()
        stage = Stage(self._hosts(), f"campaign-{self.seed}-{number}", random.Random(f"{self.seed}/{number}"))
        result: dict[str, Any] = {"number": number, "fault": fault.name, "happened": False}
        try:
            stage.start()
            result["happened"] = fault.act(stage)
            stage.quiet()
            judge.in_step_means_equal(stage)
            result["verdict"] = "held"
        except Violation as violation:
            # Also when it was seen before the fault was over: what breaks a rule has happened.
            result.update(happened=True, verdict="BROKEN", why=str(violation))
        except (LabError, AssertionError, OSError, subprocess.SubprocessError) as error:
            result.update(verdict="STUCK", why=f"{error}\n{traceback.format_exc(limit=-3)}")
            try:
                judge.nothing_false_is_said(stage)
            except Violation as violation:
                result.update(happened=True, verdict="BROKEN", why=f"{violation}; before that: {result['why']}")
            except (LabError, AssertionError, OSError, subprocess.SubprocessError) as unknown:
                result["why"] += f"\nand what it says of itself could not be learnt: {unknown}"
        result.update(details=stage.details, seconds=round(time.monotonic() - began, 1))
        if result["verdict"] != "held":
            result["logs"] = self._logs()
            # Whatever it is, the next fault shall not inherit it.
            self._leave()
        return result

    def _logs(self) -> dict[str, str]:
        logs = {}
        for host in self.lab.vms:
            units = "-u breqd -u bmigrate-ship -u bmigrate-hold -u ssh"
            try:
                logs[host] = self.lab.ssh(host, f"journalctl -b --no-pager -n 60 {units}", check=False).stdout
            except (LabError, subprocess.SubprocessError) as error:
                logs[host] = str(error)
        return logs


def sabotaged(options: argparse.Namespace, argv: list[str]) -> int:
    """Run the same campaign in a copy of the tree with one rule taken out."""
    (mutant,) = [item for item in MUTANTS if item.name == options.sabotage]
    with tempfile.TemporaryDirectory(prefix="campaign-") as directory:
        copy = Path(directory)
        tree.copy(copy)
        tree.apply(mutant.patch, copy)
        print(f"{mutant.name}: {mutant.loss()}", flush=True)
        rest = [word for word in argv if word not in ("--sabotage", mutant.name)]
        environment = {**os.environ, "PYTHONPATH": "src:."}
        return subprocess.run([sys.executable, "-m", "tests.campaign", *rest], cwd=copy, env=environment).returncode


def main(argv: list[str] | None = None) -> int:
    """Run what the command line says."""
    argv = sys.argv[1:] if argv is None else argv
    options = parse(argv)
    if options.sabotage:
        return sabotaged(options, argv)
    kinds = {fault.name for fault in FAULTS if not options.only or any(text in fault.name for text in options.only)}
    if not kinds:
        print(f"no kind of fault has {' or '.join(options.only)} in its name", file=sys.stderr)
        return 2
    chosen = (fault for fault in schedule(options.seed) if fault.name in kinds)
    faults = list(itertools.islice(chosen, tally.most_tries(options.faults)))
    if options.list:
        print("\n".join(f"{number} {fault.name}" for number, fault in enumerate(faults[: options.faults])))
        return 0
    name = f"{options.seed}-{'-'.join(options.only)}" if options.only else str(options.seed)
    file = options.results or ROOT / "build" / "campaign" / f"{name.replace(' ', '_')}.jsonl"
    # An end by TERM leaves no guest behind either, and what was judged is on file.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        results = Campaign(options.seed, faults, options.faults, file).run()
    except tally.OtherSchedule as error:
        print(f"{file}: {error}; move it away to begin anew", file=sys.stderr)
        return 2
    print(tally.table(results))
    bad = [item for item in results if item["verdict"] != "held"]
    for item in bad:
        print(f"\n{item['number']} {item['fault']}: {item['verdict']}: {item['why']}", file=sys.stderr)
    missing = options.faults - tally.happened(results)
    if missing:
        print(f"\n{missing} of {options.faults} faults did not happen in {len(results)} tries", file=sys.stderr)
    return 1 if bad or missing else 0


if __name__ == "__main__":
    sys.exit(main())
