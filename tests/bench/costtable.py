# SPDX-License-Identifier: GPL-3.0-or-later
"""From the runs of `make bench-kernel` to its table, its plot, and their place in docs/.

A run is what guest/session.py prints. Instructions of a run are the counter's advance, without what the processor slept
and without what the reader had; nothing else is taken off.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.bench.figures import Bar, Estimate, Panel, estimate, paired, plot, table

Run = dict[str, Any]
BEGIN, END = "<!-- begin of what make bench-kernel wrote -->", "<!-- end of what make bench-kernel wrote -->"
TARGET_PERCENT = 1.5

TRACKED = {"null": "bmigrate: null_blk", "linear-null": "bmigrate: dm-linear on null_blk"}
PEERS = {"drbd-C": "DRBD 8.4, protocol C", "drbd-A": "DRBD 8.4, protocol A", "raid1-nbd": "md raid1 over nbd"}
HEADER = (
    "4 KiB writes, depth",
    "bare",
    "bare again",
    "loaded, not attached",
    "replicated or attached",
    "the same in %",
    "reader",
    "IOPS",
    "p99",
)


def instructions(run: Run) -> float:
    """Instructions per request, the reader's not included."""
    return float(run["ticks"] - run["idle_ns"] - sum(run["pids_ns"])) / float(run["count"])


def reader(run: Run) -> float:
    """The reader's instructions per request, until it had consumed the last record."""
    return float(run["reader_all_ns"]) / float(run["count"])


def requests_per_tick(run: Run) -> float:
    """Speed; only good for ratios."""
    return float(run["count"]) / float(run["ticks"])


def p99(run: Run) -> float:
    """99th percentile of the latency, in ticks."""
    return float(run["latency"][1])


def of(runs: Sequence[Run], case: str, state: str) -> list[Run]:
    """The runs of a case in a state, by round."""
    return sorted((r for r in runs if (r["case"], r["state"]) == (case, state)), key=lambda r: int(r["round"]))


def compare(runs: Sequence[Run], case: str, state: str, value: Any, kind: str) -> Estimate | None:
    """A state against bare, round by round; None if there are no such runs."""
    ones, others = of(runs, case, state), of(runs, case, "bare")
    if not ones:
        return None
    return estimate(paired([value(run) for run in ones], [value(run) for run in others], kind))


def _cell(found: Estimate | None, digits: int) -> str:
    return "" if found is None else found.text(digits)


def _row(label: str, case: str, counted: Sequence[Run], timed: Sequence[Run], state: str) -> list[str]:
    bare = [instructions(run) for run in of(counted, case, "bare")]
    readers = [reader(run) for run in of(counted, case, state) if "reader_all_ns" in run]
    return [
        f"{label}, {case.rpartition(' ')[2]}",
        _cell(estimate(bare) if bare else None, 0),
        _cell(compare(counted, case, "again", instructions, "difference"), 0),
        _cell(compare(counted, case, "loaded", instructions, "difference"), 0),
        _cell(compare(counted, case, state, instructions, "difference"), 0),
        _cell(compare(counted, case, state, instructions, "percent"), 2 if state == "attached" else 0),
        _cell(estimate(readers) if readers else None, 0),
        _cell(compare(timed, case, state, requests_per_tick, "ratio"), 3),
        _cell(compare(timed, case, state, p99, "ratio"), 2),
    ]


def _cases(runs: Sequence[Run], names: Sequence[str]) -> list[tuple[str, str]]:
    """(name, case) of what was run, in the order of names."""
    ran = list(dict.fromkeys(run["case"] for run in runs))
    return [(name, case) for name in names for case in ran if case.rpartition(" ")[0] == name]


