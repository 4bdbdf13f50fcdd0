# SPDX-License-Identifier: GPL-3.0-or-later
"""``make bench``: every benchmark of the data path, one table of all ratios with their spreads, and the plots.

Each benchmark runs as a process of its own, so that none is measured in the memory of another; what it said is kept in
build/bench. With --write the table goes into docs/performance.md, and the plots beside it, with the commit and the
machine that they are of. Promises: all benchmarks are in a table that is written; what was not measured now comes from
build/bench, and if one is missing or has failed, nothing is written and its name is said.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.bench.figures import Bar, Curve, Panel, curves, estimate, plot, table

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "build" / "bench"
PAGE = ROOT / "docs" / "performance.md"
MIB = 1 << 20
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"


class Row(NamedTuple):
    """One line of the table: what, a value of each round, what it is held against, and how it reads."""

    what: str
    values: list[float]
    target: str
    holds: bool | None
    command: str


class Benchmark(NamedTuple):
    """A benchmark and what of its answer stands in the table."""

    name: str
    module: str
    arguments: tuple[str, ...]
    rows: Callable[[Any, str], list[Row]]

    @property
    def command(self) -> str:
        """As an operator would type it."""
        return shlex.join(("python", "-m", self.module, *self.arguments))


def _least(values: Sequence[float], bound: float) -> bool:
    return statistics.median(values) >= bound


def _most(values: Sequence[float], bound: float) -> bool:
    return statistics.median(values) <= bound


def _records(found: Any, command: str) -> list[Row]:
    cases = found["cases"]
    millions = [value / 1e6 for value in cases["uniform"]["records_per_second"]]
    mix = [value / 1e6 for value in cases["mix"]["blocks_per_second"]]
    rows = [
        Row("breqd: million records/s on a core, one block each, 1 TiB", millions, "≥ 5", _least(millions, 5), command),
        Row("breqd: million blocks/s, records of 1 block to 1 MiB", mix, "", None, command),
    ]
    for item in found["amplification"]:
        ratio = [item["shipped_over_written"]]
        what = f"breqd: shipped / written, random 4 KiB writes, {int(item['size_bytes']) >> 40} TiB, granule `auto`"
        rows.append(Row(what, ratio, "≤ 1.1", _most(ratio, 1.1), command))
    for volumes in (1, 256):
        share = [100 * value for value in cases[f"share_{volumes}"]["share_of_core"]]
        what = f"breqd: % of a core at 100,000 requests/s, {volumes} volume{'s' if volumes > 1 else ''}"
        rows.append(Row(what, share, "≤ 3", _most(share, 3), command))
    beside = [(found["memory"]["resident_bytes"] - found["memory"]["maps_bytes"]) / MIB]
    rows.append(Row("breqd: MiB resident beside the maps, 1 TiB", beside, "≤ 64", _most(beside, 64), command))
    return rows


def _shipping(what: str, target: float | None) -> Callable[[Any, str], list[Row]]:
    def rows(found: Any, command: str) -> list[Row]:
        ratios = found["ratios"]
        rate = [value / MIB for value in found["shipped_bytes_per_second"]]
        return [
            Row(
                f"{what} / `dd \\| ssh dd`",
                ratios,
                f"≥ {target}" if target else "",
                _least(ratios, target) if target else None,
                command,
            ),
            Row(f"{what}: MiB/s", rate, "", None, command),
        ]

    return rows


def _streams(found: Any, command: str) -> list[Row]:
    rows = []
    for name, case in found.items():
        delay = f"{1000 * case['delay_seconds']:.0f} ms of delay each way"
        link = delay if case["delay_seconds"] else name
        rate = [value / MIB for value in case["bytes_per_second"]["1"]]
        rows.append(Row(f"seed with 1 stream, {link}: MiB/s", rate, "", None, command))
        for count, ratios in case["ratios"].items():
            judged = case["delay_seconds"] > 0  # with a core for each, they would help on the loopback too
            held = statistics.median(ratios) > 1 if judged else None
            rows.append(
                Row(f"seed with {count} streams / with 1, {link}", ratios, "> 1" if judged else "", held, command)
            )
    return rows


def _scattered(found: Any, command: str) -> list[Row]:
    ratios, rate = found["ratios"], [value / MIB for value in found["bytes_per_second"]]
    faster = statistics.median(ratios) > 1
    return [
        Row("scattered blocks of 4 KiB on a disk: MiB/s", rate, "", None, command),
        Row("scattered blocks, several at a time / one after the other", ratios, "> 1", faster, command),
    ]


def _compression(found: Any, command: str) -> list[Row]:
    random, text = found["random"]["ratios"], found["text"]["ratios"]
    limit = found["text"]["limit_bytes_per_second"] // MIB
    return [
        Row("seed of random data, zstd / none, speed", random, "≥ 0.95", _least(random, 0.95), command),
        Row(f"seed of text at {limit} MiB/s, zstd / none, speed", text, "> 1", statistics.median(text) > 1, command),
    ]


def _tools(found: Any, command: str) -> list[Row]:
    return [
        Row("rsync --whole-file --inplace / seed, times", found["ratios"]["seed"], "", None, command),
        Row("rsync by checksums / resync, 1 % differs, times", found["ratios"]["resync"], "", None, command),
        Row("rdiff, three steps / resync, 1 % differs, times", found["ratios"]["rdiff"], "", None, command),
    ]


def _drain(found: Any, command: str) -> list[Row]:
    rows = []
    for item in found:
        ratios = [value / item["bound_seconds"] for value in item["durable_seconds"]]
        what = f"drain of {item['left_bytes'] // MIB} MiB / (300 ms + bytes at the link's rate)"
        rows.append(Row(what, ratios, "≤ 1", _most(ratios, 1), command))
    return rows


def _convergence(found: Any, command: str) -> list[Row]:
    rows = []
    for ratio in sorted({item["ratio_wanted"] for item in found}):
        mine = [item for item in found if item["ratio_wanted"] == ratio]
        shipped = [item["shipped_volumes"] / item["model_volumes"] for item in mine]
        walked = [item["shipped_volumes"] / item["walk_volumes"] for item in mine]
        left = [item["residual_bytes"] / item["model_residual_bytes"] for item in mine]
        of = f"writes at {ratio:.2f} of the ship rate"
        expected = mine[0]["model_residual_bytes"] / 1024
        rows += [
            Row(f"shipped / model, {of}", shipped, "≤ 1.1", _most(shipped, 1.1), command),
            Row(f"shipped / walk, {of}", walked, "", None, command),
            Row(f"left for the drain / model ({expected:,.0f} KiB), {of}", left, "", None, command),
        ]
    return rows


def _resync(found: Any, command: str) -> list[Row]:
    names = {
        "verify": "verify",
        "resync_equal": "resync, nothing differs",
        "resync_1_percent": "resync, 1 % of the blocks at random differ",
    }
    rows = []
    for place, bound, against, judged in (
        ("limited", "alone", "the lower of read and hash", True),
        ("disk", "side_by_side", "two readers of the disk, or the hash", False),
        ("memory", "side_by_side", "the hash alone", False),
        ("memory", "work", "nothing but reading and hashing", False),
    ):
        for name, what in names.items():
            values = found[place]["ratios"][bound][name]
            wanted = judged and name != "resync_1_percent"
            held = _least(values, 0.9) if wanted else None
            where = {"limited": "two disks", "disk": "one disk for both ends"}.get(place, place)
            text = f"{what}, {where}, by {found[place]['hash']} / {against}"
            rows.append(Row(text, values, "≥ 0.9" if wanted else "", held, command))
    for place, where in (("limited", "two disks"), ("disk", "one disk for both ends"), ("memory", "memory")):
        rates = [value / MIB for value in found[place]["bytes_per_second"]["verify"]]
        rows.append(Row(f"verify, {where}: MiB/s", rates, "", None, command))
    return rows


def _pacing(found: Any, command: str) -> list[Row]:
    ours, share = found["foreground_ratios"], found["seed_shares"]
    barriers = [1000 * value for value in found["barrier_seconds"]]
    return [
        Row("throttled disk: foreground beside the seed / alone", ours, "≥ 0.95", _least(ours, 0.95), command),
        Row("throttled disk: seed / what the foreground leaves", share, "≥ 0.7", _least(share, 0.7), command),
        Row("throttled disk: mean time of a write / alone", found["latency_ratios"], "", None, command),
        Row("throttled disk: time until 99 % of the writes are done / alone", found["p99_ratios"], "", None, command),
        Row("drain on emulated guests: its barriers, ms", barriers, "", None, command),
    ]


def _tracking(found: Any, command: str) -> list[Row]:
    return [
        Row("tracked / bare, 4 KiB random writes in a guest", found["tracked"], "", None, command),
        Row("bare / bare, the same", found["bare"], "", None, command),
    ]


BENCHMARKS = (
    Benchmark("records", "tests.bench.records", (), _records),
    Benchmark("shipping", "tests.bench.shipping", (), _shipping("seed of random data", 0.9)),
    Benchmark(
        "shipping-paramiko",
        "tests.bench.shipping",
        ("--mib", "512", "--rounds", "3", "--extra", "transport: paramiko"),
        _shipping("seed of random data, transport paramiko", None),
    ),
    Benchmark("compression", "tests.bench.compression", (), _compression),
    Benchmark("streams", "tests.bench.streams", (), _streams),
    Benchmark("scattered", "tests.bench.scattered", (), _scattered),
    Benchmark("tools", "tests.bench.tools", (), _tools),
    Benchmark("drain", "tests.bench.drain", (), _drain),
    Benchmark("convergence", "tests.bench.convergence", ("--mib", "64", "--rounds", "2"), _convergence),
    Benchmark("resync", "tests.bench.resync", (), _resync),
    Benchmark("pacing", "tests.bench.pacing", (), _pacing),
    Benchmark("tracking", "tests.bench", (), _tracking),
)


def commit_now() -> str:
    """What is measured: the commit, with a word when files differ from it."""
    argv = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True).stdout.strip()


def commits_of(names: Sequence[str]) -> str:
    """Which commit each of these was measured at, by what was kept; one for all, or each with its benchmarks."""
    by_commit: dict[str, list[str]] = {}
    for name in names:
        by_commit.setdefault(json.loads((RESULTS / f"{name}.json").read_text())["commit"], []).append(name)
    if len(by_commit) == 1:
        return f"Commit {next(iter(by_commit))}"
    return "Commits " + ", ".join(f"{commit} ({', '.join(of)})" for commit, of in by_commit.items())


def run(benchmark: Benchmark) -> Any:
    """Run one, keep what it said, and return it."""
    print(f"# {benchmark.command}", file=sys.stderr, flush=True)
    began, commit = time.monotonic(), commit_now()
    argv = [sys.executable, "-m", benchmark.module, *benchmark.arguments, "--json"]
    done = subprocess.run(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.strip().splitlines()[-1])
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{benchmark.name}.json").write_text(json.dumps({"commit": commit, "found": found}) + "\n")
    print(f"  {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    return found


def lines(rows: Sequence[Row]) -> str:
    """The table, as Markdown."""

    def number(value: float) -> str:
        return f"{value:.0f}" if value >= 100 else f"{value:.3g}"

    cells = []
    for row in rows:
        verdict = "" if row.holds is None else "yes" if row.holds else "**no**"
        middle = number(statistics.median(row.values))
        cells.append(
            [
                row.what,
                middle,
                f"{number(min(row.values))} … {number(max(row.values))}",
                str(len(row.values)),
                row.target,
                verdict,
            ]
        )
    return table(["", "median", "spread", "rounds", "wanted", "held"], cells)


def notes(found: dict[str, Any]) -> list[str]:
    """What the numbers are of and no row can say, below the table."""
    made = []
    if "pacing" in found:
        of = found["pacing"]
        offered, chosen = of["scheduler"], re.search(r"\[(.*?)\]", of["scheduler"])
        name = f"`{chosen[1]}` (of {offered})" if chosen else f"`{offered}`"
        rate = of["capacity_bytes_per_second"] / MIB
        made.append(f"Throttled disk: I/O scheduler {name}; QEMU holds the disk to {rate:.0f} MiB/s.")
        writes = {name: [1000 * run["mean_seconds"] for run in of["runs"][name]] for name in ("bare", "shipped")}
        made.append(
            f"A write of 16 KiB there takes {statistics.median(writes['bare']):.1f} ms alone and "
            f"{statistics.median(writes['shipped']):.1f} ms beside the seed, by the mean of each round."
        )
    return made


def pictures(found: dict[str, Any]) -> dict[str, str]:
    """File name -> SVG, of what was measured."""
    made = {}
    bars = []
    for name, label in (("shipping", "openssh"), ("shipping-paramiko", "paramiko")):
        if name in found:
            middle = estimate(found[name]["ratios"])
            bars.append(Bar(f"seed over {label} / dd | ssh dd", middle, middle.text(2)))
    for name, label in (("verify", "verify / read or hash"), ("resync_equal", "resync / read or hash")):
        if "resync" in found:
            middle = estimate(found["resync"]["limited"]["ratios"]["alone"][name])
            bars.append(Bar(label, middle, middle.text(2)))
    if "pacing" in found:
        for name, label in (
            ("foreground_ratios", "foreground beside a seed / alone"),
            ("seed_shares", "seed / what is left of the disk"),
        ):
            middle = estimate(found["pacing"][name])
            bars.append(Bar(label, middle, middle.text(2)))
    if bars:
        top = max(2.0, *(bar.estimate.high for bar in bars))
        made["performance.svg"] = plot(
            "Against the bare run of the same session", [Panel("ratio", bars, top, 1.0, "as fast")]
        )
    if "convergence" in found:
        # One run of each ratio: the later ones look the same.
        first = {item["ratio_wanted"]: item for item in reversed(found["convergence"])}
        drawn = []
        for ratio in sorted(first):
            points = [(at, left / MIB) for at, _, left in first[ratio]["curve"]]
            drawn.append(Curve(f"writes at {ratio:.2f} of the ship rate", points))
        for number, ratio in enumerate(sorted(first)):
            points = [(at, left / MIB) for at, left in first[ratio]["model_curve"]]
            drawn.append(Curve("", points, model_of=number))
        title = "What is left while passes go on under writes"
        made["convergence.svg"] = curves(title, "seconds", "MiB left", drawn)
    return made


def page(text: str, of: str, rows: Sequence[Row], commands: Sequence[str], below: Sequence[str] = ()) -> str:
    """docs/performance.md with another table in it.

    Args:
        of: which commits were measured. below: lines after the table.

    Raises:
        ValueError: the page has no place for it.
    """
    if BEGIN not in text or END not in text:
        raise ValueError("the page has no place for the table")
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        "",
    )
    of = f"{of}; {os.cpu_count()} cores, {model}; guests emulated (TCG)."
    said = "".join(f"{line}\n\n" for line in below)
    made_by = "".join(f"    {command}\n" for command in commands)
    body = f"{BEGIN}\n{of}\n\n{lines(rows)}\n\n{said}Made by:\n\n{made_by}{END}"
    return re.sub(re.escape(BEGIN) + ".*?" + re.escape(END), lambda _: body, text, flags=re.DOTALL)


def gather(
    wanted: Sequence[str], again: bool, whole: bool, measure: Callable[[Benchmark], Any] = run
) -> tuple[dict[str, Any], dict[str, str]]:
    """Measure, or take what was kept.

    Args:
        wanted: names of those to measure. again: measure none. whole: the others too, from what was kept.

    Returns:
        what was found, by name, and why nothing was of others.
    """
    found: dict[str, Any] = {}
    failed: dict[str, str] = {}
    for benchmark in BENCHMARKS:
        name, kept = benchmark.name, RESULTS / f"{benchmark.name}.json"
        if name not in wanted and not whole:
            continue
        try:
            fresh = name in wanted and not again
            found[name] = measure(benchmark) if fresh else json.loads(kept.read_text())["found"]
        except FileNotFoundError:
            failed[name] = f"there is no {kept.name} in build/bench: measure it, with `--only {name}`"
        except (subprocess.CalledProcessError, ValueError, IndexError, KeyError) as error:
            # The others are measured all the same: each takes minutes.
            failed[name] = f"failed: {error}"
    return found, failed


def main() -> int:
    """Command line; exit status 1 when one is missing or failed, or a wanted ratio was not held."""
    parser = argparse.ArgumentParser(prog="python3 -m tests.bench.everything", description=__doc__)
    names = [benchmark.name for benchmark in BENCHMARKS]
    parser.add_argument("--only", action="append", choices=names, help="only this one; may be repeated")
    parser.add_argument("--again", action="store_true", help="measure nothing: use what build/bench has")
    parser.add_argument("--write", action="store_true", help="write the table and the plots to docs")
    options = parser.parse_args()
    found, failed = gather(options.only or names, options.again, options.write)
    shown = [benchmark for benchmark in BENCHMARKS if benchmark.name in found]
    rows = [row for benchmark in shown for row in benchmark.rows(found[benchmark.name], benchmark.command)]
    if rows:
        print(lines(rows))
    for line in notes(found):
        print(line)
    for name, why in failed.items():
        print(f"{name}: {why}", file=sys.stderr)
    if failed and options.write:
        print("nothing was written", file=sys.stderr)
    write = options.write and not failed
    where = PAGE.parent if write else RESULTS
    where.mkdir(parents=True, exist_ok=True)
    for name, text in pictures(found).items():
        (where / name).write_text(text)
        print(f"drawn: {where.relative_to(ROOT) / name}", file=sys.stderr)
    if write:
        commands = [benchmark.command for benchmark in shown]
        of = commits_of([benchmark.name for benchmark in shown])
        PAGE.write_text(page(PAGE.read_text(), of, rows, commands, notes(found)))
    return 1 if failed or any(row.holds is False for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
