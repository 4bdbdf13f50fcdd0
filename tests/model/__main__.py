# SPDX-License-Identifier: GPL-3.0-or-later
"""``make test-model``: the protocol in small scope, exhaustively, and the same with one rule broken at a time.

spin makes a program of protocol.pml, and one of streams.pml for sessions of several streams, which visit every state
that can be reached. Without a mutant none may break the invariant; with each mutant one must, or the rule
that it breaks is not needed, or not modelled.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

MODEL = Path(__file__).with_name("protocol.pml")
STREAMS = Path(__file__).with_name("streams.pml")
MUTANTS = {
    "MARK_AT_QUEUE_TIME": "a write is recorded when it is queued",
    "DROP_THE_OVERFLOW": "a record is dropped when the log is full",
    "CONSUME_BEFORE_MARK": "breqd consumes a batch before it is in the map",
    "IGNORE_REDIRTY_WHILE_CLAIMED": "a write to a claimed block does not make it dirty again",
    "READ_BEFORE_THE_CLAIM": "the shipper reads a block and claims it afterwards",
    "CLEAR_ON_SEND": "a claim is cleared when it was sent",
    "ACKNOWLEDGE_BEFORE_FSYNC": "the receiver acknowledges what it has not flushed",
    "LET_AN_OLD_RECEIVER_LIVE": "a new session does not wait for the end of older receivers",
    "TAKE_ANY_ACKNOWLEDGEMENT": "breqd takes an acknowledgement of an older session",
    "BELIEVE_THE_MAP_AFTER_A_CRASH": "a crash of the source does not make the volume suspect",
    "SKIP_THE_BARRIER": "a drain does not wait for what is still in the log",
}
STREAM_MUTANTS = {
    "SYNC_BEFORE_MARKED": "a SYNC does not wait until the other streams are written",
    "EACH_STREAM_FLUSHES": "each stream's receiver flushes and acknowledges for itself",
    "COUNT_A_WRITE_AT_ITS_BEGIN": "a write that is under way in a flush counts as flushed by it",
    "FENCE_THE_FIRST_STREAM_ONLY": "a new session does not wait for older receivers of further streams",
    "CLAIM_A_CLAIMED_BLOCK": "a block may be claimed again, for another stream, while it is under way",
}
PROBES = {
    "PROBE_A_DRAIN_AFTER_ALL_FAULTS": "(none; a drain in the last session, after every write and fault)",
    "PROBE_AN_ACKNOWLEDGEMENT_AFTER_A_WRITE": "(none; an answer for a block that was written meanwhile)",
}
STREAM_PROBES = {
    "PROBE_BOTH_STREAMS_ACKNOWLEDGED_LATE": "(none; blocks of both streams acknowledged, after every fault)",
}
"""States that a model which proves something must reach: an assertion says that they cannot be, and must fail."""
BOUNDS = {"WRITES": 2, "SESSIONS": 3, "FAULTS": 2}
STREAM_BOUNDS = {"WRITES": 4, "SESSIONS": 3, "FAULTS": 2}
MAX_MEMORY_MIB = 4096
MAX_DEPTH = 2_000_000


class ModelError(Exception):
    """spin or the compiler failed, or the search was cut off."""


@dataclass(frozen=True)
class Outcome:
    """What a search found: whether the invariant holds everywhere, in how many states, in how many seconds."""

    holds: bool
    states: int
    seconds: float


def check(mutant: str | None, bounds: dict[str, int], model: Path = MODEL) -> Outcome:
    """Search all states.

    Args:
        mutant: a name of MUTANTS, or None. bounds: see BOUNDS. model: the file.

    Raises:
        ModelError: the search is not complete, which proves nothing.
    """
    defines = [f"-D{name}={value}" for name, value in bounds.items()] + ([f"-D{mutant}"] if mutant else [])
    with tempfile.TemporaryDirectory(prefix="bmigrate-model-") as directory:

        def run(*argv: str) -> str:
            done = subprocess.run(argv, cwd=directory, capture_output=True, text=True, check=False)
            if done.returncode:
                raise ModelError(f"{argv[0]}: {done.stdout}{done.stderr}")
            return done.stdout

        run("spin", *defines, "-a", str(model))
        # No deadlock check (-DSAFETY keeps assertions): a finished handover may rest.
        run("gcc", "-O2", "-w", f"-DMEMLIM={MAX_MEMORY_MIB}", "-DSAFETY", "-DCOLLAPSE", "-o", "pan", "pan.c")
        began = time.monotonic()
        said = run("./pan", f"-m{MAX_DEPTH}", "-E", "-w24")
        seconds = time.monotonic() - began
    errors = re.search(r"errors: (\d+)", said)
    states = re.search(r"(\d+) states, stored", said)
    if errors is None or states is None:
        raise ModelError(said)
    broken = int(errors.group(1)) > 0
    if broken and "assertion violated" not in said:
        raise ModelError(said)
    if not broken and ("Search not completed" in said or "max search depth too small" in said):
        raise ModelError(f"not all states were visited:\n{said}")
    return Outcome(not broken, int(states.group(1)), seconds)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python3 -m tests.model", description=__doc__)
    for name, value in BOUNDS.items():
        parser.add_argument(f"--{name.lower()}", type=int, default=value, help=f"in the whole run ({value})")
    everything = sorted({**MUTANTS, **STREAM_MUTANTS})
    parser.add_argument("--only", action="append", choices=everything, help="this mutant, and the clean models")
    arguments = parser.parse_args()
    bounds = {name: getattr(arguments, name.lower()) for name in BOUNDS}
    streams = {name: value + bounds[name] - BOUNDS[name] for name, value in STREAM_BOUNDS.items()}
    survivors = []
    for model, mutants, probes, limits in (
        (MODEL, MUTANTS, PROBES, bounds),
        (STREAMS, STREAM_MUTANTS, STREAM_PROBES, streams),
    ):
        print(f"{model.name + ': broken rule':76} | states visited | seconds | verdict", flush=True)
        for mutant in [None, *probes, *(name for name in mutants if not arguments.only or name in arguments.only)]:
            outcome = check(mutant, limits, model)
            if outcome.holds == (mutant is not None):
                survivors.append(mutant or f"the clean {model.name}")
            verdict = "holds" if outcome.holds else "reached" if mutant in probes else "broken"
            what = {**mutants, **probes}[mutant] if mutant else "(none)"
            print(f"{what:76} | {outcome.states:14,} | {outcome.seconds:7.1f} | {verdict}", flush=True)
    if survivors:
        print(f"not as it must be: {', '.join(survivors)}", file=sys.stderr)
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
