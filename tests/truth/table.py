# SPDX-License-Identifier: GPL-3.0-or-later
"""``python -m tests.truth.table``: write the tables of docs/kernel.md from the stored results in docs/truth.

Promises that the same results give the same text, that no cell is empty, and that nothing outside of the two markers is
touched.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from tests.truth.catalogue import COLUMNS, DEVICES, MAY_CHANGE_NOTHING, OPERATIONS

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/kernel.md"
RESULTS = ROOT / "docs/truth"
NOT_RUN = {"not_run": "not run yet"}
BEGIN, END = "<!-- truth table: begin -->\n", "<!-- truth table: end -->\n"


def stored() -> list[dict[str, Any]]:
    """The results of each kernel, oldest kernel first."""
    found = [json.loads(path.read_text()) for path in RESULTS.glob("*.json")]
    return sorted(found, key=lambda result: [int(n) for n in re.findall(r"\d+", result["kernel"])[:3]])


def render(results: list[dict[str, Any]]) -> str:
    """The tables of all kernels."""
    return "\n".join(line for result in results for line in _of_kernel(result))


def page(text: str, tables: str) -> str:
    """The page with other tables.

    Raises:
        ValueError: it has no place for them.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError("docs/kernel.md has no markers for the truth table")
    return f"{before}{BEGIN}\n{tables}\n{END}{after}"


class _Notes:
    """Reasons, each told once below a table and named by a number in its cells."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def name(self, text: str) -> str:
        if text not in self.texts:
            self.texts.append(text)
        return f"({self.texts.index(text) + 1})"

    def lines(self) -> list[str]:
        return [*(f"{number}. {text}" for number, text in enumerate(self.texts, 1)), ""]


def _of_kernel(result: dict[str, Any]) -> list[str]:
    rows = {kind: result["rows"][kind] for kind in DEVICES if kind in result["rows"]}
    cells = {kind: row["cells"] for kind, row in rows.items() if "cells" in row}
    lines = [f"### Linux {result['kernel']}", ""]
    lines += [f"Seed {result['seed']}. {_race(result['race'])}", ""]
    for columns in COLUMNS:
        notes = _Notes()
        lines += _line("device", *(OPERATIONS[name] for name in columns))
        lines += _line("---", *("---" for _ in columns))
        for kind, found in cells.items():
            lines += _line(DEVICES[kind], *(_cell(name, found.get(name, NOT_RUN), notes) for name in columns))
        lines += ["", *notes.lines()]
    return [*lines, *_below(cells), *_without(rows)]


def _line(*cells: str) -> list[str]:
    return [f"| {' | '.join(cells)} |"]


def _race(race: dict[str, Any]) -> str:
    if not race:
        return "The race: not run yet."
    return (
        f"The race: {race['reads']:,} reads of the copier, {race['reads_in_flight']:,} of them with writes in flight; "
        f"{race['wrong_sectors']:,} sectors of the copy differ from the disk at the end."
    )


def _cell(name: str, cell: dict[str, Any], notes: _Notes) -> str:
    if "not_run" in cell:
        return str(cell["not_run"])
    if "not_offered" in cell:
        return f"— {notes.name('Not offered: ' + cell['not_offered'] + '.')}"
    counts = f"{cell['missed']:,}/{cell['changed']:,}"
    if cell["missed"]:
        return f"{counts} **defect**"
    if not cell["changed"]:
        return f"{counts} {notes.name(MAY_CHANGE_NOTHING[name])}"
    if name == "passthrough":
        return f"{counts} suspect: all marked"
    return f"{counts} ×{cell['marked'] / cell['changed']:.2f}"


def _below(cells: dict[str, dict[str, Any]]) -> list[str]:
    """The volumes that were attached beside the one that was written."""
    lines = [
        "Nested attachments, all operations together:",
        "",
        *_line("written device", "attached too", "changed there", "missed there"),
        *_line("---", "---", "---", "---"),
    ]
    for kind, row in cells.items():
        sums: dict[str, list[int]] = {}
        for cell in row.values():
            for path, (changed, missed) in cell.get("below", {}).items():
                entry = sums.setdefault(path, [0, 0])
                entry[0] += changed
                entry[1] += missed
        for path, (changed, missed) in sums.items():
            lines += _line(DEVICES[kind], f"`{path}`", f"{changed:,}", f"{missed:,}")
    return [*lines, ""]


def _without(rows: dict[str, dict[str, Any]]) -> list[str]:
    """What was refused, and what could not be had."""
    lines = [*_line("not recorded", "why", "instead"), *_line("---", "---", "---")]
    for kind, row in rows.items():
        if "refused" in row:
            refused = row["refused"]
            lines += _line(DEVICES[kind], f"refused (`{refused['code']}`): {refused['message']}", refused["hint"])
        if "absent" in row:
            lines += _line(DEVICES[kind], f"not tested: {row['absent']}", "—")
    for kind in DEVICES:
        if kind not in rows:
            lines += _line(DEVICES[kind], NOT_RUN["not_run"], "—")
    return [*lines, ""]


def main() -> None:
    PAGE.write_text(page(PAGE.read_text(), render(stored())))


if __name__ == "__main__":
    main()
