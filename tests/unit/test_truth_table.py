# SPDX-License-Identifier: GPL-3.0-or-later
"""The truth table: what fails a row, and that docs/kernel.md shows what was stored, all of it, and nothing else."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from tests.truth import catalogue, table, verdict

RESULTS = table.stored()
GOOD: dict[str, Any] = {
    "changed": 1000,
    "missed": 0,
    "marked": 1000,
    "sectors": 4096,
    "widened": 0,
    "blind": False,
    "done": {"write": 60},
    "below": [{"path": "/dev/sda", "changed": 1000, "missed": 0, "blind": False}],
}


def a_row(**cells: Any) -> dict[str, Any]:
    """A good row of a kind that has no open limit, with some cells replaced."""
    row = {name: copy.deepcopy(GOOD) for name in catalogue.OPERATIONS}
    row["passthrough"]["marked"] = 4096
    row.update(cells)
    return {"kind": "scsi", "cells": row}


def test_a_good_row_has_no_problems() -> None:
    assert verdict.problems(a_row()) == []
    assert verdict.problems(a_row(erase={"not_offered": "EOPNOTSUPP"})) == []
    assert verdict.problems(a_row(discard={**GOOD, "changed": 0})) == []


@pytest.mark.parametrize(
    ("name", "cell", "says"),
    [
        ("write", {**GOOD, "missed": 1}, "1 of 1000 changed sectors were missed"),
        ("ext4", {**GOOD, "missed": 7}, "7 of 1000"),
        ("write", {**GOOD, "changed": 0}, "nothing changed"),
        ("write", {**GOOD, "marked": 1051}, "1051 sectors were marked"),
        ("swap", {**GOOD, "blind": True}, "blind"),
        ("passthrough", {**GOOD, "marked": 4095}, "did not mark the whole volume"),
        ("erase", {"not_offered": ""}, "nobody knows why"),
        ("fua", {**GOOD, "below": [{**GOOD["below"][0], "missed": 2}]}, "of /dev/sda were missed"),
        ("fua", {**GOOD, "below": [{**GOOD["below"][0], "blind": True}]}, "/dev/sda is blind"),
    ],
)
def test_what_must_not_be_is_told(name: str, cell: dict[str, Any], says: str) -> None:
    [problem] = verdict.problems(a_row(**{name: cell}))
    assert problem.startswith("scsi, ") and says in problem


def test_a_missing_cell_is_a_problem() -> None:
    row = a_row()
    del row["cells"]["swap"]
    assert verdict.problems(row) == ["scsi: no cell for swap"]


@pytest.mark.parametrize(
    ("row", "good"),
    [
        ({"kind": "zoned", "refused": {"code": "zoned", "message": "m", "hint": "h"}}, True),
        ({"kind": "zoned", "refused": {"code": "zoned", "message": "m", "hint": ""}}, False),
        ({"kind": "zoned", "refused": {"code": "rw_page", "message": "m", "hint": "h"}}, False),
        ({"kind": "scsi", "refused": {"code": "zoned", "message": "m", "hint": "h"}}, False),
        ({**a_row(), "kind": "zoned"}, False),
        ({"kind": "pmem", "absent": "no memory"}, True),
        ({"kind": "pmem", "absent": ""}, False),
        ({"kind": "scsi", "error": "Traceback"}, False),
    ],
)
def test_only_what_is_to_be_refused_may_be(row: dict[str, Any], good: bool) -> None:
    assert (verdict.problems(row) == []) == good


def test_a_race_is_one_with_writes_in_flight() -> None:
    good = {"wrong_sectors": 0, "reads_in_flight": 20, "partials": 1}
    assert verdict.problems_of_race(good) == []
    for key, value in (("wrong_sectors", 1), ("reads_in_flight", 19), ("partials", 0)):
        assert verdict.problems_of_race({**good, key: value})


def test_rows_and_columns_are_those_of_the_guest() -> None:
    assert sorted(sum(catalogue.COLUMNS, ())) == sorted(catalogue.OPERATIONS)
    assert set(catalogue.EACH_RUN) <= set(catalogue.DEVICES)
    for path, names in (("devices", catalogue.DEVICES), ("operations", catalogue.OPERATIONS)):
        source = (table.ROOT / f"tests/vm/kernel_guest/{path}.py").read_text()
        keys = source.partition("KINDS: dict" if path == "devices" else "OPERATIONS: dict")[2].partition("\n}\n")[0]
        found = [line.split('"')[1] for line in keys.splitlines()[1:] if line.startswith('    "')]
        assert sorted(found) == sorted(names), path


def test_the_page_shows_what_was_stored() -> None:
    text = table.PAGE.read_text()
    assert table.page(text, table.render(RESULTS)) == text, "run python -m tests.truth.table"
    changed = copy.deepcopy(RESULTS)
    changed[0]["rows"]["virtio"]["cells"]["write"]["changed"] += 1
    assert table.page(text, table.render(changed)) != text


@pytest.mark.parametrize("result", RESULTS, ids=lambda result: str(result["kernel"]))
def test_no_cell_is_empty_or_unexplained(result: dict[str, Any]) -> None:
    lines = [line for line in table.render([result]).splitlines() if line.startswith("|")]
    cells = [cell.strip() for line in lines for cell in line.strip("|").split("|")]
    assert all(cells) and "defect" not in " ".join(cells)
    for kind, row in result["rows"].items():
        assert not [name for name, cell in row.get("cells", {}).items() if cell.get("missed")], kind
        assert ("cells" in row) + ("refused" in row) + ("absent" in row) == 1, kind
        assert set(row.get("cells", {})) <= set(catalogue.OPERATIONS), kind
    assert not result["race"] or (result["race"]["wrong_sectors"] == 0 and result["race"]["reads_in_flight"] > 0)


def test_what_was_not_run_is_told() -> None:
    cell = {"changed": 1000, "missed": 0, "marked": 1000}
    result = {"kernel": "9.9", "seed": 1, "race": {}, "rows": {"scsi": {"cells": {"write": cell}}}}
    lines = table.render([result]).splitlines()
    [scsi, *_] = [line for line in lines if line.startswith(f"| {catalogue.DEVICES['scsi']} |")]
    assert "0/1,000 ×1.00" in scsi and scsi.count("not run yet") == len(catalogue.COLUMNS[0]) - 1
    for kind in set(catalogue.DEVICES) - {"scsi"}:
        assert f"| {catalogue.DEVICES[kind]} | not run yet | — |" in lines


def test_a_page_without_a_place_for_the_tables_is_an_error() -> None:
    with pytest.raises(ValueError, match="no markers"):
        table.page("text", "tables")
