# SPDX-License-Identifier: GPL-3.0-or-later
"""``make test-fuzz``: hostile frames against the receiver, as many as asked for."""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

from tests.fuzz.frames import Counts, Fuzzer


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python3 -m tests.fuzz", description=__doc__)
    parser.add_argument("--frames", type=int, default=1_000_000, help="how many at least (%(default)s)")
    parser.add_argument("--seed", type=int, default=None, help="repeat the run that printed this number")
    arguments = parser.parse_args()
    seed = arguments.seed if arguments.seed is not None else random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}", flush=True)
    began = said = time.monotonic()

    def progress(counts: Counts) -> None:
        nonlocal said
        if time.monotonic() - said >= 5:
            said = time.monotonic()
            print(f"  {counts.sent} frames", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory(prefix="bmigrate-fuzz-") as directory:
        fuzzer = Fuzzer(Path(directory), seed)
        try:
            counts = fuzzer.run(arguments.frames, progress)
        finally:
            fuzzer.close()
    print(
        f"{counts.sent} frames in {counts.streams} streams, {counts.accepted} taken, {counts.refused} streams refused, "
        f"nothing written out of bounds, in {time.monotonic() - began:.0f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
