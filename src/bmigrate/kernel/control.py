# SPDX-License-Identifier: GPL-3.0-or-later
"""Attaching volumes: /dev/reqlog.

Promises that what is attached is the device that the caller has open: number, size and diskseq are read from that same
descriptor and checked by the kernel. Closing the control detaches nothing.
"""

from __future__ import annotations

import builtins
import ctypes
import errno as errnos
import fcntl
import os
import stat
import struct
from dataclasses import dataclass

from bmigrate.kernel import abi, device, errors

SECTOR_BYTES = 512
DEFAULT_REGION_BYTES = 1 << 20

_BLKGETSIZE64 = 0x80081272
_BLKGETDISKSEQ = 0x80081280


@dataclass(frozen=True)
class Identity:
    """What a block device is, as its open descriptor tells: numbers, size in sectors of 512 bytes, diskseq or 0."""

    major: int
    minor: int
    sectors: int
    diskseq: int


@dataclass(frozen=True)
class Attachment:
    """A volume that the kernel records.

    slot: the number in records. attachment_id: random, the same as long as it is the same attachment. start_sector:
    where the volume begins on the whole disk; sectors: its size as attached; disk_sectors: the size of the whole disk
    now. gone: the disk was removed. beyond: something was written behind the known end (the disk has grown).
    draining: detached, and the slot not yet free. bio_based: of a disk that handles bios itself. blind: a write was
    not recorded, only a comparison finds it.
    """

    slot: int
    attachment_id: int
    major: int
    minor: int
    start_sector: int
    sectors: int
    disk_sectors: int
    diskseq: int
    region_bytes: int
    disk: str
    partition: bool
    gone: bool
    beyond: bool
    draining: bool
    bio_based: bool = False
    blind: bool = False


@dataclass(frozen=True)
class AttachmentStats:
    """Counters of one attachment; their meaning is in module_src/uapi/reqlog.h."""

    records: int
    sectors: int
    writes: int
    discards: int
    secure_erases: int
    write_zeroes: int
    write_sames: int
    failed: int
    passthrough: int
    beyond: int
    overflowed: int
    regions_set: int
    regions_harvested: int
    regions: int


