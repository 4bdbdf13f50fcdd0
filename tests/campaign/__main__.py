# SPDX-License-Identifier: GPL-3.0-or-later
"""The campaign: python -m tests.campaign

Boots two guests, installs by the shipped playbooks, and then breaks something at random again and again while a
workload writes: kills, stops, fault points, power cuts of either host, link cuts, full disks, disk errors. Each fault
is judged on the lab host by the raw files: while something is broken, a block that differs must be dirty or claimed or
its volume suspect; afterwards the hosts must get in step by themselves, and then the devices must be equal.

Every choice comes from the seed and the number of the fault. Results are appended to build/campaign/SEED.jsonl as they
come; the same command goes on where it was ended. Exit status: 0 when no fault broke a rule.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

from lab import Lab, LabError
from tests.campaign import judge
from tests.campaign.faults import Fault, schedule
from tests.campaign.judge import Violation
from tests.campaign.stage import Stage
from tests.mutants import tree
from tests.mutants.catalogue import MUTANTS
from tests.vm.rig import Rig

ROOT = Path(__file__).resolve().parents[2]
EPILOG = """\
environment:
  CAMPAIGN_FAULTS  how many faults (200)
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
    parser.add_argument("--list", action="store_true", help="print the schedule and end")
    return parser.parse_args(argv)


class Campaign:
    """The faults of one seed, one after the other, on one instance of the lab."""

    def __init__(self, seed: int, faults: list[Fault], results: Path) -> None:
        self.seed, self.faults, self.results = seed, faults, results
        self.lab = Lab(os.environ.setdefault("BMIGRATE_LAB", "campaign"))
        self.rig: Rig | None = None

    def done(self) -> list[dict[str, Any]]:
        """What earlier runs of this seed left; a line that was cut short does not count."""
        found = []
        for line in self.results.read_text().splitlines() if self.results.exists() else ():
            try:
                found.append(json.loads(line))
            except ValueError:
                break
        return found

    def run(self) -> list[dict[str, Any]]:
        """All that is left to do; returns all results."""
        results = self.done()
        self.results.parent.mkdir(parents=True, exist_ok=True)
        with open(self.results, "w") as file:
            for line in results:
                file.write(json.dumps(line) + "\n")
        try:
            for number in range(len(results), len(self.faults)):
                result = self._one(number, self.faults[number])
                results.append(result)
                with open(self.results, "a") as file:
                    file.write(json.dumps(result) + "\n")
                print(f"{number + 1}/{len(self.faults)} {json.dumps(result)}", flush=True)
        finally:
            self._leave()
        return results

    def _hosts(self) -> Rig:
        if self.rig is None:
            self.lab.down()
            self.lab.up()
            self.rig = Rig(self.lab)
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
            result.update(verdict="BROKEN", why=str(violation))
        except (LabError, AssertionError, OSError, subprocess.SubprocessError) as error:
            result.update(verdict="STUCK", why=f"{error}\n{traceback.format_exc(limit=-3)}")
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


def table(results: list[dict[str, Any]]) -> str:
    """How often each kind happened, and what came of it."""
    happened = Counter(item["fault"] for item in results if item["happened"])
    rows = [f"{'fault':32} happened  held  broken  stuck  median seconds"]
    for name in sorted({item["fault"] for item in results}):
        mine = [item for item in results if item["fault"] == name]
        verdicts = Counter(item["verdict"] for item in mine)
        seconds = sorted(item["seconds"] for item in mine)[len(mine) // 2]
        rows.append(
            f"{name:32} {happened[name]:8}  {verdicts['held']:4}  {verdicts['BROKEN']:6}  {verdicts['STUCK']:5}"
            f"  {seconds:14.1f}"
        )
    verdicts = Counter(item["verdict"] for item in results)
    missed = sum(item["details"].get("differ", 0) for item in results)
    rows.append(
        f"{sum(happened.values())} faults happened, {len(results) - sum(happened.values())} were not reached; "
        f"{verdicts['held']} held, {verdicts['BROKEN']} broken, {verdicts['STUCK']} stuck; "
        f"{missed} blocks differed while something was broken, each of them marked; "
        f"{sum(item['seconds'] for item in results) / 60:.0f} minutes"
    )
    return "\n".join(rows)


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
    if options.only:
        wide = schedule(options.seed, 1000 * options.faults)
        faults = [fault for fault in wide if any(text in fault.name for text in options.only)][: options.faults]
    else:
        faults = schedule(options.seed, options.faults)
    if options.list:
        print("\n".join(f"{number} {fault.name}" for number, fault in enumerate(faults)))
        return 0
    name = f"{options.seed}-{'-'.join(options.only)}" if options.only else str(options.seed)
    file = options.results or ROOT / "build" / "campaign" / f"{name.replace(' ', '_')}.jsonl"
    results = Campaign(options.seed, faults, file).run()
    print(table(results[: len(faults)]))
    bad = [item for item in results if item["verdict"] != "held"]
    for item in bad:
        print(f"\n{item['number']} {item['fault']}: {item['verdict']}: {item['why']}", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
