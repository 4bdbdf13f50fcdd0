# SPDX-License-Identifier: GPL-3.0-or-later
"""A device held exclusively: taken, recognised after a restart, sampled, refreshed, let go.

It promises that while a `HeldDevice` exists (or its descriptor waits in the service manager's
store) nobody can mount the device or stack anything on it. The descriptor is read-only: hold can
never write a byte of data. All access to the device goes through `common.blockdev`.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from dataclasses import dataclass

from bmigrate.common import blockdev, sysd
from bmigrate.common.blockdev import WriteCounters
from bmigrate.common.errors import RefusedError
from bmigrate.hold.admission import Geometry

_EDGE_BYTES = 1 << 20
_RELEASE_SECONDS = 3.0
log = logging.getLogger("bmigrate-hold")


@dataclass
class HeldDevice:
    """One exclusively held device. `fd` is O_RDONLY | O_EXCL | O_DIRECT; `number` is st_rdev."""

    workload: str
    volume: str
    path: str
    fd: int
    number: int
    hold_id: str

    @property
    def geometry(self) -> Geometry:
        """Size and logical block size in bytes, as they are now."""
        return Geometry(blockdev.size_bytes(self.fd), blockdev.logical_block_size(self.fd))

    def counters(self) -> WriteCounters:
        """Write counters, once two samples in a row agree: a request may be counted shortly after it is answered."""
        last = blockdev.write_counters(self.path)
        for _ in range(50):
            time.sleep(0.004)
            now = blockdev.write_counters(self.path)
            if now == last:
                break
            last = now
        return last

    def check_path(self) -> None:
        """Refuse when the configured path no longer leads to the device that is held.

        Raises:
            RefusedError: reason ``device_changed`` or ``device_missing``.
        """
        if blockdev.device_number(self.path) != self.number:
            raise RefusedError(
                f"{self.path} now leads to another device than the one held exclusively",
                volume=self.volume,
                reason="device_changed",
                hint="see ls -l /dev/disk/by-id; restart bmigrate-hold to take the other device",
            )

    def refresh(self) -> None:
        """Drop caches, read the partition table again, and prove that a buffered read agrees with the device.

        Raises:
            RefusedError: reason ``stale_cache`` when they differ, ``partitions_busy``.
        """
        blockdev.flush_buffers(self.fd)
        try:
            blockdev.reread_partitions(self.fd)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTTY):  # no partitions are possible there
                raise RefusedError(
                    f"the partition table of {self.path} cannot be read again: {error.strerror}",
                    volume=self.volume,
                    reason="partitions_busy",
                    hint="something uses a partition of it: lsblk " + self.path,
                ) from error
        size = blockdev.size_bytes(self.fd)
        edge = min(_EDGE_BYTES, size)
        direct = blockdev.DirectReader(self.fd, edge)
        buffered = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            for offset in sorted({0, size - edge - (size - edge) % self.geometry.logical_block_size}):
                if direct.read(offset, edge) != os.pread(buffered, edge, offset):
                    raise RefusedError(
                        f"a buffered read of {self.path} at byte {offset} differs from the device",
                        volume=self.volume,
                        reason="stale_cache",
                        hint="find who else has the device open: fuser -v " + self.path,
                    )
        finally:
            os.close(buffered)

    def release(self) -> None:
        """Let go: when this returns anybody may take the device.

        The service manager closes its copy of the descriptor in its own time, and until then a mount
        would find the device busy; so wait until an exclusive open succeeds.
        """
        sysd.remove_fd(fd_name(self.workload, self.volume, self.hold_id))
        path = os.readlink(f"/proc/self/fd/{self.fd}")
        os.close(self.fd)
        deadline = time.monotonic() + _RELEASE_SECONDS
        while True:
            try:
                os.close(blockdev.open_direct(path, exclusive=True))
                return
            except OSError as error:
                if error.errno != errno.EBUSY:
                    return  # the device is gone: there is nothing to let go of
                if time.monotonic() >= deadline:
                    log.warning(
                        "workload %s: volume %s: %s is still in use after it was let go",
                        self.workload,
                        self.volume,
                        path,
                    )
                    return
            time.sleep(0.002)


def fd_name(workload: str, volume: str, hold_id: str) -> str:
    """Name of a descriptor in the service manager's store; no part can contain a dot.

    The id is part of it: a descriptor whose id is not on record was taken by an incarnation that
    died before it had judged the gap before that, so the judgement is still to be made.
    """
    return f"{workload}.{volume}.{hold_id}"


def take(workload: str, volume: str, path: str, hold_id: str) -> HeldDevice:
    """Open a device exclusively and leave a copy of the descriptor with the service manager.

    Raises:
        RefusedError: reason ``device_busy`` naming the holders, or ``device_missing``, ``not_block``.
    """
    number = blockdev.device_number(path)
    try:
        fd = blockdev.open_direct(path, exclusive=True)
    except OSError as error:
        if error.errno == errno.EBUSY:
            users = "; ".join(blockdev.holders(path)) or "nobody that can be seen (another mount namespace?)"
            raise RefusedError(
                f"{path} is in use: {users}",
                volume=volume,
                reason="device_busy",
                hint="end that use (umount, vgchange -an, mdadm --stop) and try again",
            ) from error
        raise RefusedError(
            f"{path} cannot be opened: {error.strerror}",
            volume=volume,
            reason="device_missing",
            hint="check the device and the configuration",
        ) from error
    if os.fstat(fd).st_rdev != number:
        os.close(fd)
        raise RefusedError(
            f"{path} changed while it was opened", volume=volume, reason="device_changed", hint="try again"
        )
    sysd.store_fd(fd_name(workload, volume, hold_id), fd)
    return HeldDevice(workload, volume, path, fd, number, hold_id)


def recover(workload: str, volume: str, path: str, hold_id: str, fd: int) -> HeldDevice | None:
    """Go on holding with a descriptor from the service manager's store.

    Returns: None (and the descriptor is closed and dropped) when it is not the configured device.
    """
    device = HeldDevice(workload, volume, path, fd, os.fstat(fd).st_rdev, hold_id)
    try:
        device.check_path()
    except RefusedError:
        device.release()
        return None
    return device
