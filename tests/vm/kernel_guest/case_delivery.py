# SPDX-License-Identifier: GPL-3.0-or-later
"""In a guest: what bufflink promises its reader. Each function is a case; see cases.py."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from bmigrate.kernel import abi
from bmigrate.kernel.channel import Channel
from tests.vm.kernel_guest import devices
from tests.vm.kernel_guest.cases import (
    LIMIT_SECONDS,
    REGION,
    RING_LIMIT,
    attached,
    empty,
    main,
    next_batch,
    ranges,
    refused,
    wait_for,
    write,
)

READER = """
import signal
from bmigrate.kernel.channel import Channel
channel = Channel()
batch = channel.read_batch()
print(batch.seq, len(batch.records), flush=True)
signal.pause()
"""


def killed_reader(device: str) -> dict[str, Any]:
    """A reader that is killed between read and CONSUMED loses nothing: the next one gets the same batch."""
    with attached(device):
        for sector in (0, 8, 64, 4096):
            write(device, sector)
        reader = subprocess.Popen([sys.executable, "-c", READER], stdout=subprocess.PIPE, text=True)
        assert reader.stdout
        seq, count = map(int, reader.stdout.readline().split())
        busy = refused(Channel)
        reader.send_signal(signal.SIGKILL)
        reader.wait()
        write(device, 9999)
        with Channel() as channel:
            again = channel.read_batch()
            assert again is not None
            assert (again.seq, len(again.records), again.again) == (seq, count, True), again
            assert ranges(again) == [(0, 1), (8, 1), (64, 1), (4096, 1)], again
            third = channel.read_batch()
            assert third is not None and third.seq == seq and (third.records == again.records).all()
            channel.consumed(seq)
            rest = next_batch(channel)
            assert rest.seq == seq + 1 and not rest.again and ranges(rest) == [(9999, 1)], rest
            channel.consumed(rest.seq)
        return {"busy": busy.code, "errno": busy.errno}


def fault_consumes_nothing(device: str) -> dict[str, Any]:
    """A fault while the batch is copied out leaves it as it was."""
    libc = ctypes.CDLL(None, use_errno=True)
    page = mmap.PAGESIZE
    with attached(device), Channel() as channel:
        for sector in range(600):
            write(device, sector * 8)
        # Two pages, the second not accessible: header and some records fit, the rest does not.
        libc.mmap.restype = ctypes.c_void_p
        address = libc.mmap(None, 2 * page, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANON, -1, 0)
        assert libc.mprotect(ctypes.c_void_p(address + page), page, 0) == 0
        before = channel.stats()
        got = libc.read(channel.fileno(), ctypes.c_void_p(address), 1 << 20)
        assert got == -1 and ctypes.get_errno() == errno.EFAULT, (got, ctypes.get_errno())
        after = channel.stats()
        assert after.handed == before.handed and after.pending_count == 600, after
        # Not even a reader that knows the number may consume what it did not get.
        stale = refused(channel.consumed, after.pending_seq)
        batch = next_batch(channel)
        assert batch.seq == after.pending_seq and len(batch.records) == 600 and not batch.again, batch
        channel.consumed(batch.seq)
        return {"stale": stale.code}


def stale_consumed(device: str) -> dict[str, Any]:
    """CONSUMED of anything but the batch in hand is refused and forgets nothing."""
    with attached(device):
        write(device, 16)
        with Channel() as channel:
            batch = next_batch(channel)
            codes = [refused(channel.consumed, seq).code for seq in (0, batch.seq - 1, batch.seq + 1, 2**63)]
        with Channel() as channel:
            # Another open file: it must read the batch before it may say that it is safe.
            codes.append(refused(channel.consumed, batch.seq).code)
            again = next_batch(channel)
            assert ranges(again) == [(16, 1)]
            channel.consumed(again.seq)
            codes.append(refused(channel.consumed, again.seq).code)
            assert channel.read_batch() is None
        return {"codes": codes}


def barriers(device: str) -> dict[str, Any]:
    """A barrier is passed when what came before it is consumed, and not earlier; what comes later does not matter."""
    with attached(device), Channel() as channel:
        idle = channel.barrier()
        assert channel.passed(idle), "nothing is outstanding"
        write(device, 100)
        first = channel.barrier()
        write(device, 200)
        assert channel.passed(idle)
        assert not channel.passed(first), "in the ring"
        one = next_batch(channel, 2)
        assert not channel.passed(first), "handed out, not consumed"
        write(device, 300)
        second = channel.barrier()
        channel.consumed(one.seq)
        assert channel.passed(first), "all before it is consumed"
        assert not channel.passed(second), "sector 300 is outstanding"
        empty(channel)
        assert channel.passed(second)
        foreign = type(second)(second.channel_id ^ 1, second.sweep, second.positions)
        short = type(second)(second.channel_id, second.sweep, second.positions[:-1])
        return {
            "foreign": refused(channel.passed, foreign).code,
            "short": refused(channel.passed, short).errno,
        }


def barrier_does_not_block(device: str) -> dict[str, Any]:
    """A barrier is taken at once, also while another thread sleeps in read()."""
    with attached(device), Channel() as channel:
        os.set_blocking(channel.fileno(), True)
        batches: list[Any] = []
        reader = threading.Thread(target=lambda: batches.append(channel.read_batch()))
        reader.start()
        task = Path(f"/proc/self/task/{reader.native_id}/wchan")
        wait_for(lambda: "channel_read" in task.read_text(), "the reader does not sleep in the channel")
        start = time.monotonic()
        barrier = channel.barrier()
        seconds = time.monotonic() - start
        assert channel.passed(barrier) and not batches
        write(device, 7)
        reader.join(LIMIT_SECONDS)
        assert batches and ranges(batches[0]) == [(7, 1)], "the write did not wake the reader"
        channel.consumed(batches[0].seq)
        return {"seconds": seconds}


def small_reads(device: str) -> dict[str, Any]:
    """A batch is never larger than the reader's room; one that was made larger comes whole or not at all."""
    with attached(device), Channel() as channel:
        for sector in range(10):
            write(device, sector * 8)
        room = 16 + 2 * abi.RECORD_BYTES
        errors = []
        for length in (0, 15, 16, room - 1):
            try:
                os.read(channel.fileno(), length)
            except OSError as error:
                errors.append(error.errno)
        whole = next_batch(channel)
        assert len(whole.records) == 10
        try:
            os.read(channel.fileno(), room)
        except OSError as error:
            errors.append(error.errno)
        again = channel.read_batch(2)
        assert again is not None and len(again.records) == 10 and again.again
        channel.consumed(again.seq)
        for sector in range(5):
            write(device, sector * 8)
        sizes = [len(batch.records) for batch in _in_pieces(channel)]
        return {"errors": errors, "sizes": sizes}


