# SPDX-License-Identifier: GPL-3.0-or-later
"""In a guest: make devices of some kinds, one after the other, attach each, and put each operation to the test.

usage: matrix.py KIND... --seed N [--operations NAME,...]

Prints {kind: row}; a row that could not be made has the error that ended it, and the others are made all the same.

For each operation alone: what the device holds before and after, against what the log said in between, with a reader at
work. The volumes below the device that can be attached beside it are, and are compared as well. Promises that a row has
a cell for each operation, with the numbers or with the reason why there are none.
"""

from __future__ import annotations

import argparse
import json
import time
import traceback
from typing import Any

from bmigrate.kernel.errors import AttachRefused
from tests.vm.kernel_guest import devices
from tests.vm.kernel_guest.operations import OPERATIONS, NotOffered, Operation, Target
from tests.vm.kernel_guest.watch import Watch

# Two writes to the same sectors at once may reach the mirrors in either order, and a page of swap that changes while it
# is written may differ between them, too: nobody reads it again. Afterwards such a sector has two contents, and reading
# it from the one and then from the other looks like a change that nobody made. So on these one thread writes, and
# swap comes last.
MIRRORS = ("dm-raid1", "md-raid1", "md-raid10")


def row(kind: str, seed: int, operations: list[str]) -> dict[str, Any]:
    """The results of one kind of device."""
    make, drop = devices.KINDS[kind]
    drop()
    try:
        try:
            path = make()
        except devices.NoDevice as error:
            return {"absent": str(error)}
        try:
            watch = Watch([path, *devices.also(kind)])
        except AttachRefused as error:
            return {"refused": {"code": error.code, "message": error.message, "hint": error.hint}}
        try:
            return {"path": path, "cells": cells(watch, kind, path, seed, operations)}
        finally:
            watch.close()
    finally:
        drop()


def cells(watch: Watch, kind: str, path: str, seed: int, operations: list[str]) -> dict[str, Any]:
    """One cell for each operation."""
    first = next(iter(watch.volumes.values()))
    found: dict[str, Any] = {}
    if kind in MIRRORS:
        operations = sorted(operations, key=lambda name: name == "swap")
    for number, name in enumerate(operations):
        target = Target(
            path=path,
            seed=seed * 100 + number,
            failing=devices.FAILING.get(kind),
            on_bmtest=devices.BMTEST_PARAMETERS.exists(),
            first_sector=first.attachment.start_sector,
            threads=1 if kind in MIRRORS else 4,
        )
        began = time.monotonic()
        try:
            done, before, after = carry_out(watch, OPERATIONS[name], target)
        except NotOffered as error:
            found[name] = {"not_offered": str(error)}
            continue
        volume, *below = after
        for now, earlier in zip(after, before):
            now["missed"] += earlier["missed"]
        found[name] = {"done": done, **volume, "below": below, "seconds": round(time.monotonic() - began, 1)}
    return found


Verdicts = list[dict[str, Any]]


def carry_out(watch: Watch, operation: Operation, target: Target) -> tuple[dict[str, int], Verdicts, Verdicts]:
    """What an operation did, and the verdicts on its preparations, if it made some, and on itself."""
    with watch.step():
        steps = operation(target)
        if not isinstance(steps, dict):
            next(steps)
    if isinstance(steps, dict):
        return steps, [], watch.verdicts()
    prepared = watch.verdicts()
    with watch.step():
        try:
            next(steps)
        except StopIteration as end:
            done = end.value
        else:
            raise RuntimeError("an operation has no more than two parts")
    return done, prepared, watch.verdicts()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("kinds", nargs="+", choices=sorted(devices.KINDS))
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--operations", default=",".join(OPERATIONS))
    options = parser.parse_args()
    rows: dict[str, Any] = {}
    for kind in options.kinds:
        try:
            rows[kind] = row(kind, options.seed, options.operations.split(","))
        except Exception:
            rows[kind] = {"error": traceback.format_exc()}
        rows[kind]["kind"] = kind
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
