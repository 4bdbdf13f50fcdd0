# SPDX-License-Identifier: GPL-3.0-or-later
"""``breqd selftest``: flush what the service has in memory, and ask whether those writes were seen.

Promises: the content of no volume changes. The passive test writes nothing of its own. The active
one writes a block back as it was read, and only while nobody else can write: the device is opened
exclusively and no process has it open for writing.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import Any

from bmigrate.common import blockdev, output, paths, rpc
from bmigrate.common.errors import BmigrateError, RefusedError, SuspectError

TIMEOUT_SECONDS = 600.0


def run(workload: str | None, active: bool, as_json: bool) -> int:
    """Test every tracked volume; returns 0 when all are proven.

    Raises:
        SuspectError: reason ``blind``. RefusedError: ``unproven``, ``not_attached``, ``in_use``.
    """
    with rpc.Client(paths.breqd_socket(), TIMEOUT_SECONDS) as client:
        answer = client.call("status", **({} if workload is None else {"workload": workload}))
        volumes = [item for item in answer["volumes"] if item["attached"]]
        if not volumes:
            raise RefusedError(
                "no volume is tracked here", hint="see 'breqd status' for the reason", reason="not_attached"
            )
        results = []
        for item in volumes:
            device, volume = item["device"], item["volume"]
            # A window begins before the flush, and ends after it.
            client.call("self_test", workload=item["workload"], volume=volume)
            client.call("self_test", workload=item["workload"], volume=volume)
            if active:
                rewrite_last_block(device, volume)
            else:
                flush(device)
            found = client.call("self_test", workload=item["workload"], volume=volume)
            names = ("state", "proven_sectors", "proven_age_seconds", "reason")
            results.append({**{name: found[name] for name in names}, "workload": item["workload"], "volume": volume})
    bad = [item for item in results if item["state"] in ("blind", "doubtful")]
    open_questions = [item for item in results if item["state"] not in ("proven", "blind", "doubtful")]
    error: BmigrateError | None = None
    if bad:
        error = SuspectError(
            f"the tracker does not see all writes: {bad[0]['reason']}",
            volume=bad[0]["volume"],
            hint="nothing of this volume may be believed; install or reload the module, then run sync.yml",
            reason="blind",
        )
    elif open_questions:
        error = RefusedError(
            f"not proven: {open_questions[0]['reason']}",
            volume=open_questions[0]["volume"],
            hint="write a file and test again, or use --active while the workload is stopped",
            reason="unproven",
        )
    if not as_json:
        output.emit(as_json=False, text="\n".join(line_of(item) for item in results))
    if as_json or error:
        output.emit({"volumes": results}, workload=workload, error=error, as_json=as_json)
    return error.exit_code if error else 0


def line_of(item: dict[str, Any]) -> str:
    """One volume's result for people."""
    if item["state"] == "proven":
        what = f"last proven {item['proven_age_seconds']:.0f} s ago, {item['proven_sectors']} sectors seen so far"
    else:
        what = str(item["reason"])
    return f"{item['workload']}/{item['volume']}  {item['state']}: {what}"


def flush(device: str) -> None:
    """Have the kernel write what it still has in memory for a device: its file systems', or its own."""
    mounts = blockdev.mounts_of(device)
    for mount in mounts:
        process, where = mount.split(": ", 1)
        fd = os.open(f"/proc/{process}/root{where}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            if ctypes.CDLL(None, use_errno=True).syncfs(fd):
                number = ctypes.get_errno()
                raise OSError(number, os.strerror(number), where)
        finally:
            os.close(fd)
    fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def rewrite_last_block(device: str, volume: str) -> None:
    """Write the last logical block back as it was read.

    Raises:
        RefusedError: reason ``in_use``: somebody else might write meanwhile.
    """
    busy = RefusedError(
        f"{device} is in use: a block cannot be rewritten safely",
        volume=volume,
        hint="stop the workload and unmount the volume, or test without --active",
        reason="in_use",
    )
    try:
        fd = blockdev.open_direct(device, write=True, exclusive=True)
    except OSError as exc:
        raise busy from exc
    try:
        if blockdev.writers(device):
            raise busy
        block = blockdev.logical_block_size(fd)
        offset = blockdev.size_bytes(fd) // block * block - block
        with mmap.mmap(-1, max(block, mmap.PAGESIZE)) as buffer, memoryview(buffer) as view, view[:block] as part:
            if os.preadv(fd, [part], offset) != block or os.pwritev(fd, [part], offset) != block:
                raise OSError(5, "the last block cannot be read or written", device)
        os.fsync(fd)
    finally:
        os.close(fd)
