# SPDX-License-Identifier: GPL-3.0-or-later
"""``python -m tests.truth``: run the truth table on a guest, keep its numbers, write them into docs/kernel.md.

The guest's kernel is the image's own, or BMIGRATE_LAB_KERNEL's. The lab instance is BMIGRATE_LAB's, or `truth`; one
that is there is used as it is and stays, as does any with BMIGRATE_LAB_KEEP=1. All that was measured goes to
artifacts/truth/KERNEL.json, the numbers of the table to docs/truth/KERNEL.json. The exit code is 0 only if every row is
good.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lab import Lab, LabError
from tests.truth import table, verdict
from tests.truth.catalogue import DEVICES, OPERATIONS
from tests.vm.kernel_bench import HOST, Bench, bench_of

SEED = int(os.environ.get("BMIGRATE_SEED", "20260702"))


# So many kinds of devices in one program of the guest: to start one costs seconds under emulation.
TOGETHER = 4


def measure(bench: Bench, kinds: list[str], operations: list[str]) -> list[str]:
    """Make the rows of these kinds of devices, run the race, keep what is good; what is wrong."""
    kernel = bench.ssh("uname -r").stdout.strip()
    found: list[str] = []

    def note(what: str, wrong: list[str], began: float) -> None:
        for line in wrong:
            print(line, flush=True)
        found.extend(wrong)
        print(f"{what}: {'bad' if wrong else 'good'}, {time.monotonic() - began:.0f} s", flush=True)

    for first in range(0, len(kinds), TOGETHER):
        some, began = kinds[first : first + TOGETHER], time.monotonic()
        try:
            rows = bench.rows(some, SEED, operations)
        except (AssertionError, LabError) as error:
            note(", ".join(some), [str(error)], began)
            continue
        wrong = {kind: verdict.problems(row, operations) for kind, row in rows.items()}
        keep(kernel, rows={kind: row for kind, row in rows.items() if not wrong[kind]})
        note(", ".join(some), [line for kind in some for line in wrong[kind]], began)
    began = time.monotonic()
    race = bench.race(SEED)
    keep(kernel, race=race)
    note(f"race ({race})", verdict.problems_of_race(race), began)
    return found


def keep(kernel: str, rows: dict[str, Any] | None = None, race: dict[str, Any] | None = None) -> None:
    """Store results; those of other devices and operations on the same series of kernels stay as they are."""
    series = ".".join(re.findall(r"\d+", kernel)[:2])
    everything = table.ROOT / f"artifacts/truth/{series}.json"
    everything.parent.mkdir(parents=True, exist_ok=True)
    raw = json.loads(everything.read_text()) if everything.exists() else {}
    everything.write_text(json.dumps({**raw, **(rows or {}), **({"race": race} if race else {})}, indent=1) + "\n")
    path = table.RESULTS / f"{series}.json"
    kept = json.loads(path.read_text()) if path.exists() else {"rows": {}, "race": {}}
    for kind, row in (rows or {}).items():
        new, old = verdict.summary(row), kept["rows"].get(kind, {})
        if "cells" in new and "cells" in old:
            cells = {**old["cells"], **new["cells"]}
            new["cells"] = {name: cells[name] for name in OPERATIONS if name in cells}
        kept["rows"][kind] = new
    if race:
        kept["race"] = {key: race[key] for key in ("reads", "reads_in_flight", "wrong_sectors")}
    path.write_text(layout(kernel, SEED, kept["race"], kept["rows"]))


def layout(kernel: str, seed: int, race: dict[str, Any], rows: dict[str, Any]) -> str:
    """The stored form: JSON with a line for each kind of device."""

    def compact(value: Any) -> str:
        return json.dumps(value, separators=(",", ":"))

    head = {"licence": "SPDX-License-Identifier: GPL-3.0-or-later", "kernel": kernel, "seed": seed, "race": race}
    lines = ",\n".join(f"{compact(kind)}:{compact(rows[kind])}" for kind in DEVICES if kind in rows)
    return f'{compact(head)[:-1]},"rows":{{\n{lines}\n}}}}\n'


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.truth", description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", choices=list(DEVICES), help="this device; more than once")
    parser.add_argument("--operation", action="append", choices=list(OPERATIONS), help="this one; more than once")
    options = parser.parse_args()
    os.environ.setdefault("BMIGRATE_LAB", "truth")
    lab = Lab()
    keep_lab = lab.exists() or os.environ.get("BMIGRATE_LAB_KEEP") == "1"
    try:
        lab.up([HOST])
        with tempfile.TemporaryDirectory() as scratch, bench_of(lab, Path(scratch)) as bench:
            found = measure(bench, options.only or list(DEVICES), options.operation or list(OPERATIONS))
        table.main()
        print(f"{len(options.only or DEVICES)} kinds of devices: {len(found)} problems")
    finally:
        if not keep_lab:
            lab.down()
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