def _in_pieces(channel: Channel) -> list[Any]:
    pieces: list[Any] = []
    while True:
        batch = channel.read_batch(2)
        if batch is None:
            return pieces
        pieces.append(batch)
        channel.consumed(batch.seq)


def overflow_in_two_phases(device: str) -> dict[str, Any]:
    """A region that was handed out and is written again before CONSUMED comes out again; barriers wait for both."""
    region_sectors = REGION // 512
    with attached(device) as attachment, Channel() as channel:
        RING_LIMIT.write_text("1")
        cpus = os.sched_getaffinity(0)
        # Completions come on the CPUs of the queues: more writes than rings fill them all.
        filling = 4 * len(cpus)
        for _ in range(filling):
            write(device, 5 * region_sectors + 3)
        before = channel.barrier()
        first = next_batch(channel)
        assert first.widened, first
        widened = [r for r in first.records if r["flags"] & abi.FLAG_WIDENED]
        assert _ranges_of(widened) == [(5 * region_sectors, region_sectors)], widened
        assert not channel.passed(before), "handed out, not consumed"
        for _ in range(filling):
            write(device, 5 * region_sectors + 9)
        between = channel.barrier()
        channel.consumed(first.seq)
        assert channel.passed(before), channel.stats()
        assert not channel.passed(between), "the region was written again after it was handed out"
        second = next_batch(channel)
        widened = [r for r in second.records if r["flags"] & abi.FLAG_WIDENED]
        assert _ranges_of(widened) == [(5 * region_sectors, region_sectors)], widened
        assert not channel.passed(between)
        channel.consumed(second.seq)
        empty(channel)
        assert channel.passed(between)
        stats = channel.stats()
        assert stats.sweeps_started == stats.sweeps_done and not stats.overflow_waiting, stats
        return {"slot": attachment.slot, "sweeps": stats.sweeps_done}


