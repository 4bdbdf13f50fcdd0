# SPDX-License-Identifier: GPL-3.0-or-later
"""What is wrong with a row of the truth table. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tests.truth.catalogue import EXACT, EXACT_RATIO, MAY_CHANGE_NOTHING, OPERATIONS

#: Not recorded correctly by this or by no kernel, and why: what ATTACH may refuse a kind of device for.
REFUSALS = {
    "brd": {"rw_page"},
    "zram": {"rw_page"},
    "drbd": {"driver_writes"},
    "bcache": {"driver_writes"},
    "zoned": {"zoned"},
    "pmem": {"dax", "rw_page"},
}


def problems(row: dict[str, Any], operations: Iterable[str] = OPERATIONS) -> list[str]:
    """Everything in a row that must not be, in words; empty if the row is good.

    Args:
        row: what the guest's matrix.py printed. operations: those that it was to have.
    """
    kind = row["kind"]
    if "error" in row:
        return [f"{kind}: {row['error']}"]
    if "absent" in row:
        return [] if row["absent"] else [f"{kind}: absent, and nobody knows why"]
    if "refused" in row:
        refused = row["refused"]
        found = [] if refused["code"] in REFUSALS.get(kind, ()) else [f"{kind}: refused as {refused['code']}"]
        return found + [f"{kind}: the refusal has no {key}" for key in ("message", "hint") if not refused[key]]
    if kind in ("drbd", "bcache", "zoned", "pmem"):
        return [f"{kind}: must be refused"]
    found = [f"{kind}: no cell for {name}" for name in operations if name not in row["cells"]]
    for name, cell in row["cells"].items():
        found += [f"{kind}, {name}: {text}" for text in _of_cell(name, cell)]
    return found


def _of_cell(name: str, cell: dict[str, Any]) -> list[str]:
    if "not_offered" in cell:
        return [] if cell["not_offered"] else ["not offered, and nobody knows why"]
    found = []
    if cell["missed"]:
        found.append(f"{cell['missed']} of {cell['changed']} changed sectors were missed")
    if name == "passthrough" and cell["marked"] != cell["sectors"]:
        found.append("a command past the block layer did not mark the whole volume")
    if cell["blind"]:
        found.append("the volume is blind")
    if not cell["changed"] and name not in MAY_CHANGE_NOTHING:
        found.append(f"nothing changed, so nothing is shown; done: {cell['done']}")
    elif name in EXACT and not cell["widened"] and cell["marked"] > EXACT_RATIO * cell["changed"]:
        found.append(f"{cell['marked']} sectors were marked where {cell['changed']} changed")
    for below in cell["below"]:
        if below["missed"]:
            found.append(f"{below['missed']} of {below['changed']} changed sectors of {below['path']} were missed")
        if below["blind"]:
            found.append(f"{below['path']} is blind")
    return found


def summary(row: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a row: the numbers of the table, and nothing that differs from machine to machine."""
    kept: dict[str, Any] = {key: row[key] for key in ("refused", "absent") if key in row}
    if "cells" not in row:
        return kept
    cells: dict[str, Any] = {}
    for name, cell in row["cells"].items():
        if "not_offered" in cell:
            cells[name] = {"not_offered": cell["not_offered"]}
            continue
        cells[name] = {key: cell[key] for key in ("changed", "missed", "marked")}
        if cell["marked"] == cell["sectors"]:
            cells[name]["all"] = True
        if cell["below"]:
            cells[name]["below"] = {below["path"]: [below["changed"], below["missed"]] for below in cell["below"]}
    return {**kept, "cells": cells}


def problems_of_race(race: dict[str, Any]) -> list[str]:
    """The same of the race: the copy is the disk, and it was a race."""
    found = []
    if race["wrong_sectors"]:
        found.append(f"race: {race['wrong_sectors']} sectors of the copy are wrong")
    if race["reads_in_flight"] < 20 or not race["partials"]:
        found.append(f"race: there was none: {race}")
    return found
