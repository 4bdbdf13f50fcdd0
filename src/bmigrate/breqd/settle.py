# SPDX-License-Identifier: GPL-3.0-or-later
"""Proof that no write is under way that was queued before a bio-based device was attached.

Why: on such a device a write is seen when it is queued. One that was queued before ATTACH and
reaches the disk after the first copy has read the block would be lost. The device is settled when

- it can be opened exclusively and no process has it open for writing (an exclusive open keeps out
  other exclusive ones only): whoever had it waited for its writes; or
- its only writer is a mounted file system, which is frozen and thawed once: freezing waits for all
  writes under way, those of AIO and of the page cache included. It costs the workload a moment.

Who only reads it (our own shipper, udev) is in nobody's way. Anything else is refused: the volume
has to be attached while the workload does not use it. A process that dies between freeze and thaw
leaves a note in /run, by which the next one thaws.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from collections.abc import Callable
from pathlib import Path

from bmigrate.common import blockdev, faults, paths
from bmigrate.common.errors import RefusedError

LOG = logging.getLogger("breqd")
FIFREEZE, FITHAW = 0xC0045877, 0xC0045878


def users_of(device: str) -> list[str]:
    """Who could write to a device past a file system mounted from it: processes, and devices stacked on it."""
    stacked = [text for text in blockdev.holders(device) if " is part of " in text]
    return [*blockdev.writers(device), *stacked]


def settle(device: str, volume: str, users: Callable[[str], list[str]] = users_of) -> None:
    """Return when every write that was queued before this call is over.

    Args:
        device: path of the volume, attached already.
        volume: its name, for messages.
        users: who could write to a device but for a mounted file system, in words.

    Raises:
        RefusedError: reason ``in_use``: it cannot be proved while the device is used like this.
    """
    others = users(device)
    if nobody_has(device) and not others:
        return
    mounts = blockdev.mounts_of(device)
    if not mounts or others:
        by_whom = "; ".join(others) or "by somebody unknown, perhaps as swap"
        raise RefusedError(
            f"{device} handles bios itself and is in use: {by_whom}",
            volume=volume,
            hint="stop the workload, run sync.yml, and start it again: later nothing has to stop for it",
            reason="in_use",
        )
    process, where = mounts[0].split(": ", 1)
    freeze(f"/proc/{process}/root{where}", volume)


def nobody_has(device: str) -> bool:
    """Whether a block device can be opened exclusively."""
    try:
        os.close(os.open(device, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
    except OSError as exc:
        if exc.errno != errno.EBUSY:
            raise
        return False
    return True


def freeze(directory: str, volume: str) -> None:
    """Freeze the file system of a directory and thaw it at once.

    Raises:
        RefusedError: reason ``in_use``: this file system cannot be frozen.
    """
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    note = _notes() / str(os.fstat(fd).st_dev)
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        note.touch()
        try:
            fcntl.ioctl(fd, FIFREEZE, 0)
        except OSError as exc:
            note.unlink()
            raise RefusedError(
                f"the file system on the volume cannot be frozen: {exc.strerror}",
                volume=volume,
                hint="stop the workload, run sync.yml, and start it again",
                reason="in_use",
            ) from exc
        faults.point("breqd.frozen")
        fcntl.ioctl(fd, FITHAW, 0)
        note.unlink()
    finally:
        os.close(fd)


def thaw_leftovers() -> None:
    """Thaw what an earlier daemon froze and did not live to thaw; call at start, before anything else."""
    for note in sorted(_notes().glob("*")):
        for mount in blockdev.mounts_of_number(int(note.name))[:1]:
            process, where = mount.split(": ", 1)
            try:
                fd = os.open(f"/proc/{process}/root{where}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                try:
                    fcntl.ioctl(fd, FITHAW, 0)
                finally:
                    os.close(fd)
                LOG.warning("thawed %s, which an earlier daemon had frozen", where)
            except OSError as exc:
                if exc.errno != errno.EINVAL:  # that says: it is not frozen
                    raise
        note.unlink(missing_ok=True)


def _notes() -> Path:
    return paths.run() / "frozen"