def rows(result: dict[str, Any]) -> list[list[str]]:
    """The table, without its header."""
    made = []
    for name, case in _cases(result["instructions"], list(TRACKED)):
        made.append(_row(TRACKED[name], case, result["instructions"], result["wall"], "attached"))
    for _, case in _cases(result["wall"], ["null"]):
        again = [compare(result["wall"], case, "again", value, "ratio") for value in (requests_per_tick, p99)]
        label = f"equal rounds: null_blk, {case.rpartition(' ')[2]}"
        made.append([label, *[""] * 6, _cell(again[0], 3), _cell(again[1], 2)])
    # A case that was only timed, or only counted, has its row too.
    for name, case in _cases([*result["peer_wall"], *result["peer_instructions"]], list(PEERS)):
        made.append(_row(PEERS[name], case, result["peer_instructions"], result["peer_wall"], "peer"))
    return made


def facts(result: dict[str, Any]) -> str:
    """One line: where the numbers come from."""
    counted = ("instructions", "peer_instructions")
    rounds = {key: 1 + max(run["round"] for run in result[key]) for key in (*counted, "wall")}
    loops = {run["loop"] for key in counted for run in result[key]}
    commits = " and ".join(sorted(set(result["commits"].values())))
    widened = sum(run.get("widened", 0) for key in ("instructions", "wall") for run in result[key])
    return (
        f"{result['date']}, commit {commits}, guest kernel {result['kernel']}, host with "
        f"{result['host_cpus']} processors and without KVM; {rounds['instructions']} rounds for instructions "
        f"({rounds['peer_instructions']} for the peers), {rounds['wall']} pairs on the wall clock. A loop of 1,000,000 "
        f"instructions was counted as {min(loops):,} to {max(loops):,}; {widened} batches had widened records."
    )


def text(result: dict[str, Any]) -> str:
    """What is printed, and written into the document."""
    return f"{facts(result)}\n\n{table(HEADER, rows(result))}"


def _bars(result: dict[str, Any], key: str, names: dict[str, str], state: str, value: Any, kind: str) -> list[Bar]:
    bars = []
    for name, case in _cases(result[key], list(names)):
        found = compare(result[key], case, state, value, kind)
        if found is not None:
            digits = 2 if kind == "percent" or found.middle < 10 else 0
            bars.append(Bar(f"{names[name]}, {case.rpartition(' ')[2]}", found, found.text(digits)))
    return bars


def _total(run: Run) -> float:
    return instructions(run) + (reader(run) if "reader_all_ns" in run else 0)


def picture(result: dict[str, Any]) -> str:
    """The plot."""
    path = _bars(result, "instructions", TRACKED, "attached", instructions, "percent")
    null = {"null": "bmigrate (reader included)"}
    work = _bars(result, "instructions", null, "attached", _total, "ratio")
    work += _bars(result, "peer_instructions", PEERS, "peer", instructions, "ratio")
    speed = _bars(result, "wall", {"null": "equal rounds"}, "again", requests_per_tick, "ratio")
    speed += _bars(result, "wall", {"null": "bmigrate"}, "attached", requests_per_tick, "ratio")
    speed += _bars(result, "peer_wall", PEERS, "peer", requests_per_tick, "ratio")
    return plot(
        "What replication costs a 4 KiB write (label: queue depth)",
        [
            Panel(
                "More instructions in the I/O path while attached, %",
                path,
                _top(path),
                TARGET_PERCENT,
                f"target {TARGET_PERCENT} %",
            ),
            Panel("Instructions on the primary for each write, bare = 1", work, _top(work), 1, "bare"),
            Panel("Writes per second, bare = 1", speed, _top(speed), 1, "bare"),
        ],
    )


def _top(bars: Sequence[Bar]) -> float:
    return 1.05 * max(bar.estimate.high for bar in bars)


def write_docs(result: dict[str, Any], docs: Path) -> None:
    """Replace the table in docs/kernel-cost.md, and docs/kernel-cost.svg.

    Raises ValueError: the document has lost the two comments between which the table belongs.
    """
    page = docs / "kernel-cost.md"
    page.write_text(with_table(page.read_text(), text(result)))
    (docs / "kernel-cost.svg").write_text(picture(result))


def with_table(page: str, new: str) -> str:
    """The page with other text between its two comments. Raises ValueError: it has not both, in this order."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError("the two comments of make bench-kernel are not in the page")
    return f"{before}{BEGIN}\n\n{new}\n\n{END}{after}"
