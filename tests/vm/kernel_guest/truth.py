# SPDX-License-Identifier: GPL-3.0-or-later
"""In a guest: run a workload on a device while it is tracked, and print as JSON what the log missed.

usage: truth.py WORKLOAD DEVICE --seed N [--written DEVICE] [--asleep]

--written: where the workload runs, if not on the tracked device (its whole disk, or a partition of it).
--asleep: read nothing before the workload is over, so that the rings overflow.
"""

from __future__ import annotations

import argparse
import json
import threading

from tests.vm.kernel_guest import workloads
from tests.vm.kernel_guest.tracker import Tracked, fingerprints, verdict


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("workload", choices=sorted(workloads.WORKLOADS))
    parser.add_argument("device")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--written")
    parser.add_argument("--asleep", action="store_true")
    options = parser.parse_args()

    workload = workloads.WORKLOADS[options.workload](options.written or options.device, options.seed)
    workload.prepare()
    # Attach first: a mounted file system writes on its own, also between the two.
    tracked = Tracked(options.device)
    try:
        before = fingerprints(options.device)
        work(tracked, workload, options.asleep)
        tracked.drain()
        result = verdict(tracked, before, fingerprints(options.device))
    finally:
        tracked.detach()
    print(json.dumps({"seed": options.seed, "done": workload.done, **result}))


def work(tracked: Tracked, workload: workloads.Raw | workloads.Filesystem, asleep: bool) -> None:
    """The workload, with a reader beside it or none."""
    over = threading.Event()

    def read() -> None:
        while not over.is_set():
            for batch in tracked.batches(0.2):
                tracked.note(batch)

    reader = threading.Thread(target=read)
    if not asleep:
        reader.start()
    try:
        workload.work()
    finally:
        over.set()
        if not asleep:
            reader.join()


if __name__ == "__main__":
    main()
