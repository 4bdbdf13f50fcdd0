# SPDX-License-Identifier: GPL-3.0-or-later
"""In a guest: everything at once. Prints what was done, as JSON.

usage: storm.py race|reload --seed N --rounds N [--held DEVICE]... DEVICE...

race: processes that attach, detach, list, count, read, consume, ask for barriers and close, on a few devices that are
written to and on one that comes and goes, while others of them are killed.
--held: stays attached all the time (race only), and with it the tracepoints stay switched on.
reload: load, attach, record, detach or not drain, unload, while programs try to open the devices.

Bounded by operations. Every answer must be one that ALLOWED has; at the end nothing is attached, no overflow map is
left in memory, and the modules are as they were at the beginning: loaded for race, unloaded and loaded for reload.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import fcntl
import json
import mmap
import multiprocessing
import os
import random
import select
import signal
import struct
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from bmigrate.kernel import abi
from bmigrate.kernel.channel import Channel
from bmigrate.kernel.control import Control, identify
from bmigrate.kernel.errors import KernelError
from tests.vm.kernel_guest import cases, devices, workloads
from tests.vm.kernel_guest.cases import RING_LIMIT, empty

#: What each call may answer while others do what they want; 0 is success.
ALLOWED: dict[str, set[int]] = {
    "open control": {0},
    "open channel": {0, errno.EBUSY},
    # ESTALE, ENODEV, ENXIO: the device that comes and goes, between the look and the call.
    "attach": {0, errno.EEXIST, errno.ESTALE, errno.ENODEV, errno.ENXIO},
    "open volume": {0, errno.ENOENT, errno.ENXIO, errno.ENODEV, errno.EBUSY},
    "detach": {0, errno.ENOENT},
    "list": {0, errno.ENOSPC},
    "stats": {0, errno.ENOENT},
    # EBADF: another thread has closed the file, or has it reopened.
    "read": {0, errno.EAGAIN, errno.EMSGSIZE, errno.EFAULT, errno.EBADF},
    "blocking read": {0, errno.EINTR, errno.EMSGSIZE},
    "consumed": {0, errno.ESTALE, errno.EBADF},
    "barrier": {0, errno.EBADF},
    "passed": {0, errno.EBADF},
    "channel stats": {0, errno.EBADF},
}
#: While modules come and go: not there, not yet, or on their way out.
ABSENT = {0, errno.ENOENT, errno.ENODEV, errno.ENXIO, errno.EBUSY}
BATCH = ctypes.sizeof(abi.BatchHeader)
LIMIT_SECONDS = 600
FINIT_MODULE, DELETE_MODULE = 313, 176  # x86-64


def wait_for(condition: Callable[[], Any], what: str) -> Any:
    """With more patience than a single case has."""
    return cases.wait_for(condition, what, LIMIT_SECONDS)


class Tally:
    """What the processes did, in memory that outlives those that are killed: a counter for each (call, answer)."""

    def __init__(self) -> None:
        self.names = [(call, code) for call in ALLOWED for code in sorted(ALLOWED[call] | ABSENT)]
        self.memory = mmap.mmap(-1, max(mmap.PAGESIZE, 8 * len(self.names) * WORKERS))
        self.offset = 0

    def of(self, worker: int) -> None:
        """This process counts in a part of its own."""
        self.offset = worker * 8 * len(self.names)

    def add(self, call: str, code: int) -> None:
        """Count one answer. Raises AssertionError if it is not allowed."""
        if (call, code) not in self.names or code not in self.allowed(call):
            raise AssertionError(f"{call}: {errno.errorcode.get(code, code)}")
        at = self.offset + 8 * self.names.index((call, code))
        struct.pack_into("Q", self.memory, at, struct.unpack_from("Q", self.memory, at)[0] + 1)

    absent = False

    def allowed(self, call: str) -> set[int]:
        """The answers that are right now."""
        return ALLOWED[call] | (ABSENT if self.absent and call.startswith("open") else set())

    def operations(self, worker: int) -> int:
        """Calls of one worker up to now."""
        begin = worker * 8 * len(self.names)
        return sum(struct.unpack_from(f"{len(self.names)}Q", self.memory, begin))

    def total(self) -> dict[str, int]:
        """All of it, what never happened left out."""
        sums: Counter[str] = Counter()
        for worker in range(WORKERS):
            counts = struct.unpack_from(f"{len(self.names)}Q", self.memory, worker * 8 * len(self.names))
            for (call, code), count in zip(self.names, counts):
                if count:
                    sums[f"{call} {errno.errorcode.get(code, 'OK')}"] += count
        return dict(sums)


WORKERS = 16
MANY = 1 << 20  # more than a process lives
held: set[tuple[int, int]] = set()
tally = Tally()


def ask(call: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """What the function returns, or None after an OSError; the answer is counted."""
    try:
        result = function(*arguments)
    except OSError as error:
        tally.add(call, error.errno or 0)
        return None
    tally.add(call, 0)
    return result


# -- one process each --------------------------------------------------------------------------------------------


def attacher(pick: random.Random, operations: int, paths: list[str]) -> None:
    """Attach and detach whatever there is."""
    control = os.open(abi.CONTROL_PATH, os.O_RDWR)
    for _ in range(operations):
        if pick.random() < 0.6:
            _attach(control, pick.choice(paths), 4096 << pick.randrange(4, 9))
        else:
            entries = [entry for entry in _list(control, 64) if entry not in held]
            if entries:
                slot, wanted = pick.choice(entries)
                request = abi.ReqlogDetach(slot=slot, id=wanted)
                ask("detach", fcntl.ioctl, control, abi.REQLOG_IOC_DETACH, request)
        if pick.random() < 0.1:
            os.close(control)
            control = ask("open control", os.open, abi.CONTROL_PATH, os.O_RDWR)


def _attach(control: int, path: str, region_bytes: int) -> bool:
    fd = ask("open volume", os.open, path, os.O_RDONLY | os.O_NONBLOCK)
    if fd is None:
        return False
    try:
        identity = identify(fd)
        request = abi.ReqlogAttach(
            fd=fd,
            flags=abi.ATTACH_BIO,
            major=identity.major,
            minor=identity.minor,
            sectors=identity.sectors,
            diskseq=identity.diskseq,
            region_bytes=region_bytes,
        )
        return ask("attach", fcntl.ioctl, control, abi.REQLOG_IOC_ATTACH, request) is not None
    finally:
        os.close(fd)


def _list(control: int, room: int) -> list[tuple[int, int]]:
    entries = (abi.ReqlogEntry * max(1, room))()
    request = abi.ReqlogList(entries=ctypes.addressof(entries), count=room)
    ask("list", fcntl.ioctl, control, abi.REQLOG_IOC_LIST, request)
    return [(entry.slot, entry.id) for entry in entries[: request.count]]


def lister(pick: random.Random, operations: int, paths: list[str]) -> None:
    """LIST with more or less room, STATS of what was there a moment ago; RING_LIMIT goes up and down meanwhile."""
    control = os.open(abi.CONTROL_PATH, os.O_RDWR)
    for _ in range(operations):
        for slot, wanted in _list(control, pick.choice((0, 1, 3, 64))):
            request = abi.ReqlogStats(slot=slot, id=wanted)
            ask("stats", fcntl.ioctl, control, abi.REQLOG_IOC_STATS, request)
        RING_LIMIT.write_text(pick.choice(("0", "1", "16")))


def reader(pick: random.Random, operations: int, paths: list[str]) -> None:
    """Four threads on one open file: they read, consume what another was given, ask for barriers, and close it."""
    share = {"fd": -1, "seq": 0}
    seeds = [pick.randrange(1 << 30) for _ in range(4)]
    failures: list[BaseException] = []

    def reopen() -> None:
        fd = ask("open channel", os.open, abi.CHANNEL_PATH, os.O_RDONLY | os.O_NONBLOCK)
        if fd is None:
            return
        if share["fd"] < 0:
            share["fd"] = fd
        else:
            os.close(fd)

    def work(seed: int) -> None:
        mine = random.Random(seed)
        memory = ctypes.create_string_buffer(BATCH + 32768 * abi.RECORD_BYTES)
        info = abi.BufflinkInfo()
        barrier, positions = abi.BufflinkBarrier(), (ctypes.c_uint64 * (os.cpu_count() or 1))()
        try:
            for _ in range(operations // 4):
                fd = share["fd"]
                choice = mine.random()
                if fd < 0:
                    reopen()
                elif choice < 0.35:
                    _read(fd, memory, mine.choice((64, 4096, len(memory))), mine.random() < 0.1, share)
                elif choice < 0.65:
                    seq = ctypes.c_uint64(share["seq"] - mine.choice((0, 0, 0, 1)) & (1 << 64) - 1)
                    ask("consumed", fcntl.ioctl, fd, abi.BUFFLINK_IOC_CONSUMED, seq)
                elif choice < 0.8:
                    if ask("channel stats", fcntl.ioctl, fd, abi.BUFFLINK_IOC_INFO, info) is None:
                        continue
                    barrier.rings, barrier.positions = info.rings, ctypes.addressof(positions)
                    barrier.reserved = 0
                    if info.rings <= len(positions):
                        ask("barrier", fcntl.ioctl, fd, abi.BUFFLINK_IOC_BARRIER, barrier)
                        if barrier.channel_id:
                            ask("passed", fcntl.ioctl, fd, abi.BUFFLINK_IOC_PASSED, barrier)
                elif choice < 0.95:
                    poll = select.poll()
                    poll.register(fd, select.POLLIN)
                    poll.poll(5)
                else:
                    share["fd"] = -1
                    ask("read", os.close, fd)
                    reopen()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in seeds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def _read(fd: int, memory: ctypes.Array[ctypes.c_char], length: int, nowhere: bool, share: dict[str, int]) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    got = libc.read(fd, None if nowhere else memory, ctypes.c_size_t(length))
    tally.add("read", 0 if got >= 0 else ctypes.get_errno())
    if got >= BATCH:
        share["seq"] = abi.BatchHeader.from_buffer(memory).seq


def waiter(pick: random.Random, operations: int, paths: list[str]) -> None:
    """A reader that blocks in read(2), where a signal wakes it, or kills it."""
    libc = ctypes.CDLL(None, use_errno=True)
    memory = ctypes.create_string_buffer(4096)
    # Again and again: one that comes before the read would wake nobody.
    signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
    for _ in range(operations):
        fd = ask("open channel", os.open, abi.CHANNEL_PATH, os.O_RDONLY)
        if fd is None:
            time.sleep(0.005)
            continue
        got = libc.read(fd, memory, ctypes.c_size_t(len(memory)))
        tally.add("blocking read", 0 if got >= 0 else ctypes.get_errno())
        os.close(fd)


def _wake(number: int, frame: object) -> None:
    """A signal with a handler ends a system call that sleeps."""


def writer(pick: random.Random, operations: int, paths: list[str]) -> None:
    """Writes, discards and zeroes on the devices that stay."""
    for _ in range(operations):
        kinds = ("write", "discard", "zeroout")
        workloads.raw(pick.choice(paths), pick.randrange(1 << 20), 8, kinds, threads=2)


def mover(pick: random.Random, operations: int, paths: list[str]) -> None:
    """A request-based disk that comes, is written to, and goes, attached or not."""
    for _ in range(operations):
        path = devices.null_disk()
        try:
            with open(path, "wb", buffering=0) as file:
                for _ in range(4):
                    file.write(pick.randbytes(4096))
        finally:
            devices.NULL_DISK.rmdir()


def opener(pick: random.Random, operations: int, paths: list[str]) -> None:
    """Opens and closes the devices of modules that come and go."""
    for _ in range(operations):
        call, path = pick.choice((("open control", abi.CONTROL_PATH), ("open channel", abi.CHANNEL_PATH)))
        fd = ask(call, os.open, path, os.O_RDONLY | os.O_NONBLOCK)
        if fd is not None:
            os.close(fd)


# -- the storm ---------------------------------------------------------------------------------------------------

Work = Callable[[random.Random, int, "list[str]"], None]


def _run(number: int, work: Work, seed: int, operations: int, paths: list[str], absent: bool) -> None:
    tally.of(number)
    Tally.absent = absent
    signal.signal(signal.SIGALRM, _wake)
    try:
        work(random.Random(seed), operations, paths)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


class Storm:
    """Processes that run side by side."""

    def __init__(self, pick: random.Random) -> None:
        self.pick = pick
        self.fork = multiprocessing.get_context("fork")
        self.running: dict[int, tuple[BaseProcess, Work]] = {}
        self.killed = 0

    def start(self, work: Work, operations: int, paths: list[str], absent: bool = False) -> int:
        """One more; its number."""
        number = len(self.running)
        arguments = (number, work, self.pick.randrange(1 << 30), operations, paths, absent)
        process = self.fork.Process(target=_run, args=arguments)
        process.start()
        self.running[number] = process, work
        return number

    def kill(self, number: int, after: int) -> None:
        """SIGKILL it in the middle: when it has made so many calls."""
        process, work = self.running[number]
        begun = tally.operations(number)
        if after:
            enough = begun + after
            wait_for(lambda: tally.operations(number) >= enough or not process.is_alive(), f"{work.__name__} idles")
        if process.is_alive():
            process.kill()
            self.killed += 1
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL), f"{work.__name__} ended with {process.exitcode}"

    def replace(self, number: int, operations: int, paths: list[str], after: int) -> None:
        """Kill it and start the same again."""
        self.kill(number, after)
        work = self.running[number][1]
        seed = self.pick.randrange(1 << 30)
        process = self.fork.Process(target=_run, args=(number, work, seed, operations, paths, Tally.absent))
        process.start()
        self.running[number] = process, work

    def join(self) -> None:
        """Wait for all. Raises AssertionError if one failed."""
        end = time.monotonic() + LIMIT_SECONDS
        for process, work in self.running.values():
            process.join(max(0, end - time.monotonic()))
            assert process.exitcode == 0, f"{work.__name__} ended with {process.exitcode}"


def hold(paths: list[str]) -> None:
    """Attach what nobody may detach before the end."""
    with Control() as control:
        for path in paths:
            fd = os.open(path, os.O_RDONLY)
            try:
                attachment = control.attach(fd, bio_based=True)
            finally:
                os.close(fd)
            held.add((attachment.slot, attachment.attachment_id))


def maps_in_memory() -> int:
    """Overflow maps that reqlog has not freed."""
    return Path("/proc/vmallocinfo").read_text().count("reqlog_map_alloc")


def settle() -> None:
    """Detach everything and drain the log. Raises TimeoutError if a slot never comes back."""
    RING_LIMIT.write_text("0")
    with Control() as control, Channel() as channel:
        for entry in control.list():
            if not entry.draining:
                control.detach(entry.slot, entry.attachment_id)

        def drained() -> bool:
            empty(channel)
            return not control.list()

        wait_for(drained, "a slot is never free again")
    assert maps_in_memory() == 0, "an overflow map was not freed"


def race(pick: random.Random, rounds: int, paths: list[str]) -> dict[str, Any]:
    """All kinds of programs at once; some are killed and started again, `rounds` times."""
    storm = Storm(pick)
    moving = ["/dev/kerneltest", "/dev/nullb0"]
    try:
        victims = [storm.start(work, MANY, [*paths, *moving]) for work in (attacher, attacher, reader, waiter, lister)]
        storm.start(writer, rounds * 4, paths)
        storm.start(mover, rounds * 2, [])
        for _ in range(rounds):
            storm.replace(pick.choice(victims), MANY, [*paths, *moving], pick.randrange(1, 60))
        for number in victims:
            storm.kill(number, pick.randrange(1, 60))
        storm.running = {number: pair for number, pair in storm.running.items() if number not in victims}
        storm.join()
        settle()
    finally:
        for process, _ in storm.running.values():
            process.kill()
            process.join()
        devices.drop_null()
    return {"killed": storm.killed, "calls": tally.total()}


# -- modules that come and go ------------------------------------------------------------------------------------


def _syscall(number: int, *arguments: Any) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    return 0 if libc.syscall(number, *arguments) == 0 else ctypes.get_errno()


def load(name: str) -> None:
    """insmod, from the directory with the modules under test."""
    fd = os.open(f"modules/{name}.ko", os.O_RDONLY)
    try:
        code = _syscall(FINIT_MODULE, fd, b"", 0)
    finally:
        os.close(fd)
    if code:
        raise OSError(code, f"loading {name}")


def unload(name: str, meanwhile: Callable[[], object]) -> int:
    """rmmod, again and again while somebody uses it; how often it was refused."""
    refused = 0

    def gone() -> bool:
        nonlocal refused
        code = _syscall(DELETE_MODULE, name.encode(), os.O_NONBLOCK)
        if code in (errno.EAGAIN, errno.EBUSY):
            refused += 1
            meanwhile()
            return False
        if code:
            raise OSError(code, f"unloading {name}")
        return True

    wait_for(gone, f"{name} is never unloaded")
    return refused


def _reap() -> None:
    """LIST is what lets go of a module whose last wrapped bio has ended."""
    try:
        Control().close()
        with Control() as control:
            control.list()
    except (OSError, KernelError):
        return


@contextmanager
def modules(pick: random.Random) -> Iterator[None]:
    """Both loaded, and unloaded at the end."""
    load("bufflink")
    load("reqlog")
    wait_for(lambda: os.path.exists(abi.CONTROL_PATH) and os.path.exists(abi.CHANNEL_PATH), "no device appeared")
    yield
    unload("reqlog", _reap)
    unload("bufflink", lambda: None)


def reload(pick: random.Random, rounds: int, paths: list[str]) -> dict[str, Any]:
    """Load and unload under load. What is left at an unload: a drained log, records, overflow, a batch in hand."""
    storm = Storm(pick)
    for name in ("reqlog", "bufflink"):
        if Path("/sys/module", name).exists():
            unload(name, _reap)
    recorded = 0
    Tally.absent = True
    try:
        for path in paths:
            storm.start(writer, MANY, [path])
        storm.start(opener, MANY, [], absent=True)
        for number in range(rounds):
            with modules(pick):
                recorded += _one_life(pick, paths, number % 4)
            assert maps_in_memory() == 0, "an overflow map was not freed"
        for number in storm.running:
            storm.kill(number, 0)
    finally:
        for process, _ in storm.running.values():
            process.kill()
            process.join()
        for name in ("bufflink", "reqlog"):
            if not Path("/sys/module", name).exists():
                load(name)
    return {"lives": rounds, "recorded": recorded, "calls": tally.total()}


def _one_life(pick: random.Random, paths: list[str], leave: int) -> int:
    """Attach, see something recorded, detach; leave the log as `leave` says."""
    control = wait_for(_open_control, "the control cannot be opened")
    with control:
        RING_LIMIT.write_text("1" if leave == 2 else "0")
        attached = []
        for path in paths:
            fd = os.open(path, os.O_RDONLY)
            try:
                attached.append(control.attach(fd, 4096 << pick.randrange(4, 9), bio_based=True))
            finally:
                os.close(fd)

        def counted() -> int:
            return sum(control.stats(a.slot, a.attachment_id).records for a in attached)

        recorded: int = wait_for(counted, "nothing is recorded")
        channel = wait_for(_open_channel, "the channel cannot be opened")
        with channel:
            batch = channel.read_batch(64) if leave in (1, 3) else None
            if leave == 3 and batch:
                channel.consumed(batch.seq)
            for one in attached:
                control.detach(one.slot, one.attachment_id)
            if leave == 0:
                empty(channel)
    return recorded


def _open_control() -> Control | None:
    try:
        return Control()
    except KernelError:
        return None


def _open_channel() -> Channel | None:
    try:
        return Channel()
    except KernelError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=("race", "reload"))
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("devices", nargs="+")
    parser.add_argument("--held", action="append", default=[])
    options = parser.parse_args()
    if options.held:
        hold(options.held)
    done = {"race": race, "reload": reload}[options.kind](random.Random(options.seed), options.rounds, options.devices)
    print(json.dumps({"seed": options.seed, **done}))


if __name__ == "__main__":
    main()