def identify(fd: int) -> Identity:
    """Read from an open block device what ATTACH will check.

    Raises AttachRefused (code not_block) if it is no block device, OSError.
    """
    status = os.fstat(fd)
    if not stat.S_ISBLK(status.st_mode):
        _, meaning, hint = abi.REASONS[1]
        raise errors.AttachRefused(meaning, errnos.ENOTBLK, code="not_block", hint=hint, volume=_name_of(fd))
    size = struct.unpack("=Q", fcntl.ioctl(fd, _BLKGETSIZE64, bytes(8)))[0]
    try:
        diskseq = struct.unpack("=Q", fcntl.ioctl(fd, _BLKGETDISKSEQ, bytes(8)))[0]
    except OSError as error:
        # Kernels before 5.15 have no such number, and neither has the module there.
        if error.errno not in (errnos.ENOTTY, errnos.EINVAL):
            raise
        diskseq = 0
    return Identity(os.major(status.st_rdev), os.minor(status.st_rdev), size // SECTOR_BYTES, diskseq)


def _name_of(fd: int) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return f"file descriptor {fd}"


class Control(device.Handle):
    """The door to reqlog. Opening raises NotLoaded, AbiMismatch, or KernelError with code permission."""

    def __init__(self, path: str = abi.CONTROL_PATH) -> None:
        self.path = path
        self._fd = device.open_checked(path, os.O_RDWR, "reqlog", abi.REQLOG_IOC_ABI, abi.REQLOG_ABI)
        self.abi_version = abi.REQLOG_ABI

    def attach(
        self,
        fd: int,
        region_bytes: int = DEFAULT_REGION_BYTES,
        identity: Identity | None = None,
        volume: str = "",
        bio_based: bool = False,
    ) -> Attachment:
        """Attach the volume that `fd` has open.

        Args: fd: open block device, may be closed afterwards; region_bytes: unit of the overflow map, a power of two;
        identity: what the volume must be, if known from elsewhere (default: what fd says); volume: its name in
        messages; bio_based: take such a disk too, of which writes that were queued before are not recorded: the caller
        makes sure that they are over before a first copy begins. Raises AttachRefused with the reason as code,
        KernelError.
        """
        volume = volume or _name_of(fd)
        identity = identity or identify(fd)
        request = abi.ReqlogAttach(
            fd=fd,
            flags=abi.ATTACH_BIO if bio_based else 0,
            major=identity.major,
            minor=identity.minor,
            sectors=identity.sectors,
            diskseq=identity.diskseq,
            region_bytes=region_bytes,
        )
        try:
            device.call(self._fd, abi.REQLOG_IOC_ATTACH, request)
        except OSError as error:
            raise _refusal(request, error, volume) from error
        for attachment in self.list():
            if attachment.attachment_id == request.id:
                return attachment
        raise errors.NotAttached(
            "it was detached by somebody else right after it was attached",
            errnos.ENOENT,
            volume=volume,
            hint="let only breqd attach and detach",
        )

    def detach(self, slot: int, attachment_id: int) -> None:
        """End an attachment. Its records stay in the log until consumed. Raises NotAttached, KernelError."""
        self._call(abi.REQLOG_IOC_DETACH, abi.ReqlogDetach(id=attachment_id, slot=slot), slot, attachment_id)

    def list(self) -> builtins.list[Attachment]:
        """All attachments, those included that are detached and not yet drained. Raises KernelError."""
        count = 16
        while True:
            entries = (abi.ReqlogEntry * count)()
            request = abi.ReqlogList(entries=ctypes.addressof(entries), count=count)
            try:
                device.call(self._fd, abi.REQLOG_IOC_LIST, request)
            except OSError as error:
                if error.errno != errnos.ENOSPC:
                    raise errors.unexpected(f"{self.path}: cannot list the attachments", error) from error
                count = request.total + 16
                continue
            return [_attachment(entry) for entry in entries[: request.count]]

    def stats(self, slot: int, attachment_id: int = 0) -> AttachmentStats:
        """Counters of the attachment at `slot`; attachment_id 0: whichever it is. Raises NotAttached, KernelError."""
        if not attachment_id:
            ids = [a.attachment_id for a in self.list() if a.slot == slot]
            attachment_id = ids[0] if ids else 0
        raw = abi.ReqlogStats(id=attachment_id, slot=slot)
        self._call(abi.REQLOG_IOC_STATS, raw, slot, attachment_id)
        return AttachmentStats(**{name: getattr(raw, name) for name in AttachmentStats.__dataclass_fields__})

    def _call(self, number: int, payload: ctypes.Structure, slot: int, attachment_id: int) -> None:
        try:
            device.call(self._fd, number, payload)
        except OSError as error:
            if error.errno == errnos.ENOENT:
                raise errors.NotAttached(
                    f"no attachment {attachment_id:016x} at slot {slot}",
                    errnos.ENOENT,
                    hint="list the attachments; the volume may have been attached anew",
                ) from error
            raise errors.unexpected(self.path, error) from error


def _attachment(entry: abi.ReqlogEntry) -> Attachment:
    return Attachment(
        slot=entry.slot,
        attachment_id=entry.id,
        major=entry.major,
        minor=entry.minor,
        start_sector=entry.start_sector,
        sectors=entry.sectors,
        disk_sectors=entry.disk_sectors,
        diskseq=entry.diskseq,
        region_bytes=entry.region_bytes,
        disk=entry.disk.decode("ascii", "replace"),
        partition=bool(entry.flags & abi.ENTRY_PARTITION),
        gone=bool(entry.flags & abi.ENTRY_GONE),
        beyond=bool(entry.flags & abi.ENTRY_BEYOND),
        draining=bool(entry.flags & abi.ENTRY_DRAINING),
        bio_based=bool(entry.flags & abi.ENTRY_BIO),
        blind=bool(entry.flags & abi.ENTRY_BLIND),
    )


def _refusal(request: abi.ReqlogAttach, error: OSError, volume: str) -> errors.KernelError:
    if request.reason not in abi.REASONS:
        return errors.unexpected("cannot attach", error, volume=volume)
    code, meaning, hint = abi.REASONS[request.reason]
    refusal = errors.AttachRefused(f"cannot attach: {meaning}", error.errno or 0, code=code, hint=hint, volume=volume)
    refusal.slot = request.slot
    refusal.attachment_id = request.id
    return refusal
