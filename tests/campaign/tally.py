# SPDX-License-Identifier: GPL-3.0-or-later
"""What a campaign has done so far: which results count, what is left to do, and the table at the end. Pure.

A fault counts when it happened. One whose point was not reached in time is judged like any other and written down, but
another one is done in its place. Promises: the same results always say the same, so that a campaign that was ended goes
on where it was. Must never let a verdict that is not `held` out of sight: it is in the table also when the fault did
not happen.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

Result = dict[str, Any]


class OtherSchedule(Exception):
    """The results on file are not of this schedule."""


def read(text: str, names: Sequence[str]) -> list[Result]:
    """What earlier runs left; a line that was cut short, and whatever follows it, does not count.

    Args:
        text: a result per line. names: of the faults in the order of the schedule, at least as many.

    Raises:
        OtherSchedule: a result is of another fault than the schedule has at that place.
    """
    found: list[Result] = []
    for line, name in zip(text.splitlines(), names):
        try:
            result = json.loads(line)
        except ValueError:
            break
        if (result["number"], result["fault"]) != (len(found), name):
            raise OtherSchedule(f"result {len(found)} is of {result['fault']!r}, the schedule has {name!r} there")
        found.append(result)
    return found


def happened(results: Iterable[Result]) -> int:
    """How many of them count."""
    return sum(1 for item in results if item["happened"])


def until(results: Sequence[Result], wanted: int) -> list[Result]:
    """The first of them, up to the one with which ``wanted`` have happened; all when so many have not."""
    count, left = 0, []
    for item in results:
        if count >= wanted:
            break
        left.append(item)
        count += bool(item["happened"])
    return left


def most_tries(wanted: int) -> int:
    """After so many faults nobody waits any longer for ``wanted`` of them to happen: something keeps them from it."""
    return 2 * wanted + 20


def progress(results: Sequence[Result], wanted: int) -> str:
    """The line for the newest result."""
    tries = f", {len(results)} tried" if len(results) != happened(results) else ""
    return f"{happened(results)}/{wanted}{tries}: {json.dumps(results[-1])}"


def table(results: Sequence[Result]) -> str:
    """How often each kind happened, and what came of it."""
    counts = Counter(item["fault"] for item in results if item["happened"])
    rows = [f"{'fault':32} happened  held  broken  stuck  median seconds"]
    for name in sorted({item["fault"] for item in results}):
        mine = [item for item in results if item["fault"] == name]
        verdicts = Counter(item["verdict"] for item in mine)
        seconds = sorted(item["seconds"] for item in mine)[len(mine) // 2]
        rows.append(
            f"{name:32} {counts[name]:8}  {verdicts['held']:4}  {verdicts['BROKEN']:6}  {verdicts['STUCK']:5}"
            f"  {seconds:14.1f}"
        )
    verdicts = Counter(item["verdict"] for item in results)
    missed = sum(item["details"].get("differ", 0) for item in results if item["verdict"] == "held")
    rows.append(
        f"{happened(results)} faults happened, {len(results) - happened(results)} more were not reached; "
        f"{verdicts['held']} held, {verdicts['BROKEN']} broken, {verdicts['STUCK']} stuck; "
        f"{missed} blocks differed while something was broken and all held, each of them marked; "
        f"{sum(item['seconds'] for item in results) / 60:.0f} minutes"
    )
    return "\n".join(rows)