def _ranges_of(records: list[Any]) -> list[tuple[int, int]]:
    """(sector, nr_sectors) of records."""
    return [(int(r["sector"]), int(r["nr_sectors"])) for r in records]


def many_regions_in_small_batches(device: str) -> dict[str, Any]:
    """A sweep that does not fit into a batch goes on in the next ones, and the barrier waits for the last."""
    region_sectors = REGION // 512
    regions = list(range(0, 400, 2))
    with attached(device), Channel() as channel:
        RING_LIMIT.write_text("1")
        for region in regions:
            write(device, region * region_sectors + 1)
        RING_LIMIT.write_text("0")
        barrier = channel.barrier()
        marked: set[int] = set()
        passed_after = 0
        while not channel.passed(barrier):
            batch = channel.read_batch(8)
            if batch is None:
                # The last step of the sweep may find nothing: then the barrier is passed, and nothing waits.
                assert channel.passed(barrier)
                break
            assert not channel.passed(barrier)
            for sector, count in ranges(batch):
                marked.update(range(sector // region_sectors, (sector + count - 1) // region_sectors + 1))
            channel.consumed(batch.seq)
            passed_after += 1
        assert marked == set(regions), sorted(marked ^ set(regions))
        return {"batches": passed_after, "regions": len(regions)}


def _wake_interrupts() -> int:
    """How often a processor has interrupted itself for work such as waking the reader."""
    line = next(line for line in Path("/proc/interrupts").read_text().splitlines() if line.split()[0] == "IWI:")
    return sum(int(word) for word in line.split()[1:] if word.isdigit())


def wake_ups(device: str) -> dict[str, Any]:
    """Each lonely write wakes the sleeping reader; of many in a row not each costs an interrupt."""
    disk = devices.null_disk()
    counts: list[int] = []
    stop = threading.Event()
    silent: list[str] = []

    def read(channel: Channel) -> None:
        poll = select.poll()
        poll.register(channel, select.POLLIN)
        while not stop.is_set():
            if not poll.poll(LIMIT_SECONDS * 1000):
                silent.append(f"not woken after {sum(counts)} records")
                return
            counts.extend(len(batch.records) for batch in empty(channel))

    def wait_for_records(total: int) -> None:
        wait_for(lambda: silent or sum(counts) == total, f"{total} records")

    try:
        with attached(disk), Channel() as channel:
            reader = threading.Thread(target=read, args=(channel,))
            reader.start()
            for number in range(20):
                write(disk, number * 8, 8)
                wait_for_records(number + 1)
            before = _wake_interrupts()
            fd = os.open(disk, os.O_WRONLY | os.O_DIRECT)
            with mmap.mmap(-1, 4096) as block:
                for number in range(3000):
                    os.pwrite(fd, block, number * 4096)
            os.close(fd)
            interrupts = _wake_interrupts() - before
            wait_for_records(3020)
            stop.set()
            write(disk, 0, 8)
            reader.join()
    finally:
        devices.drop_null()
    return {"silent": silent, "records": sum(counts), "interrupts": interrupts}


def offline_cpu(device: str) -> dict[str, Any]:
    """Records that a CPU left in its ring before it went offline come out all the same."""
    online = Path("/sys/devices/system/cpu/cpu1/online")
    with attached(device), Channel() as channel:
        for sector in range(64):
            write(device, sector * 8)
        online.write_text("0")
        try:
            for sector in range(64, 80):
                write(device, sector * 8)
            got = sorted(pair for batch in empty(channel) for pair in ranges(batch))
        finally:
            online.write_text("1")
        assert got == [(sector * 8, 1) for sector in range(80)], got
        return {"records": len(got)}


if __name__ == "__main__":
    main(globals())
