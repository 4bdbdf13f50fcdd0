# SPDX-License-Identifier: GPL-3.0-or-later
"""In a guest: devices that fail, grow, go away, or take commands past the block layer. See cases.py.

The device is a scsi_debug disk or a loop device of the case's own; the argument is not used.
"""

from __future__ import annotations

import fcntl
import os
import select
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bmigrate.kernel import abi
from bmigrate.kernel.channel import Batch, Channel
from bmigrate.kernel.control import Attachment, Control
from tests.vm.kernel_guest import devices
from tests.vm.kernel_guest.cases import RING_LIMIT, attach, empty, main, ranges, wait_for, write
from tests.vm.kernel_guest.command import run
from tests.vm.kernel_guest.passthrough import FROM_DEVICE, NO_DATA, TO_DEVICE, scsi_command

SLEEP_SECONDS = 60
POLL = "7 "  # system call number on x86-64


@contextmanager
def _scsi_disk(*options: str) -> Iterator[str]:
    """A scsi_debug disk."""
    devices.drop_scsi()
    path = devices.scsi(*options)
    try:
        yield path
    finally:
        devices.drop_scsi()


@contextmanager
def _locked(path: str) -> Iterator[None]:
    """The disk under the lock that udev honours; what udev had begun before is over."""
    fd = os.open(path, os.O_RDONLY)
    try:
        run("udevadm", "settle")
        fcntl.flock(fd, fcntl.LOCK_EX)
        run("udevadm", "settle")
        yield
    finally:
        os.close(fd)


@contextmanager
def _attachment_of(
    path: str, region_bytes: int = 65536, bio_based: bool = False
) -> Iterator[tuple[Attachment, Control, Channel]]:
    """The device, attached, with an empty log."""
    with Control() as control, Channel() as channel:
        empty(channel)
        attachment = attach(control, path, region_bytes, bio_based)
        try:
            yield attachment, control, channel
        finally:
            control.detach(attachment.slot, attachment.attachment_id)
            empty(channel)


def _whole(batches: list[Batch], attachment: Attachment) -> bool:
    marked = sorted((s - attachment.start_sector, c) for batch in batches for s, c in ranges(batch))
    end = 0
    for start, count in marked:
        if start > end:
            return False
        end = max(end, start + count)
    return end >= attachment.sectors


def passthrough(device: str) -> dict[str, Any]:
    """A command past the block layer marks everything, unless it is known to change nothing; a barrier waits for it.

    The disk is locked against udev: it has the kernel read the partition table again whenever a writer closes the
    disk, and for that sd sends commands of its own, at a moment of its own.
    """
    with _scsi_disk() as disk, _locked(disk), _attachment_of(disk) as (attachment, control, channel):
        results: dict[str, Any] = {}
        run("modprobe", "sg")
        generic = Path("/dev", next(Path("/sys/block", Path(disk).name, "device/scsi_generic").iterdir()).name)

        def send(name: str, command: bytes, direction: int, data: bytes = b"", path: str = disk) -> None:
            before = control.stats(attachment.slot).passthrough
            status = scsi_command(path, command, direction, data)
            barrier = channel.barrier()
            passed_at_once = channel.passed(barrier)
            batches = empty(channel)
            assert channel.passed(barrier)
            flags = {int(f) for b in batches for f in b.records["flags"]}
            results[name] = [
                status,
                control.stats(attachment.slot).passthrough - before,
                passed_at_once,
                _whole(batches, attachment),
                sorted(flags),
            ]

        send("inquiry", bytes([0x12, 0, 0, 0, 96, 0]), FROM_DEVICE, bytes(96))
        send("write", bytes([0x2A, 0, 0, 0, 0, 5, 0, 0, 1, 0]), TO_DEVICE, os.urandom(512))
        send("write zeroes without data", bytes([0x93, 1, *bytes(7), 9, 0, 0, 0, 1, 0, 0]), NO_DATA)
        send("write through sg", bytes([0x2A, 0, 0, 0, 0, 5, 0, 0, 1, 0]), TO_DEVICE, os.urandom(512), str(generic))
        send("test unit ready", bytes(6), NO_DATA)
        # ATA PASS-THROUGH(16) of SMART RETURN STATUS and of SECURITY ERASE UNIT; the disk has no ATA, and refuses.
        send("smart status", bytes([0x85, 6, 0x20, 0, 0xDA, 0, 0, 0, 0, 0, 0x4F, 0, 0xC2, 0, 0xB0, 0]), NO_DATA)
        send("security erase", bytes([0x85, 6, 0x20, *bytes(11), 0xF4, 0]), NO_DATA)
        send("synchronize cache", bytes([0x35, *bytes(9)]), NO_DATA)
        return results


def passthrough_below(device: str) -> dict[str, int]:
    """A command to a disk is for every volume of the device mapper, because it may have come through that one."""
    with _scsi_disk() as disk, _locked(disk):
        sectors = run("blockdev", "--getsz", disk).strip()
        run("dmsetup", "create", "kernel-test-command", "--table", f"0 {sectors} linear {disk} 0")
        upper = "/dev/mapper/kernel-test-command"
        try:
            with _attachment_of(upper, bio_based=True) as (attachment, control, channel):
                other = attach(control, device, 65536)
                try:
                    marks = {}
                    for name, path in (("through", upper), ("below", disk)):
                        before = control.stats(attachment.slot).passthrough
                        cdb = bytes([0x2A, 0, 0, 0, 0, 5, 0, 0, 1, 0])
                        status = scsi_command(path, cdb, TO_DEVICE, os.urandom(512))
                        assert status == 0 and _whole(empty(channel), attachment), (name, status)
                        marks[name] = control.stats(attachment.slot).passthrough - before
                    return {**marks, "elsewhere": control.stats(other.slot).passthrough}
                finally:
                    control.detach(other.slot, other.attachment_id)
        finally:
            run("dmsetup", "remove", "--retry", "kernel-test-command")


