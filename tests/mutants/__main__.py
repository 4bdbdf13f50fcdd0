# SPDX-License-Identifier: GPL-3.0-or-later
"""``python -m tests.mutants``: sabotage the programs on purpose, and show which test notices.

Each mutant is the tree with one rule broken. In normal operation it must look healthy (the quiet test passes), and a
named test must fail on the very assertion that tells of lost data. Only both together show that the rule is needed and
watched. The tree without sabotage must pass all the same tests. Nothing in the tree is changed: it runs in copies.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import textwrap
import time
from dataclasses import dataclass, replace
from pathlib import Path

from lab import Lab
from tests.mutants import checks, tree
from tests.mutants.catalogue import FAILOVER, MUTANTS, Mutant

EXAMPLES = """
examples:
  make test-mutants                             all of them; boots the lab for those of the kernel modules
  python -m tests.mutants --user-space          those that need no guest; some minutes
  python -m tests.mutants --only clear-on-send  one of them; may be given more than once
  python -m tests.mutants --quick               without the failovers: a quiet seed and drain only

With guests, the lab instance is BMIGRATE_LAB's, or `mutants`; it must not be in use by anybody else.
The exit code is 0 only if every mutant passed its quiet tests and failed on the assertion that it is named for.
The table is explained in docs/mutants.md.
"""


#: The tests of the kernel modules leave their host as it was, and one boot serves them all; so it does for the
#: failovers of the programs' mutants, which install one over the other.
ONE_BOOT = {"BMIGRATE_LAB_KEEP": "1"}
#: A module in use is not replaced: the failovers of the modules' mutants have guests of their own.
FRESH = {"BMIGRATE_LAB_KEEP": "0"}


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    quiet: str
    failover: str
    named: str
    failed_on: str
    verdict: str


def make(mutant: Mutant, directory: Path) -> Path:
    """The tree with this sabotage in it."""
    copy = directory / "tree"
    copy.mkdir(parents=True)
    tree.copy(copy)
    tree.apply(mutant.patch, copy)
    return copy


def check(mutant: Mutant, directory: Path) -> Row:
    """Make one mutant and run its quiet test and the one that must notice.

    Args:
        directory: for the copy of the tree and the logs.
    """
    copy = make(mutant, directory)
    name = mutant.named.rpartition("::")[2]
    quiet = checks.run(copy, [mutant.quiet], directory / "quiet.log", ONE_BOOT)
    if quiet.kind != "passed":
        return Row(mutant.name, f"{quiet.kind}: {quiet.message}", "not run", name, "not run", "NOT QUIET")
    outcome = checks.run(copy, [mutant.named], directory / "named.log", ONE_BOOT)
    if outcome.kind == "passed":
        return Row(mutant.name, "passed", "not run", name, "nothing: it passed", "NOT CAUGHT")
    verdict = "caught" if outcome.shows(mutant.expected) else "FAILED OTHERWISE"
    return Row(mutant.name, "passed", "not run", name, outcome.message, verdict)


def check_clean(mutants: list[Mutant], directory: Path) -> Row:
    """The tree without sabotage must pass every test that is used."""
    copy = directory / "tree"
    copy.mkdir(parents=True)
    tree.copy(copy)
    nodes = sorted({node for mutant in mutants for node in (mutant.quiet, mutant.named)})
    outcome = checks.run(copy, nodes, directory / "all.log", ONE_BOOT)
    verdict = "clean" if outcome.kind == "passed" else "TREE IS NOT CLEAN"
    return Row("(no sabotage)", outcome.kind, "not run", f"all {len(nodes)}", outcome.message or "nothing", verdict)


def fail_over(row: Row, directory: Path, environment: dict[str, str]) -> Row:
    """The row with the result of a seed and a quiet failover in it, by the tree that was made for it."""
    outcome = checks.run(directory / "tree", [FAILOVER], directory / "failover.log", environment)
    if outcome.kind == "passed":
        return replace(row, failover="passed")
    verdict = row.verdict if row.verdict not in ("caught", "clean") else "NOT QUIET"
    return replace(row, failover=f"{outcome.kind}: {outcome.message}", verdict=verdict)


def table(rows: list[Row], width: int = 72) -> str:
    """The rows as text; what a test failed on is cut to `width` characters."""
    head = Row("mutant", "quiet", "failover", "named test", "failed on", "verdict")
    lines = []
    for row in (head, *rows):
        lines.append([textwrap.shorten(cell, width, placeholder=" ...") for cell in vars(row).values()])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    lines.insert(1, ["-" * size for size in widths])
    return "\n".join(" | ".join(cell.ljust(size) for cell, size in zip(line, widths)).rstrip() for line in lines)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutants",
        description=__doc__.partition("\n\n")[2] if __doc__ else "",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [mutant.name for mutant in MUTANTS]
    parser.add_argument("--list", action="store_true", help="name the mutants and the loss that each brings; run none")
    parser.add_argument("--only", action="append", choices=names, metavar="NAME", help="only this one; see --list")
    parser.add_argument("--user-space", action="store_true", help="only those that need no guest")
    parser.add_argument("--quick", action="store_true", help="no failover.yml in the lab for each")
    parser.add_argument("--keep", metavar="DIRECTORY", type=Path, help="leave copies and logs there; must not exist")
    return parser.parse_args(argv)


def run(chosen: list[Mutant], keep: Path | None, box: Lab | None) -> list[Row]:
    """Run the tree without sabotage, then each mutant; says on stderr where it is.

    Args:
        keep: a new directory for copies and logs; None: a temporary one.
        box: the lab in which each tree also fails over; None: none does.
    """
    rows = []
    with tempfile.TemporaryDirectory(prefix="mutants-") as temporary:
        base = Path(keep or temporary).resolve()
        base.mkdir(parents=True, exist_ok=keep is None)
        began = time.monotonic()

        def tell(name: str) -> None:
            print(f"[{time.monotonic() - began:5.0f} s] {name}", file=sys.stderr, flush=True)

        tell("the tree without sabotage")
        rows.append(check_clean(chosen, base / "clean"))
        for mutant in chosen:
            tell(mutant.name)
            rows.append(check(mutant, base / mutant.name))
        if box is not None:
            places = [(base / "clean", ONE_BOOT)]
            places += [(base / mutant.name, FRESH if mutant.guests else ONE_BOOT) for mutant in chosen]
            box.down()
            # Those with guests of their own first: they leave none behind.
            for number in sorted(range(len(rows)), key=lambda number: places[number][1] != FRESH):
                tell(f"{rows[number].name}: failover")
                rows[number] = fail_over(rows[number], *places[number])
    return rows


def main(argv: list[str] | None = None) -> int:
    """Run what the command line names; 0 only if all were caught."""
    options = parse(argv)
    chosen = [mutant for mutant in MUTANTS if not options.only or mutant.name in options.only]
    chosen = [mutant for mutant in chosen if not (options.user_space and mutant.guests)]
    if options.list:
        for mutant in chosen:
            print(f"{mutant.name}{' (needs guests)' if mutant.guests else ''}\n    {mutant.loss()}\n    {mutant.named}")
        return 0
    if not chosen:
        print("no mutant is left: those named by --only need guests, and --user-space was given", file=sys.stderr)
        return 2
    box = Lab(os.environ.setdefault("BMIGRATE_LAB", "mutants"))
    failover = not (options.quick or options.user_space)
    guests = failover or any(mutant.guests for mutant in chosen)
    if guests:
        box.down()
    try:
        rows = run(chosen, options.keep, box if failover else None)
    finally:
        if guests:
            box.down()
    print(table(rows))
    bad = [row.name for row in rows if row.verdict not in ("caught", "clean")]
    if bad:
        print(f"not as it must be: {', '.join(bad)}; --keep DIRECTORY leaves what was printed", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except tree.PatchError as problem:
        print(problem, file=sys.stderr)
        sys.exit(3)
