# SPDX-License-Identifier: GPL-3.0-or-later
"""When a record comes out: not before its write is complete, in a guest, on a disk that takes seconds for a write.

A record that comes out earlier lets the shipper read the block before the new content is there. Comparing what changed
with what was recorded cannot show that: in the end all is recorded. Run by `python -m tests.mutants`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from lab import Lab
from tests.vm.kernel_bench import Bench, bench_of

pytestmark = pytest.mark.vm
PROGRAM = '''
import errno, json, sys, threading, time
from pathlib import Path
from bmigrate.kernel.channel import Channel
from tests.vm.kernel_guest.cases import attached, wait_for, write


def take(jiffies):
    """Set how long a command takes. Refused while one is under way, and udev reads whenever it likes."""
    try:
        Path("/sys/bus/pseudo/drivers/scsi_debug/delay").write_text(str(jiffies))
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        return False
    return True


with attached(sys.argv[1]), Channel() as channel:
    wait_for(lambda: take(1000), "the disk to be idle before it gets slow")
    writer = threading.Thread(target=write, args=(sys.argv[1], 64, 8))
    began = time.monotonic()
    writer.start()
    batch = wait_for(channel.read_batch, "a record")
    first = time.monotonic() - began
    writer.join()
    took = time.monotonic() - began
    channel.consumed(batch.seq)
    wait_for(lambda: take(0), "the disk to be idle again")
    found = [[int(r["sector"]), int(r["nr_sectors"])] for r in batch.records]
print(json.dumps({"first_seconds": first, "took_seconds": took, "ranges": found}))
'''


@pytest.fixture
def bench(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """A host with the modules under test."""
    with bench_of(lab, tmp_path_factory.mktemp("kernel")) as made:
        yield made


def test_no_record_before_the_write_is_complete(bench: Bench) -> None:
    device = bench.make_device("scsi")
    try:
        answer = json.loads(bench.python("-c", PROGRAM, device).stdout.strip().splitlines()[-1])
    finally:
        bench.drop_device("scsi")
    assert answer["ranges"] == [[64, 8]], answer
    assert answer["took_seconds"] > 2, "the disk was not slow, so nothing is shown"
    # Half-way at the latest it would be early; it comes with the completion, at the very end.
    early = answer["first_seconds"] < answer["took_seconds"] / 2
    assert not early, f"a record came out while its write was still under way: {answer}"