def woken(device: str) -> dict[str, int]:
    """A reader that sleeps is woken by a record of the first attachment, though the last one has nothing of the write.

    Disk and second partition are attached, the first partition is written. How many of the reader's sleeps ended.
    """
    make, drop = devices.KINDS["bmtest-partition"]
    drop()
    try:
        first = make()
        with _attachment_of("/dev/bmtest0") as (_, control, channel):
            other = attach(control, "/dev/bmtest0p2", 65536)
            sleeper = threading.get_native_id()

            def wake() -> None:
                wait_for(lambda: Path(f"/proc/self/task/{sleeper}/syscall").read_text().startswith(POLL), "no sleep")
                write(first, 64, 8)

            ended = 0
            poll = select.poll()
            poll.register(channel, select.POLLIN)
            for _ in range(4):
                thread = threading.Thread(target=wake)
                thread.start()
                # At its time-out poll(2) looks once more, and finds what nobody woke it for.
                began = time.monotonic()
                poll.poll(1000 * SLEEP_SECONDS)
                ended += time.monotonic() - began < SLEEP_SECONDS
                thread.join()
                empty(channel)
            control.detach(other.slot, other.attachment_id)
            return {"ended": ended}
    finally:
        drop()


def failed_writes(device: str) -> dict[str, Any]:
    """A write that the device refused is recorded, with the flag, in full; also through the overflow."""
    devices.drop_null()
    disk = devices.null_disk()
    try:
        with _attachment_of(disk) as (attachment, control, channel):
            (devices.NULL_DISK / "badblocks").write_text("+4100-4101")
            results: dict[str, Any] = {}
            for name, limit in (("ring", "0"), ("overflow", "1")):
                RING_LIMIT.write_text(limit)
                write(disk, 64, 8)
                for _ in range(8):
                    _write_that_fails(disk, 4096)
                RING_LIMIT.write_text("0")
                records = [
                    (int(r["sector"]), int(r["nr_sectors"]), int(r["flags"])) for b in empty(channel) for r in b.records
                ]
                results[name] = sorted(set(records))
            return {**results, "failed": control.stats(attachment.slot).failed}
    finally:
        RING_LIMIT.write_text("0")
        devices.drop_null()


def _write_that_fails(disk: str, sector: int) -> None:
    try:
        write(disk, sector, 8)
    except OSError:
        return
    raise AssertionError("the write did not fail")


def removed(device: str) -> dict[str, Any]:
    """A disk that is taken away while attached goes at once, is listed as gone, and is let go of by DETACH."""
    with Control() as control, Channel() as channel:
        empty(channel)
        devices.drop_scsi()
        disk = devices.scsi()
        attachment = attach(control, disk)
        write(disk, 8)
        # Nobody else may have it open: udev looks at a disk that was written to.
        run("udevadm", "settle")
        users = int(Path("/sys/module/scsi_debug/refcnt").read_text())
        pinned = subprocess.run(["rmmod", "scsi_debug"], capture_output=True).returncode
        Path(f"/sys/block/{attachment.disk}/device/delete").write_text("1")
        wait_for(lambda: not os.path.exists(disk), "the disk does not go")
        [listed] = control.list()
        assert listed.gone and listed.disk_sectors == 0 and not listed.draining, listed
        stats = control.stats(attachment.slot)
        control.detach(attachment.slot, attachment.attachment_id)
        records = [pair for batch in empty(channel) for pair in ranges(batch)]
        assert not control.list()
        devices.drop_scsi()
        again = devices.scsi()
        try:
            fresh = attach(control, again)
            assert not fresh.gone and fresh.attachment_id != attachment.attachment_id
            control.detach(fresh.slot, fresh.attachment_id)
            control.list()
        finally:
            devices.drop_scsi()
        return {"rmmod of the driver": pinned, "users": users, "records": stats.records, "ranges": records}


def grown(device: str) -> dict[str, Any]:
    """Writes behind the end that the disk had when it was attached are recorded, and the entry says so."""
    image = Path("/var/tmp/kernel-grown.img")
    with image.open("wb") as file:
        file.truncate(1 << 20)
    loop = run("losetup", "--find", "--show", str(image)).strip()
    try:
        with _attachment_of(loop) as (attachment, control, channel):
            with image.open("r+b") as file:
                file.truncate(2 << 20)
            run("losetup", "--set-capacity", loop)
            [listed] = control.list()
            assert (listed.sectors, listed.disk_sectors, listed.beyond) == (2048, 4096, False), listed
            write(loop, 3000)
            first = [pair for batch in empty(channel) for pair in ranges(batch)]
            RING_LIMIT.write_text("1")
            for _ in range(16):
                write(loop, 2040, 16)
            RING_LIMIT.write_text("0")
            widened = [
                (int(r["sector"]), int(r["nr_sectors"]))
                for b in empty(channel)
                for r in b.records
                if r["flags"] & abi.FLAG_WIDENED
            ]
            [listed] = control.list()
            return {
                "first": first,
                "widened": sorted(widened),
                "beyond": listed.beyond,
                "stats": control.stats(attachment.slot).beyond,
            }
    finally:
        run("losetup", "--detach", loop)
        image.unlink()


if __name__ == "__main__":
    main(globals())
