# SPDX-License-Identifier: GPL-3.0-or-later
"""In a guest: what reqlog promises about attachments. Each function is a case; see cases.py."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import os
import random
import subprocess
import threading
from functools import partial
from pathlib import Path
from typing import Any

from bmigrate.kernel import abi
from bmigrate.kernel.channel import Channel
from bmigrate.kernel.control import Attachment, Control, identify
from bmigrate.kernel.errors import AttachRefused
from tests.vm.kernel_guest import workloads
from tests.vm.kernel_guest.cases import (
    REGION,
    RING_LIMIT,
    attach,
    attached,
    empty,
    main,
    next_batch,
    ranges,
    refused,
    wait_for,
    write,
)


def outlives_everything(device: str) -> dict[str, Any]:
    """An attachment stays when control, reader and program are gone, and keeps its id; rmmod is refused meanwhile."""
    with Control() as control:
        attachment = attach(control, device)
    module = subprocess.run(["rmmod", "reqlog"], capture_output=True, text=True)
    write(device, 40)
    with Control() as control:
        listed = [a for a in control.list() if not a.draining]
        assert listed == [attachment], listed
        twice = refused(attach, control, device)
        assert isinstance(twice, AttachRefused)
        assert (twice.slot, twice.attachment_id) == (attachment.slot, attachment.attachment_id), vars(twice)
        with Channel() as channel:
            got = [pair for batch in empty(channel) for pair in ranges(batch)]
        control.detach(attachment.slot, attachment.attachment_id)
        gone = refused(control.detach, attachment.slot, attachment.attachment_id)
        assert not control.list()
    return {
        "rmmod": module.returncode,
        "message": module.stderr,
        "twice": twice.code,
        "detached": gone.code,
        "recorded": got,
    }


def open_channel_pins(device: str) -> dict[str, Any]:
    """rmmod is refused while somebody has the channel or the control open."""
    results = []
    with Channel():
        results.append(subprocess.run(["rmmod", "reqlog"], capture_output=True).returncode)
    with Control():
        results.append(subprocess.run(["rmmod", "reqlog"], capture_output=True).returncode)
    return {"rmmod": results}


def slots(device: str) -> dict[str, Any]:
    """A slot is not used again before its records and its overflow are consumed; the old id never works again."""
    with Control() as control, Channel() as channel:
        empty(channel)
        first = attach(control, device)
        RING_LIMIT.write_text("1")
        for sector in range(16):
            write(device, sector * 1024)
        RING_LIMIT.write_text("0")
        control.detach(first.slot, first.attachment_id)
        states = [[(a.slot, a.draining) for a in control.list()]]
        second = attach(control, device)
        assert second.slot != first.slot and second.attachment_id != first.attachment_id
        seen: set[int] = set()
        batch = next_batch(channel)
        seen.update(int(r["slot"]) for r in batch.records)
        states.append([(a.slot, a.draining) for a in control.list()])
        channel.consumed(batch.seq)
        empty(channel)
        states.append([(a.slot, a.draining) for a in control.list()])
        assert refused(control.stats, first.slot, first.attachment_id).code == "not_attached"
        control.detach(second.slot, second.attachment_id)
        empty(channel)
        assert not control.list()
        assert seen == {first.slot}, seen
        return {"first": first.slot, "second": second.slot, "states": states}


def every_slot(device: str) -> dict[str, Any]:
    """All slots can be in use by undrained attachments; then ATTACH says so; then they all come back."""
    fd = os.open(device, os.O_RDONLY)
    identity = identify(fd)
    with attached(device) as held, Control() as control, Channel() as channel:
        # A batch that is not consumed keeps every later mark from being passed.
        write(device, 0)
        batch = next_batch(channel)
        write(device, 8)
        control.detach(held.slot, held.attachment_id)
        # With one volume attached all along the tracepoint's probe stays, which makes this much faster.
        other = attach(control, "/dev/vda")
        used = {held.slot, other.slot}
        request = abi.ReqlogAttach()
        while True:
            request = abi.ReqlogAttach(
                fd=fd,
                major=identity.major,
                minor=identity.minor,
                sectors=identity.sectors,
                diskseq=identity.diskseq,
                region_bytes=1 << 20,
            )
            try:
                fcntl.ioctl(control.fileno(), abi.REQLOG_IOC_ATTACH, request)
            except OSError:
                break
            used.add(request.slot)
            detach = abi.ReqlogDetach(id=request.id, slot=request.slot)
            fcntl.ioctl(control.fileno(), abi.REQLOG_IOC_DETACH, detach)
        draining = sum(a.draining for a in control.list())
        channel.consumed(batch.seq)
        empty(channel)
        left = [a.slot for a in control.list()]
        control.detach(other.slot, other.attachment_id)
        os.close(fd)
        return {
            "slots": len(used),
            "code": abi.REASONS[request.reason][0],
            "draining": draining,
            "left": left == [other.slot],
        }


def wrong_identity(device: str) -> dict[str, Any]:
    """Each part of the identity is checked against the open file, and what is no usable request is refused."""
    fd = os.open(device, os.O_RDONLY)
    right = identify(fd)
    with Control() as control:
        codes: dict[str, Any] = {}
        for field in ("major", "minor", "sectors", "diskseq"):
            wrong = dataclasses.replace(right, **{field: getattr(right, field) + 1})
            codes[field] = refused(control.attach, fd, REGION, wrong).code
        for region in (0, 1, 2048, 65535, 65536 * 3, 1 << 31):
            codes[f"region {region}"] = refused(control.attach, fd, region, right).code
        null = os.open("/dev/null", os.O_RDWR)
        codes["/dev/null"] = refused(control.attach, null, REGION, right).code
        regular = os.open("/etc/hostname", os.O_RDONLY)
        codes["file"] = refused(control.attach, regular, REGION, right).code
        path = os.open(device, os.O_PATH)
        codes["O_PATH"] = refused(control.attach, path, REGION, right).errno
        codes["closed"] = refused(control.attach, 999, REGION, right).errno
        assert not control.list()
    return codes


def partitions(device: str) -> dict[str, Any]:
    """Sectors are absolute; a partition's attachment has its own part of a request, the disk's has all of it."""
    workloads.partition_table(device)
    name = os.path.basename(os.path.realpath(device))
    parts = sorted(p.name for p in Path(f"/sys/block/{name}").glob(f"{name}*"))
    try:
        with Control() as control, Channel() as channel:
            empty(channel)
            disk, one, two = [attach(control, p) for p in (device, f"/dev/{parts[0]}", f"/dev/{parts[1]}")]
            assert (disk.partition, one.partition, two.partition) == (False, True, True)
            assert one.start_sector == 2048 and two.start_sector > one.start_sector + one.sectors
            write(f"/dev/{parts[0]}", 8)
            write(f"/dev/{parts[1]}", 16)
            write(device, 2040, 16)  # over the beginning of the first
            write(device, one.start_sector + one.sectors - 4, 8)  # over its end, into the gap
            write(device, one.start_sector + one.sectors + 8)  # in the gap
            records = [
                (int(r["slot"]), int(r["sector"]), int(r["nr_sectors"]))
                for batch in empty(channel)
                for r in batch.records
            ]
            for attachment in (disk, one, two):
                control.detach(attachment.slot, attachment.attachment_id)
            end = one.start_sector + one.sectors
            want = {
                disk.slot: [
                    (one.start_sector + 8, 1),
                    (two.start_sector + 16, 1),
                    (2040, 16),
                    (end - 4, 8),
                    (end + 8, 1),
                ],
                one.slot: [(one.start_sector + 8, 1), (2048, 8), (end - 4, 4)],
                two.slot: [(two.start_sector + 16, 1)],
            }
            got = {slot: [r[1:] for r in records if r[0] == slot] for slot in want}
            for slot in want:
                assert sorted(got[slot]) == sorted(want[slot]), (slot, got, want)
            return {"records": len(records)}
    finally:
        subprocess.run(["wipefs", "-qa", device], check=True)
        subprocess.run(["blockdev", "--rereadpt", device], check=True)


def flush_without_data(device: str) -> dict[str, Any]:
    """Flushes without data, reads and the reading of the serial number make no record."""
    with attached(device) as attachment, Control() as control, Channel() as channel:
        fd = os.open(device, os.O_RDWR)
        for _ in range(10):
            os.fsync(fd)
            os.pread(fd, 4096, 0)
        os.close(fd)
        serial = Path(f"/sys/block/{attachment.disk}/serial").read_text()
        stats = control.stats(attachment.slot)
        assert channel.read_batch() is None
        return {"serial": serial, "records": stats.records, "passthrough": stats.passthrough}


def privileges(device: str) -> dict[str, Any]:
    """Neither device can be opened without being root, nor by a root that lacks CAP_SYS_ADMIN."""
    probe = "import sys,os\ntry:\n os.open(sys.argv[1], os.O_RDONLY); print(0)\nexcept OSError as e:\n print(e.errno)"
    results: dict[str, Any] = {}
    for path in (abi.CHANNEL_PATH, abi.CONTROL_PATH):
        results[path] = [oct(os.stat(path).st_mode & 0o7777)]
        for who in (["--reuid", "nobody", "--clear-groups"], ["--bounding-set", "-sys_admin", "--inh-caps", "-all"]):
            done = subprocess.run(["setpriv", *who, "python3", "-c", probe, path], capture_output=True, text=True)
            results[path].append(int(done.stdout))
    return results


def garbage(device: str) -> dict[str, Any]:
    """Wrong ioctl numbers, bad addresses and random payloads are refused, and leave the log as it was."""
    pick = random.Random(20)
    refusals: dict[int, int] = {}
    numbers = [value for name, value in vars(abi).items() if "_IOC_" in name and isinstance(value, int)]
    with attached(device) as attachment, Control() as control, Channel() as channel:
        write(device, 24)
        for _ in range(4000):
            fd = pick.choice([control.fileno(), channel.fileno()])
            number = pick.choice([*numbers, *numbers, pick.randrange(1 << 32)])
            payload: Any = pick.choice([0, 1, 0xFFFF_8000_0000_0000 & 0xFFFF_FFFF, None])
            if payload is None:
                payload = bytearray(pick.randbytes(256))
                if number == abi.REQLOG_IOC_DETACH:
                    payload[:8] = bytes(8)
            try:
                fcntl.ioctl(fd, number, payload)
                refusals[0] = refusals.get(0, 0) + 1
            except OSError as error:
                refusals[error.errno or 0] = refusals.get(error.errno or 0, 0) + 1
        assert [a.attachment_id for a in control.list()] == [attachment.attachment_id]
        batch = next_batch(channel)
        assert ranges(batch) == [(24, 1)] and not batch.again, batch
        channel.consumed(batch.seq)
        return {errno.errorcode.get(number, "OK"): count for number, count in sorted(refusals.items())}


def _more_than(control: Control, attachment: Attachment, records: int) -> bool:
    return control.stats(attachment.slot, attachment.attachment_id).records > records


def churn(device: str) -> dict[str, Any]:
    """Attach and detach, thousands of requests and a reader at once: no record of a slot that nobody had."""
    over = threading.Event()
    rounds = 16
    seen: set[int] = set()
    with Control() as control, Channel() as channel:
        empty(channel)

        def read() -> None:
            while not over.is_set():
                for batch in empty(channel):
                    seen.update(int(slot) for slot in set(batch.records["slot"].tolist()))
                over.wait(0.01)

        def disturb() -> None:
            while not over.is_set():
                workloads.raw(device, 1, 20, ("write", "discard"), threads=2)

        threads = [threading.Thread(target=read), threading.Thread(target=disturb)]
        for thread in threads:
            thread.start()
        used = set()
        try:
            for number in range(rounds):
                RING_LIMIT.write_text(str(number % 3))
                attachment = attach(control, device, 4096 << (number % 5))
                used.add(attachment.slot)
                before = control.stats(attachment.slot, attachment.attachment_id).records
                if number % 4 == 0:
                    wait_for(partial(_more_than, control, attachment, before), "nothing is recorded")
                control.detach(attachment.slot, attachment.attachment_id)
        finally:
            over.set()
            for thread in threads:
                thread.join()
            RING_LIMIT.write_text("0")
        for batch in empty(channel):
            seen.update(batch.records["slot"].tolist())
        wait_for(lambda: not control.list(), "some slot is never free again")
        assert seen <= used, seen - used
        return {"rounds": rounds, "seen": len(seen)}


if __name__ == "__main__":
    main(globals())
