# SPDX-License-Identifier: GPL-3.0-or-later
"""In a guest: calls that no program of ours makes, on both devices. Prints what was called and answered, as JSON.

usage: fuzz.py DEVICE --seed N --operations N

Bounded by the number of calls. For each of them a model says which answers are right (an errno, 0 or success): see
`Model`. A volume stays attached all the time, and all that is written to it meanwhile must be in the log at the end.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import json
import mmap
import os
import random
import select
import signal
import socket
from collections import Counter
from dataclasses import dataclass
from typing import Any

from bmigrate.kernel import abi
from bmigrate.kernel.control import Control, Identity, identify
from tests.vm.kernel_guest.cases import RING_LIMIT, attach, write
from tests.vm.kernel_guest.memory import KINDS, READ_ONLY, ROOM, UNUSABLE, USABLE, Arena, call

CONTROL = {value: name for name, value in vars(abi).items() if name.startswith("REQLOG_IOC_")}
CHANNEL = {value: name for name, value in vars(abi).items() if name.startswith("BUFFLINK_IOC_")}
EDGES = (0, 1, 2, 511, 512, 4095, 4096, 65536, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 63, (1 << 64) - 1)
HEADER = ctypes.sizeof(abi.BatchHeader)
SMALLEST_READ = HEADER + 2 * abi.RECORD_BYTES
#: What a descriptor can be when it is handed to ATTACH, and the answer.
NO_VOLUME = {"open": errno.ENOTBLK, "closed": errno.EBADF}


class WrongAnswer(AssertionError):
    """The kernel answered what the model does not allow."""


@dataclass
class Volume:
    """A block device that may be attached, by one of its descriptors."""

    path: str
    fds: list[int]
    identity: Identity


class Model:
    """What is attached, what the reader has in hand, and thereby which answers are right."""

    def __init__(self, control: Control) -> None:
        self.control = control
        self.attached: dict[tuple[int, int], tuple[int, int]] = {}  # (slot, id): (major, minor)
        self.draining: set[tuple[int, int]] = set()
        self.in_hand = 0
        self.refresh()

    def refresh(self) -> None:
        """From LIST, which nothing here disturbs."""
        entries = self.control.list()
        self.attached = {(a.slot, a.attachment_id): (a.major, a.minor) for a in entries if not a.draining}
        self.draining = {(a.slot, a.attachment_id) for a in entries if a.draining}

    def attach(self, request: abi.ReqlogAttach, volumes: dict[int, Volume], others: dict[int, int]) -> int:
        """The one right answer to ATTACH, in the order in which the module checks."""
        if request.flags & ~abi.ATTACH_BIO or request.reserved2:
            return errno.EINVAL
        if request.fd not in volumes:
            return others.get(request.fd, errno.EBADF)
        identity = volumes[request.fd].identity
        if (request.major, request.minor, request.diskseq) != (identity.major, identity.minor, identity.diskseq):
            return errno.ESTALE
        if request.sectors != identity.sectors:
            return errno.ESTALE
        region = request.region_bytes
        if region & (region - 1) or not abi.REGION_MIN_BYTES <= region <= abi.REGION_MAX_BYTES:
            return errno.EINVAL
        return errno.EEXIST if (identity.major, identity.minor) in self.attached.values() else 0


class Fuzz:
    """The devices in many states, and random calls on them."""

    def __init__(self, device: str, seed: int) -> None:
        self.pick = random.Random(seed)
        self.arena, self.second = Arena(), Arena()
        self.control = Control()
        self.held = attach(self.control, device)
        self.device = device
        self.model = Model(self.control)
        self.answers: Counter[str] = Counter()
        self.written: set[int] = set()
        self.recorded: set[int] = set()
        self.cpus = 0
        self.channel_id = 0
        self.channel = -1
        self.controls = [os.open(abi.CONTROL_PATH, mode) for mode in (os.O_RDWR, os.O_RDONLY, os.O_WRONLY)]
        self.controls.append(os.dup(self.controls[0]))
        # Never the number of a file that is opened later.
        self.closed = 900
        self.paths = [os.open(path, os.O_PATH) for path in (abi.CONTROL_PATH, abi.CHANNEL_PATH)]
        self._open_volumes()
        self._reopen()

    def _open_volumes(self) -> None:
        self.volumes: list[Volume] = []
        for path in (self.device, "/dev/vda"):
            fds = [os.open(path, os.O_RDONLY | flags) for flags in (0, os.O_DIRECT, os.O_NONBLOCK)]
            self.volumes.append(Volume(path, fds, identify(fds[0])))
        self.by_fd = {fd: volume for volume in self.volumes for fd in volume.fds}
        pair = os.pipe()
        link, other = socket.socketpair()
        self.keep: list[Any] = [link, other, select.epoll()]
        self.pipe = pair[1]
        open_ones = [*pair, link.fileno(), self.keep[2].fileno(), self.controls[0], self.closed - 1]
        os.dup2(os.open("/dev/null", os.O_RDWR), self.closed - 1)
        open_ones += [os.open(path, os.O_RDONLY) for path in ("/", "/proc/self/mem", "/etc/hostname", "/dev/zero")]
        self.others = dict.fromkeys(open_ones, NO_VOLUME["open"])
        no_use = [os.open(self.device, os.O_PATH), self.closed, -1, -100, 1 << 20, (1 << 31) - 1, -(1 << 31)]
        self.others.update(dict.fromkeys([*no_use, *self.paths], NO_VOLUME["closed"]))

    def _reopen(self) -> None:
        """The channel's one open file, in another mode."""
        if self.channel >= 0:
            os.close(self.channel)
        self.mode = self.pick.choice([os.O_RDONLY, os.O_RDONLY, os.O_RDWR, os.O_WRONLY])
        self.channel = os.open(abi.CHANNEL_PATH, self.mode | os.O_NONBLOCK)
        self.model.in_hand = 0
        info = abi.BufflinkInfo()
        self._expect("INFO", self._ioctl(self.channel, abi.BUFFLINK_IOC_INFO, ctypes.addressof(info)), {0})
        self.cpus, self.channel_id = info.rings, info.channel_id

    # -- one call ----------------------------------------------------------------------------------------------

    @staticmethod
    def _ioctl(fd: int, number: int, argument: int) -> int:
        """0 or more: the result; less: an errno."""
        result, code = call("ioctl", fd, number, argument)
        return -code if result == -1 else result

    def _expect(self, what: str, answer: int, right: set[int], *details: object) -> None:
        """Count the answer, and fail if it is none of the right ones (errnos are negative in both)."""
        name = errno.errorcode.get(-answer, str(answer)) if answer < 0 else "OK"
        self.answers[f"{what.replace('REQLOG_IOC_', '').replace('BUFFLINK_IOC_', 'channel ')} {name}"] += 1
        if answer not in right:
            want = sorted(errno.errorcode.get(-code, str(code)) for code in right)
            raise WrongAnswer(f"{what}: {name}, right would be {want}: {details}")

    def _send(self, fd: int, number: int, payload: bytes) -> tuple[str, int, int]:
        """An ioctl with the payload at some address: (kind of address, address, answer)."""
        kind = self.pick.choice((*KINDS, *USABLE * 4))
        address = self.arena.place(self.pick, kind, payload)
        return kind, address, self._ioctl(fd, number, address)

    def _number(self) -> int:
        return self.pick.choice((self.pick.choice(EDGES), self.pick.getrandbits(64), self.pick.randrange(8)))

    # -- reqlog ------------------------------------------------------------------------------------------------

    def attach(self) -> None:
        """A request that is right but for a field or two."""
        volume = self.pick.choice(self.volumes)
        identity = volume.identity
        request = abi.ReqlogAttach(
            fd=self.pick.choice(volume.fds),
            flags=self.pick.choice((0, abi.ATTACH_BIO)),
            major=identity.major,
            minor=identity.minor,
            sectors=identity.sectors,
            diskseq=identity.diskseq,
            region_bytes=1 << self.pick.randrange(16, 31),
        )
        fields: Any = abi.ReqlogAttach._fields_
        for _ in range(self.pick.choice((0, 0, 1, 1, 2))):
            name, kind = self.pick.choice(fields)
            value = self.pick.choice([*self.others, *self.by_fd]) if name == "fd" else self._number()
            setattr(request, name, kind(value).value)
        right = self.model.attach(request, self.by_fd, self.others)
        kind, address, answer = self._send(self.pick.choice(self.controls), abi.REQLOG_IOC_ATTACH, bytes(request))
        if kind not in USABLE:
            # What is in read-only memory is done all the same, only its answer cannot be delivered.
            early = kind == READ_ONLY and (request.flags & ~abi.ATTACH_BIO or request.reserved2)
            right = errno.EINVAL if early else errno.EFAULT
            self._expect("REQLOG_IOC_ATTACH", answer, {-right}, kind, bytes(request).hex())
            self.model.refresh()
            return
        self._expect("REQLOG_IOC_ATTACH", answer, {-right}, kind, bytes(request).hex())
        if not answer:
            got = abi.ReqlogAttach.from_buffer_copy(self.arena.at(address, ctypes.sizeof(request)))
            if got.slot >= abi.MAX_SLOTS or not got.id or (got.slot, got.id) in self.model.attached:
                raise WrongAnswer(f"ATTACH gave slot {got.slot}, id {got.id}")
            self.model.refresh()
            if (got.slot, got.id) not in self.model.attached:
                raise WrongAnswer(f"slot {got.slot} is not in the list")

    def detach(self) -> None:
        """Something attached, or nothing: the volume that is held stays."""
        mine = (self.held.slot, self.held.attachment_id)
        known = [key for key in self.model.attached if key != mine]
        slot, wanted = self.pick.choice(known) if known else (0, 0)
        if not known or self.pick.random() < 0.6:
            slot = self.pick.choice((slot, self.held.slot, self._number() & 0xFFFFFFFF))
            wanted = self.pick.choice((wanted, wanted ^ 1, self._number()))
        if (slot, wanted) == mine:
            return
        request = abi.ReqlogDetach(slot=slot, id=wanted, reserved=self.pick.choice((0, 0, 0, self._number())))
        right = -errno.EINVAL if request.reserved else -errno.ENOENT
        if not request.reserved and (request.slot, request.id) in self.model.attached:
            right = 0
        kind, _, answer = self._send(self.pick.choice(self.controls), abi.REQLOG_IOC_DETACH, bytes(request))
        self._expect("REQLOG_IOC_DETACH", answer, {-errno.EFAULT if kind in UNUSABLE else right}, kind, slot, wanted)
        self.model.refresh()

    def list(self) -> None:
        """Room for none up to 2^32 - 1 entries, where some or no memory is."""
        kind = self.pick.choice(KINDS)
        entries = self.arena.place(self.pick, kind, bytes(512 if kind == "end" else 16))
        count = self.pick.choice((0, 1, 2, 16, abi.MAX_SLOTS, 1 << 31, (1 << 32) - 1, self.pick.getrandbits(32)))
        request = abi.ReqlogList(entries=entries, count=count, total=self._number() & 0xFFFFFFFF)
        answer = self._ioctl(self.controls[0], abi.REQLOG_IOC_LIST, ctypes.addressof(request))
        total = len(self.model.attached) + len(self.model.draining)
        right = {-errno.ENOSPC} if count < total else {0}
        if kind not in USABLE and count:
            right = {-errno.EFAULT}
        elif count:
            right.add(-errno.EFAULT)  # draining ones may need more room than is there
            if count >= len(self.model.attached):
                right.add(0)  # they may also be gone by now
        self._expect("REQLOG_IOC_LIST", answer, right, kind, count, total)
        self.model.refresh()
        kind, _, answer = self._send(self.controls[0], abi.REQLOG_IOC_LIST, bytes(abi.ReqlogList()))
        right = {-errno.ENOSPC} if kind in USABLE else {-errno.EFAULT}
        self._expect("REQLOG_IOC_LIST", answer, right, kind)

    def stats(self) -> None:
        """Of something known, or not."""
        known = [*self.model.attached, *self.model.draining]
        slot, wanted = self.pick.choice(known)
        if self.pick.random() < 0.5:
            slot, wanted = self.pick.choice((slot, self._number() & 0xFFFFFFFF)), self._number()
        request = abi.ReqlogStats(slot=slot, id=wanted, reserved=self.pick.choice((0, 0, 0, self._number())))
        fill = self.pick.randbytes(ctypes.sizeof(request) - 16)
        if request.reserved:
            right = {-errno.EINVAL}
        elif (request.slot, request.id) in self.model.attached:
            right = {0}
        elif (request.slot, request.id) in self.model.draining:
            right = {0, -errno.ENOENT}
        else:
            right = {-errno.ENOENT}
        kind, address, answer = self._send(self.controls[0], abi.REQLOG_IOC_STATS, bytes(request)[:16] + fill)
        if kind in UNUSABLE:
            right = {-errno.EFAULT}
        elif kind == READ_ONLY and 0 in right:
            right = {-errno.EFAULT, -errno.ENOENT} if len(right) > 1 else {-errno.EFAULT}
        self._expect("REQLOG_IOC_STATS", answer, right, kind, slot, wanted)
        if not answer:
            got = abi.ReqlogStats.from_buffer_copy(self.arena.at(address, ctypes.sizeof(request)))
            if (got.slot, got.id) != (slot, wanted):
                raise WrongAnswer("STATS of another attachment")

    # -- bufflink ----------------------------------------------------------------------------------------------

    def consumed(self) -> None:
        """Any number but, mostly, the one in hand."""
        seq = self.pick.choice((self.model.in_hand, self.model.in_hand + 1, max(0, self.model.in_hand - 1)))
        seq = self.pick.choice((seq, seq, self._number()))
        right = 0 if seq and seq == self.model.in_hand else -errno.ESTALE
        payload = ctypes.c_uint64(seq)
        kind, _, answer = self._send(self.channel, abi.BUFFLINK_IOC_CONSUMED, bytes(payload))
        self._expect("BUFFLINK_IOC_CONSUMED", answer, {-errno.EFAULT if kind in UNUSABLE else right}, kind, seq)
        if not answer:
            self.model.in_hand = 0

    def barrier(self) -> None:
        """BARRIER and PASSED with room that is too small, too large, or nowhere."""
        number = self.pick.choice((abi.BUFFLINK_IOC_BARRIER, abi.BUFFLINK_IOC_PASSED))
        where = self.pick.choice((*KINDS, *USABLE * 4))
        barrier = abi.BufflinkBarrier(
            channel_id=self.pick.choice((self.channel_id, self.channel_id, self._number())),
            sweep=self._number(),
            rings=self.pick.choice((self.cpus, self.cpus, self.cpus, self.cpus + 1, 0, self._number() & 0xFFFFFFFF)),
            reserved=self.pick.choice((0, 0, 0, 0, self._number() & 0xFFFFFFFF)),
            positions=self.second.place(self.pick, where, bytes(8 * self.cpus)),
        )
        kind, _, answer = self._send(self.channel, number, bytes(barrier))
        asks = number == abi.BUFFLINK_IOC_PASSED
        if kind in UNUSABLE:
            right = {-errno.EFAULT}
        elif barrier.rings != self.cpus or barrier.reserved:
            right = {-errno.EINVAL}
        elif asks and barrier.channel_id != self.channel_id:
            right = {-errno.ESTALE}
        elif where in UNUSABLE or (not asks and READ_ONLY in (where, kind)):
            right = {-errno.EFAULT}
        else:
            right = {0, 1} if asks else {0}
        self._expect(CHANNEL[number], answer, right, kind, where, bytes(barrier).hex())

    def look(self) -> None:
        """ABI, INFO and STATS, which only fill memory."""
        fd, number, size = self.pick.choice(
            (
                (self.channel, abi.BUFFLINK_IOC_ABI, 4),
                (self.channel, abi.BUFFLINK_IOC_INFO, ctypes.sizeof(abi.BufflinkInfo)),
                (self.channel, abi.BUFFLINK_IOC_STATS, ctypes.sizeof(abi.BufflinkStats)),
                (self.controls[1], abi.REQLOG_IOC_ABI, 4),
            )
        )
        kind, _, answer = self._send(fd, number, self.pick.randbytes(size))
        right = 0 if kind in USABLE else -errno.EFAULT
        self._expect({**CONTROL, **CHANNEL}[number], answer, {right}, kind)

    def read(self) -> None:
        """Any length, to any address; the batch must survive."""
        length = self.pick.choice((0, 1, HEADER, SMALLEST_READ - 1, SMALLEST_READ, 4096, ROOM, 1 << 31, (1 << 63) - 1))
        kind = self.pick.choice((*KINDS, *USABLE * 4))
        address = self.arena.place(self.pick, kind, bytes(min(length, ROOM - 8)))
        if self.mode != os.O_WRONLY and self.pick.random() < 0.2:
            vector = (ctypes.c_uint64 * 4)(address, length, address, length)
            result, code = call("readv", self.channel, ctypes.addressof(vector), self.pick.choice((1, 2)))
            right = {0, -errno.EINVAL, -errno.EFAULT, -errno.EAGAIN, -errno.EMSGSIZE}
        else:
            result, code = call("read", self.channel, address, length)
            right = {-errno.EAGAIN, -errno.EMSGSIZE, -errno.EFAULT}
            if self.mode == os.O_WRONLY:
                right = {-errno.EBADF}
            elif length < SMALLEST_READ:
                right = {-errno.EINVAL, -errno.EFAULT} if kind in UNUSABLE else {-errno.EINVAL}
            elif kind in USABLE and length <= ROOM - 8:
                right = {-errno.EAGAIN, -errno.EMSGSIZE}
        if result > 0:
            # A batch may be small enough for what can be used before the end.
            if kind not in USABLE and not (kind == "straddling" and result <= self.arena.room(address)):
                raise WrongAnswer(f"read of {result} bytes to {kind} memory")
            self.answers["read OK"] += 1
            # The second part of a vector got the same batch at the same place.
            self._note(self.arena.at(address, min(result, length)))
            return
        self._expect("read", -code if result == -1 else result, right, kind, length)

    def _note(self, data: bytes) -> None:
        header = abi.BatchHeader.from_buffer_copy(data)
        if len(data) < HEADER + header.count * abi.RECORD_BYTES or not header.count:
            raise WrongAnswer(f"a batch of {header.count} records in {len(data)} bytes")
        self.model.in_hand = header.seq
        for number in range(header.count):
            record = data[HEADER + number * 16 :][:16]
            sector, count, slot = (int.from_bytes(record[a:b], "little") for a, b in ((0, 8), (8, 12), (12, 14)))
            if slot == self.held.slot:
                self.recorded.update(range(sector, min(sector + count, self.held.sectors)))

    # -- anything else -----------------------------------------------------------------------------------------

    def number(self) -> None:
        """Numbers that are nearly right, and numbers of the other device."""
        fd = self.pick.choice([*self.controls, self.channel])
        known = CHANNEL if fd == self.channel else CONTROL
        number = self.pick.choice([*CONTROL, *CHANNEL])
        change = self.pick.randrange(4)
        if change == 1:
            number = number & ~0x3FFF0000 | self.pick.randrange(1 << 14) << 16
        elif change == 2:
            number = number & ~0xC0000000 | self.pick.randrange(4) << 30
        elif change == 3:
            number = (
                self.pick.getrandbits(32) & 0xFFFF0000 | self.pick.choice((0xBE, 0xBF)) << 8 | self.pick.getrandbits(8)
            )
        if number in known:
            return
        kind = self.pick.choice(KINDS)
        answer = self._ioctl(fd, number, self.arena.place(self.pick, kind, self.pick.randbytes(256)))
        self._expect("unknown ioctl", answer, {-errno.ENOTTY}, hex(number))

    def dead(self) -> None:
        """Known numbers on descriptors that are closed or O_PATH."""
        fd = self.pick.choice([*self.paths, self.closed, -1])
        self._expect("dead descriptor", self._ioctl(fd, self.pick.choice([*CONTROL, *CHANNEL]), 0), {-errno.EBADF})

    def other_calls(self) -> None:
        """What neither device offers."""
        fd = self.pick.choice([*self.controls, self.channel])
        where = self.arena.place(self.pick, self.pick.choice(USABLE), bytes(64))
        no_access, wrong = -errno.EBADF, -errno.EINVAL
        name, arguments, right = self.pick.choice(
            (
                ("write", (fd, where, 64), {no_access, wrong}),
                ("pwrite64", (fd, where, 64, 0), {no_access, wrong, -errno.ESPIPE}),
                ("pread64", (fd, where, 64, 0), {no_access, wrong, -errno.ESPIPE}),
                ("lseek", (fd, self.pick.choice(EDGES), self.pick.randrange(5)), {-errno.ESPIPE}),
                ("fallocate", (fd, 0, 0, 4096), {no_access, -errno.ESPIPE, -errno.ENODEV}),
                ("splice", (fd, 0, self.pipe, 0, 4096, 0), {no_access, wrong}),
                ("sendfile", (self.closed - 1, fd, 0, 4096), {no_access, wrong, -errno.ESPIPE}),
                ("fsync", (fd,), {wrong}),
                ("ftruncate", (fd, 4096), {wrong}),
                ("read", (self.controls[0], where, 64), {wrong}),
            )
        )
        result, code = call(name, *arguments)
        self._expect(name, -code if result == -1 else result, right, fd)
        try:
            mmap.mmap(fd, mmap.PAGESIZE, prot=mmap.PROT_READ).close()
        except OSError as error:
            self._expect("mmap", -(error.errno or 0), {-errno.ENODEV, -errno.EACCES})
        else:
            raise WrongAnswer("a device could be mapped")
        poll = select.poll()
        poll.register(self.channel, self.pick.getrandbits(15))
        poll.poll(0)

    def inherited(self) -> None:
        """A child reads by the descriptor that it inherited, and dies; what it was given is in hand."""
        child = os.fork()
        if not child:
            result, _ = call("read", self.channel, self.arena.start, ROOM)
            ctypes.memset(self.second.start, result > 0, 1)
            os.kill(os.getpid(), signal.SIGKILL)
        os.waitpid(child, 0)
        if self.second.at(self.second.start, 1) == b"\1":
            self.answers["read by a child OK"] += 1
            self._note(self.arena.at(self.arena.start, ROOM))

    def again(self) -> None:
        """Reopen the channel; a second reader is refused."""
        self._reopen()
        try:
            os.open(abi.CHANNEL_PATH, os.O_RDONLY | os.O_NONBLOCK)
        except OSError as error:
            self._expect("second reader", -(error.errno or 0), {-errno.EBUSY})
        else:
            raise WrongAnswer("two readers")

    def write(self) -> None:
        """Something to record; now and then into a ring that is too small for it."""
        RING_LIMIT.write_text(self.pick.choice(("0", "0", "1")))
        for _ in range(3):
            sector = self.pick.randrange(0, self.held.sectors - 8)
            write(self.device, sector)
            self.written.add(sector)

    def run(self, operations: int) -> None:
        """All of it."""
        often = (self.attach, self.detach, self.list, self.stats, self.consumed, self.barrier, self.look, self.read)
        rarely = (self.number, self.dead, self.other_calls, self.inherited)
        for number in range(operations):
            self.pick.choice((*often, *often, *rarely))()
            if number % 50 == 25:
                self.write()
            if number % 100 == 99:
                self.again()

    def finish(self) -> dict[str, Any]:
        """Everything that was written has come out, or comes now; nothing is left attached."""
        RING_LIMIT.write_text("0")
        self.mode = os.O_WRONLY
        while self.mode == os.O_WRONLY:
            self._reopen()
        buffer = ctypes.create_string_buffer(HEADER + 32768 * abi.RECORD_BYTES)
        self.model.refresh()
        for slot, wanted in self.model.attached:
            detach = abi.ReqlogDetach(slot=slot, id=wanted)
            self._expect("end", self._ioctl(self.controls[0], abi.REQLOG_IOC_DETACH, ctypes.addressof(detach)), {0})
        while True:
            result, code = call("read", self.channel, ctypes.addressof(buffer), len(buffer))
            if code == errno.EAGAIN:
                break
            self._note(buffer.raw[:result])
            seq = ctypes.c_uint64(self.model.in_hand)
            self._expect("end", self._ioctl(self.channel, abi.BUFFLINK_IOC_CONSUMED, ctypes.addressof(seq)), {0})
        return {
            "written": len(self.written),
            "missed": len(self.written - self.recorded),
            "left": len(self.control.list()),
            "answers": dict(sorted(self.answers.items())),
        }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("device")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--operations", type=int, required=True)
    options = parser.parse_args()
    fuzz = Fuzz(options.device, options.seed)
    fuzz.run(options.operations)
    print(json.dumps({"seed": options.seed, **fuzz.finish()}))


if __name__ == "__main__":
    main()
