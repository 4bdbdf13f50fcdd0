# SPDX-License-Identifier: GPL-3.0-or-later
"""In a guest: what the files case_*.py share. Each of their public functions is one case.

usage: python3 -m tests.vm.kernel_guest.case_X DEVICE [CASE...]

Runs the cases, all of them unless some are named, in one process, because to start one costs seconds under emulation.
Prints for each what it returned, or the error that ended it; a case that fails does not keep the next from running.
"""

from __future__ import annotations

import inspect
import json
import os
import random
import select
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bmigrate.kernel.channel import Batch, Channel
from bmigrate.kernel.control import Attachment, Control
from bmigrate.kernel.errors import KernelError

RING_LIMIT = Path("/sys/module/reqlog/parameters/ring_limit")
LIMIT_SECONDS = 300
REGION = 65536


def main(module: Mapping[str, Any]) -> None:
    """Run the cases that the command line names. Prints {case: {"result": value} or {"error": traceback}}."""
    device, *names = sys.argv[1:]
    cases = {
        name: value
        for name, value in module.items()
        if inspect.isfunction(value) and value.__module__ == "__main__" and not name.startswith("_")
    }
    outcome: dict[str, dict[str, Any]] = {}
    for name in names or cases:
        try:
            outcome[name] = {"result": cases[name](device)}
        except Exception:
            outcome[name] = {"error": traceback.format_exc()}
    print(json.dumps(outcome))


def wait_for(condition: Callable[[], Any], what: str, limit_seconds: float = LIMIT_SECONDS) -> Any:
    """Poll `condition` until it is true; its value. Raises TimeoutError."""
    end = time.monotonic() + limit_seconds
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(0.02)
    raise TimeoutError(what)


def attach(control: Control, device: str, region_bytes: int = REGION, bio_based: bool = False) -> Attachment:
    """Attach, and let go of the file."""
    fd = os.open(device, os.O_RDONLY)
    try:
        return control.attach(fd, region_bytes, bio_based=bio_based)
    finally:
        os.close(fd)


@contextmanager
def attached(device: str) -> Iterator[Attachment]:
    """An attachment with an empty log behind it; detached and drained at the end."""
    with Control() as control:
        attachment = attach(control, device)
        try:
            with Channel() as channel:
                empty(channel)
            yield attachment
        finally:
            if any(a.attachment_id == attachment.attachment_id and not a.draining for a in control.list()):
                control.detach(attachment.slot, attachment.attachment_id)
            RING_LIMIT.write_text("0")


def empty(channel: Channel) -> list[Batch]:
    """Consume everything; the batches."""
    batches: list[Batch] = []
    while True:
        batch = channel.read_batch()
        if batch is None:
            return batches
        channel.consumed(batch.seq)
        batches.append(batch)


def next_batch(channel: Channel, room: int = 0) -> Batch:
    """The next batch, waiting for it by poll."""
    poll = select.poll()
    poll.register(channel, select.POLLIN)
    end = time.monotonic() + LIMIT_SECONDS
    while time.monotonic() < end:
        if poll.poll(1000):
            batch = channel.read_batch(room)
            if batch is not None:
                return batch
    raise TimeoutError("no batch came")


def write(device: str, sector: int, sectors: int = 1) -> None:
    """New content, on the device when this returns. One request as long as it is small."""
    import mmap

    length = sectors * 512
    fd = os.open(device, os.O_WRONLY | os.O_DIRECT)
    try:
        with mmap.mmap(-1, max(4096, length)) as buffer:
            buffer[:length] = random.randbytes(length)
            with memoryview(buffer) as view, view[:length] as part:
                if os.pwritev(fd, [part], sector * 512) != length:
                    raise OSError("short write")
    finally:
        os.close(fd)


def ranges(batch: Batch) -> list[tuple[int, int]]:
    """(sector, nr_sectors) of each record, sorted."""
    return sorted((int(r["sector"]), int(r["nr_sectors"])) for r in batch.records)


def refused(action: Callable[..., Any], *arguments: Any) -> KernelError:
    """The KernelError that `action` must raise when called with the arguments."""
    try:
        action(*arguments)
    except KernelError as error:
        return error
    raise AssertionError("it was not refused")
