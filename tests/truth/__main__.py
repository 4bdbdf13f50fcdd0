# SPDX-License-Identifier: GPL-3.0-or-later
"""``python -m tests.truth``: run the truth table on a guest, keep its numbers, and write them into docs/kernel.md.

The guest's kernel is the image's own, or BMIGRATE_LAB_KERNEL's. The lab instance is BMIGRATE_LAB's, or `truth`; one that
is up is used as it is. All that was measured goes to artifacts/truth/KERNEL.json, the numbers of the table to
docs/truth/KERNEL.json. The exit code is 0 only if every row is good.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lab import Lab
from tests.truth import table, verdict
from tests.truth.catalogue import DEVICES
from tests.vm.kernel_bench import HOST, Bench, bench_of

SEED = int(os.environ.get("BMIGRATE_SEED", "20260702"))


def measure(bench: Bench, kinds: list[str]) -> tuple[dict[str, Any], list[str]]:
    """The rows of these kinds of devices and the race, and what is wrong with them."""
    rows: dict[str, Any] = {}
    found: list[str] = []
    for kind in kinds:
        began = time.monotonic()
        try:
            rows[kind] = bench.row(kind, SEED)
        except (AssertionError, RuntimeError, subprocess.SubprocessError) as error:
            wrong = [f"{kind}: {error}"]
        else:
            wrong = verdict.problems(rows[kind])
        for line in wrong:
            print(line, flush=True)
        found += wrong
        print(f"{kind}: {'bad' if wrong else 'good'}, {time.monotonic() - began:.0f} s", flush=True)
    race = bench.race(SEED)
    found += verdict.problems_of_race(race)
    print(f"race: {race}", flush=True)
    return {"kernel": bench.ssh("uname -r").stdout.strip(), "seed": SEED, "rows": rows, "race": race}, found


def keep(result: dict[str, Any]) -> Path:
    """Store the results; what an earlier run of the same series of kernels had of other devices stays."""
    series = ".".join(re.findall(r"\d+", result["kernel"])[:2])
    everything = table.ROOT / f"artifacts/truth/{series}.json"
    everything.parent.mkdir(parents=True, exist_ok=True)
    everything.write_text(json.dumps(result, indent=1) + "\n")
    kept = table.RESULTS / f"{series}.json"
    rows = json.loads(kept.read_text())["rows"] if kept.exists() else {}
    rows.update({kind: verdict.summary(row) for kind, row in result["rows"].items()})
    ordered = {kind: rows[kind] for kind in DEVICES if kind in rows}
    race = {key: result["race"][key] for key in ("reads", "reads_in_flight", "wrong_sectors")}
    summary = {"kernel": result["kernel"], "seed": result["seed"], "race": race}
    lines = ",\n".join(f"  {json.dumps(kind)}: {json.dumps(row)}" for kind, row in ordered.items())
    kept.write_text(json.dumps(summary)[:-1] + ', "rows": {\n' + lines + "\n}}\n")
    return kept


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.truth", description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", choices=list(DEVICES), help="this kind of device; more than once")
    options = parser.parse_args()
    os.environ.setdefault("BMIGRATE_LAB", "truth")
    lab = Lab()
    was_up = lab.exists()
    try:
        lab.up([HOST])
        with tempfile.TemporaryDirectory() as scratch, bench_of(lab, Path(scratch)) as bench:
            result, found = measure(bench, options.only or list(DEVICES))
        kept = keep(result)
        table.main()
        print(f"{len(result['rows'])} kinds of devices on Linux {result['kernel']}: {len(found)} problems; {kept}")
    finally:
        if not was_up:
            lab.down()
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
