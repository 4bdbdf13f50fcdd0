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
from dataclasses import dataclass
from pathlib import Path

from lab import Lab
from tests.mutants import checks, tree
from tests.mutants.catalogue import FAILOVER, MUTANTS, Mutant

EXAMPLES = """
examples:
  make test-mutants                             all of them; boots the lab for those of the kernel modules
  python -m tests.mutants --user-space          those that need no guest; some minutes
  python -m tests.mutants --only clear-on-send  one of them; may be given more than once
  python -m tests.mutants --failover            and each also seeds two guests and fails over both ways, undisturbed

With guests, the lab instance is BMIGRATE_LAB's, or `mutants`; it must not be in use by anybody else.
The exit code is 0 only if every mutant passed its quiet tests and failed on the assertion that it is named for.
The table is explained in docs/mutants.md.
"""


#: The tests of the kernel modules leave their host as it was, so one boot serves them all.
ONE_BOOT = {"BMIGRATE_LAB_KEEP": "1"}
#: A failover is tried on fresh guests only.
FRESH = {"BMIGRATE_LAB_KEEP": "0"}


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    quiet: str
    named: str
    failed_on: str
    verdict: str


def check(mutant: Mutant, directory: Path, failover: bool) -> Row:
    """Make one mutant and run its tests.

    Args:
        directory: for the copy of the tree and the logs.
        failover: also install, sync and fail over on two guests.
    """
    copy = directory / "tree"
    copy.mkdir(parents=True)
    tree.copy(copy)
    tree.apply(mutant.patch, copy)
    name = mutant.named.rpartition("::")[2]
    nodes = [(mutant.quiet, ONE_BOOT)] + ([(FAILOVER, FRESH)] if failover else [])
    for number, (node, environment) in enumerate(nodes):
        quiet = checks.run(copy, [node], directory / f"quiet{number}.log", environment)
        if quiet.kind != "passed":
            return Row(mutant.name, f"{quiet.kind}: {quiet.message}", name, "not run", "NOT QUIET")
    outcome = checks.run(copy, [mutant.named], directory / "named.log", ONE_BOOT)
    if outcome.kind == "passed":
        return Row(mutant.name, "passed", name, "nothing: it passed", "NOT CAUGHT")
    if not outcome.shows(mutant.expected):
        return Row(mutant.name, "passed", name, outcome.message, "FAILED OTHERWISE")
    return Row(mutant.name, "passed", name, outcome.message, "caught")


def check_clean(mutants: list[Mutant], directory: Path) -> Row:
    """The tree without sabotage must pass every test that is used."""
    copy = directory / "tree"
    copy.mkdir(parents=True)
    tree.copy(copy)
    nodes = sorted({node for mutant in mutants for node in (mutant.quiet, mutant.named)})
    outcome = checks.run(copy, nodes, directory / "all.log", ONE_BOOT)
    verdict = "clean" if outcome.kind == "passed" else "TREE IS NOT CLEAN"
    return Row("(no sabotage)", outcome.kind, f"all {len(nodes)}", outcome.message or "nothing", verdict)


def table(rows: list[Row], width: int = 72) -> str:
    """The rows as text; what a test failed on is cut to `width` characters."""
    head = Row("mutant", "quiet", "named test", "failed on", "verdict")
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
    parser.add_argument("--failover", action="store_true", help="a seed and failover.yml in the lab, too, for each")
    parser.add_argument("--keep", metavar="DIRECTORY", type=Path, help="leave copies and logs there; must not exist")
    return parser.parse_args(argv)


def run(chosen: list[Mutant], keep: Path | None, failover: bool) -> list[Row]:
    """Run the tree without sabotage, then each mutant; says on stderr where it is.

    Args:
        keep: a new directory for copies and logs; None: a temporary one.
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
            rows.append(check(mutant, base / mutant.name, failover))
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
    guests = options.failover or any(mutant.guests for mutant in chosen)
    if guests:
        box.down()
    try:
        rows = run(chosen, options.keep, options.failover)
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
