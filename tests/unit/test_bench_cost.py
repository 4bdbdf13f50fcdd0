# SPDX-License-Identifier: GPL-3.0-or-later
"""The table of `make bench-kernel`: what is made of the runs, without a guest."""

from __future__ import annotations

import random
import statistics
import xml.etree.ElementTree as xml
from pathlib import Path
from typing import Any

import pytest

from lab import qemu
from tests.bench import costtable, figures


def test_the_interval_holds_the_median_and_narrows_with_more_values() -> None:
    generator = random.Random(7)
    few = [generator.gauss(100, 10) for _ in range(10)]
    many = [generator.gauss(100, 10) for _ in range(400)]
    for values in (few, many):
        found = figures.estimate(values)
        assert found.low < found.middle == statistics.median(values) < found.high
    small, large = figures.estimate(few), figures.estimate(many)
    assert large.high - large.low < (small.high - small.low) / 3


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    generator = random.Random(11)
    hits = 0
    for seed in range(120):
        found = figures.estimate([generator.lognormvariate(0, 0.5) for _ in range(21)], seed)
        hits += found.low <= 1 <= found.high
    assert 0.88 <= hits / 120 <= 1


def test_one_far_value_does_not_move_the_interval() -> None:
    usual = [100.0, 101, 99, 100, 102, 98, 100, 101, 99, 100]
    found = figures.estimate([*usual, 100000])
    assert 98 <= found.low and found.high <= 102


def test_there_is_no_negative_zero() -> None:
    assert figures.Estimate(-0.2, -1.4, 0.4).text(0) == "0 (-1 … 0)"


def test_too_few_values_have_no_interval() -> None:
    with pytest.raises(ValueError, match="two values"):
        figures.estimate([1.0])


def test_rounds_are_compared_with_each_other() -> None:
    assert figures.paired([11, 24], [10, 20], "difference") == [1, 4]
    assert figures.paired([11, 24], [10, 20], "ratio") == [1.1, 1.2]
    assert figures.paired([11, 24], [10, 20], "percent") == pytest.approx([10, 20])
    with pytest.raises(ValueError, match="1 values against 2"):
        figures.paired([1], [1, 2], "ratio")
    with pytest.raises(ValueError, match="sum"):
        figures.paired([1], [1], "sum")


def test_the_table_is_aligned() -> None:
    lines = figures.table(["disk", "n"], [["a long name", "1"], ["b", "234"]]).splitlines()
    assert lines == ["| disk        |   n |", "|-------------|----:|", "| a long name |   1 |", "| b           | 234 |"]


def run(case: str, state: str, number: int, ticks: int, **more: Any) -> dict[str, Any]:
    """What a run prints, of 100 requests."""
    told = {"case": case, "state": state, "round": number, "ticks": ticks, "count": 100, "idle_ns": 0, "pids_ns": []}
    return {**told, "latency": [1, 10, 100], "loop": 1000005, **more}


def test_idle_time_and_the_reader_are_no_part_of_the_io_path() -> None:
    told = run("null 1", "attached", 0, 100_000, idle_ns=20_000, pids_ns=[30_000], reader_all_ns=35_000)
    assert costtable.instructions(told) == 500
    assert costtable.reader(told) == 350


def result() -> dict[str, Any]:
    """Runs whose figures can be worked out in the head."""
    counted = []
    for number in (1, 0):  # the order of the lines must not matter
        drift = 1000 * number
        counted += [run("null 32", state, number, 100_000 + drift) for state in ("bare", "loaded", "again")]
        attached = run("null 32", "attached", number, 102_500 + drift, reader_all_ns=40_000, widened=0)
        counted += [attached]
    timed = [run("null 32", state, number, 50_000) for state in ("bare", "again") for number in (0, 1)]
    timed += [run("null 32", "attached", number, 62_500, latency=[1, 20, 9]) for number in (0, 1)]
    peer = [run("drbd-C 1", "bare", number, 10_000) for number in (0, 1)]
    peer += [run("drbd-C 1", "peer", number, 80_000, count=200, latency=[1, 45, 9]) for number in (0, 1)]
    facts = {"date": "2026-01-01", "commits": {"wall": "abc"}, "kernel": "6.1", "host_cpus": 2}
    return {**facts, "instructions": counted, "peer_instructions": peer, "wall": timed, "peer_wall": peer}


def test_the_rows_say_what_the_runs_say() -> None:
    tracked, equal, peer = costtable.rows(result())
    assert tracked[0] == "bmigrate: null_blk, 32"
    assert tracked[1:5] == ["1005 (1000 … 1010)", "0 (0 … 0)", "0 (0 … 0)", "25 (25 … 25)"]
    assert tracked[5].startswith("2.49 (2.48") and tracked[6] == "400 (400 … 400)"
    assert tracked[7:] == ["0.800 (0.800 … 0.800)", "2.00 (2.00 … 2.00)"]
    assert equal[7] == "1.000 (1.000 … 1.000)"
    assert peer[0] == "DRBD 8.4, protocol C, 1"
    assert peer[4:6] == ["300 (300 … 300)", "300 (300 … 300)"] and peer[6] == ""
    assert peer[7:] == ["0.250 (0.250 … 0.250)", "4.50 (4.50 … 4.50)"]


def test_a_peer_that_was_only_timed_has_its_row() -> None:
    told = result()
    told["peer_instructions"] = []
    row = costtable.rows(told)[-1]
    assert row[:7] == ["DRBD 8.4, protocol C, 1", *[""] * 6] and row[7] == "0.250 (0.250 … 0.250)"


def test_the_plot_is_xml_and_has_all_bars() -> None:
    root = xml.fromstring(costtable.picture(result()).encode())
    bars = [item for item in root.iter() if item.tag.endswith("rect") and item.get("class") == "bar"]
    assert len(bars) == 1 + 2 + 3
    widths = [float(item.get("width", "nan")) for item in bars]
    assert all(0 <= width <= 380 for width in widths) and max(widths) > 300


def test_docs_are_written_between_the_marks_and_again(tmp_path: Path) -> None:
    page = tmp_path / "kernel-cost.md"
    page.write_text(f"before\n{costtable.BEGIN}\nold\n{costtable.END}\nafter\n")
    costtable.write_docs(result(), tmp_path)
    first = page.read_text()
    assert "old" not in first and first.startswith("before\n") and first.endswith("\nafter\n")
    costtable.write_docs(result(), tmp_path)
    assert page.read_text() == first
    with pytest.raises(ValueError, match="two comments"):
        costtable.with_table("nothing here", "new")


def test_a_guest_that_counts_has_one_processor_and_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    ports = qemu.Ports(1, 2, 3)
    monkeypatch.setenv("BMIGRATE_LAB_CPUS", "2")
    monkeypatch.setenv("BMIGRATE_LAB_ICOUNT", "1")
    argv = qemu.arguments("beta", 2, ports, 4, Path("vmlinuz"), "x")
    assert argv[argv.index("-smp") + 1] == "1"
    assert "shift=0,align=off,sleep=on" == argv[argv.index("-icount") + 1]
    assert argv[argv.index("-accel") + 1].startswith("tcg,thread=single")
    assert "tsc_early_khz=1000000" in argv[argv.index("-append") + 1]
    monkeypatch.setenv("BMIGRATE_LAB_ICOUNT", "0")
    argv = qemu.arguments("beta", 2, ports, 4, Path("vmlinuz"), "x")
    assert "-icount" not in argv and argv[argv.index("-smp") + 1] == "2"
