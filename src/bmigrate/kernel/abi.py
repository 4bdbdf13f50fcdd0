# SPDX-License-Identifier: GPL-3.0-or-later
"""The layout of what crosses /dev/bufflink/reqlog and /dev/reqlog.

Promises the same bytes as module_src/uapi/bufflink.h and module_src/uapi/reqlog.h, which are the source of every
structure and number here. It opens nothing and imports no NumPy, so that any program can afford it.
"""

from __future__ import annotations

import ctypes
from typing import Any

BUFFLINK_ABI = 1
REQLOG_ABI = 1

CHANNEL_PATH = "/dev/bufflink/reqlog"
CONTROL_PATH = "/dev/reqlog"

RECORD_BYTES = 16
#: Fields of a record as NumPy wants them; little-endian, in this order, without padding.
RECORD_FIELDS = [("sector", "<u8"), ("nr_sectors", "<u4"), ("slot", "<u2"), ("op", "u1"), ("flags", "u1")]
#: nr_sectors of a record that reaches beyond the known end of the disk.
NR_SECTORS_BEYOND = 0xFFFFFFFF

OP_MIXED, OP_WRITE, OP_DISCARD, OP_SECURE_ERASE, OP_WRITE_ZEROES, OP_WRITE_SAME = range(6)
FLAG_WIDENED = 1
FLAG_FAILED = 2

BATCH_AGAIN = 1
BATCH_WIDENED = 2

MAX_SLOTS = 1024
REGION_MIN_BYTES = 4096
REGION_MAX_BYTES = 1 << 30

ENTRY_PARTITION = 1
ENTRY_GONE = 2
ENTRY_BEYOND = 4
ENTRY_DRAINING = 8
ENTRY_BIO = 16
ENTRY_BLIND = 32
ATTACH_BIO = 1


class BatchHeader(ctypes.Structure):
    """What read() puts before the records."""

    _fields_ = [("seq", ctypes.c_uint64), ("count", ctypes.c_uint32), ("flags", ctypes.c_uint32)]


class BufflinkInfo(ctypes.Structure):
    """What a channel is made of."""

    _fields_ = [
        ("abi", ctypes.c_uint32),
        ("record_bytes", ctypes.c_uint32),
        ("batch_records", ctypes.c_uint32),
        ("rings", ctypes.c_uint32),
        ("ring_records", ctypes.c_uint32),
        ("ring_limit", ctypes.c_uint32),
        ("channel_id", ctypes.c_uint64),
        ("name", ctypes.c_char * 32),
    ]


class BufflinkBarrier(ctypes.Structure):
    """A point in the log; positions is the address of `rings` 64-bit numbers."""

    _fields_ = [
        ("channel_id", ctypes.c_uint64),
        ("sweep", ctypes.c_uint64),
        ("rings", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
        ("positions", ctypes.c_uint64),
    ]


class BufflinkStats(ctypes.Structure):
    """Counters of a channel since it was made."""

    _fields_ = [
        ("produced", ctypes.c_uint64),
        ("overflowed", ctypes.c_uint64),
        ("waiting", ctypes.c_uint64),
        ("widened", ctypes.c_uint64),
        ("batches", ctypes.c_uint64),
        ("handed", ctypes.c_uint64),
        ("repeated", ctypes.c_uint64),
        ("consumed", ctypes.c_uint64),
        ("consumed_records", ctypes.c_uint64),
        ("sweeps_started", ctypes.c_uint64),
        ("sweeps_done", ctypes.c_uint64),
        ("pending_seq", ctypes.c_uint64),
        ("pending_count", ctypes.c_uint32),
        ("overflow_waiting", ctypes.c_uint32),
    ]


class ReqlogAttach(ctypes.Structure):
    """Request and answer of ATTACH."""

    _fields_ = [
        ("fd", ctypes.c_int32),
        ("flags", ctypes.c_uint32),
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("sectors", ctypes.c_uint64),
        ("diskseq", ctypes.c_uint64),
        ("region_bytes", ctypes.c_uint32),
        ("reason", ctypes.c_uint32),
        ("id", ctypes.c_uint64),
        ("start_sector", ctypes.c_uint64),
        ("slot", ctypes.c_uint32),
        ("reserved2", ctypes.c_uint32),
    ]


class ReqlogDetach(ctypes.Structure):
    """Request of DETACH."""

    _fields_ = [("id", ctypes.c_uint64), ("slot", ctypes.c_uint32), ("reserved", ctypes.c_uint32)]


class ReqlogEntry(ctypes.Structure):
    """One attachment as LIST tells it."""

    _fields_ = [
        ("id", ctypes.c_uint64),
        ("start_sector", ctypes.c_uint64),
        ("sectors", ctypes.c_uint64),
        ("disk_sectors", ctypes.c_uint64),
        ("diskseq", ctypes.c_uint64),
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("slot", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("region_bytes", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
        ("disk", ctypes.c_char * 32),
    ]


class ReqlogList(ctypes.Structure):
    """Request of LIST: the address of `count` entries."""

    _fields_ = [("entries", ctypes.c_uint64), ("count", ctypes.c_uint32), ("total", ctypes.c_uint32)]


class ReqlogStats(ctypes.Structure):
    """Counters of one attachment."""

    _fields_ = [
        ("id", ctypes.c_uint64),
        ("slot", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
        ("records", ctypes.c_uint64),
        ("sectors", ctypes.c_uint64),
        ("writes", ctypes.c_uint64),
        ("discards", ctypes.c_uint64),
        ("secure_erases", ctypes.c_uint64),
        ("write_zeroes", ctypes.c_uint64),
        ("write_sames", ctypes.c_uint64),
        ("failed", ctypes.c_uint64),
        ("passthrough", ctypes.c_uint64),
        ("beyond", ctypes.c_uint64),
        ("overflowed", ctypes.c_uint64),
        ("regions_set", ctypes.c_uint64),
        ("regions_harvested", ctypes.c_uint64),
        ("regions", ctypes.c_uint64),
    ]


_WRITE, _READ = 1, 2


def _ioc(direction: int, letter: int, number: int, payload: type[Any]) -> int:
    """Number of an ioctl as asm-generic/ioctl.h makes it (x86, arm64, riscv, s390; not powerpc, mips, sparc)."""
    return (direction << 30) | (ctypes.sizeof(payload) << 16) | (letter << 8) | number


_BUFFLINK, _REQLOG = 0xBF, 0xBE

BUFFLINK_IOC_ABI = _ioc(_READ, _BUFFLINK, 0, ctypes.c_uint32)
BUFFLINK_IOC_INFO = _ioc(_READ, _BUFFLINK, 1, BufflinkInfo)
BUFFLINK_IOC_CONSUMED = _ioc(_WRITE, _BUFFLINK, 2, ctypes.c_uint64)
BUFFLINK_IOC_BARRIER = _ioc(_READ | _WRITE, _BUFFLINK, 3, BufflinkBarrier)
BUFFLINK_IOC_PASSED = _ioc(_WRITE, _BUFFLINK, 4, BufflinkBarrier)
BUFFLINK_IOC_STATS = _ioc(_READ, _BUFFLINK, 5, BufflinkStats)

REQLOG_IOC_ABI = _ioc(_READ, _REQLOG, 0, ctypes.c_uint32)
REQLOG_IOC_ATTACH = _ioc(_READ | _WRITE, _REQLOG, 1, ReqlogAttach)
REQLOG_IOC_DETACH = _ioc(_WRITE, _REQLOG, 2, ReqlogDetach)
REQLOG_IOC_LIST = _ioc(_READ | _WRITE, _REQLOG, 3, ReqlogList)
REQLOG_IOC_STATS = _ioc(_READ | _WRITE, _REQLOG, 4, ReqlogStats)

#: REQLOG_REASON_* by number: (code, what it means, what to do next).
REASONS = {
    1: ("not_block", "the file is not a block device", "name the volume's block device"),
    2: ("dev_mismatch", "the device number is not the expected one", "look up the volume again and retry"),
    3: ("size_mismatch", "the size is not the expected one", "look up the volume again and retry"),
    4: ("diskseq_mismatch", "another disk now has this device number", "look up the volume again and retry"),
    5: (
        "bio_based",
        "the device handles bios itself (dm, md, zram, brd, nvme multipath head), and the caller or a real-time "
        "kernel does not allow for that",
        "attach it through breqd, on a kernel that is not real-time, or attach the disk below",
    ),
    6: ("zoned", "zoned disks are not supported", "attach a disk that is not zoned, or a dm-zoned device above it"),
    7: ("gone", "the disk is being removed", "bring the disk back, then attach again"),
    8: ("attached", "the volume is attached already", "list the attachments and adopt or detach it"),
    9: ("no_slot", "no free slot", "detach volumes, and let the reader consume what is left of them"),
    10: ("bad_region", "the overflow region size is not usable", "use a power of two from 64 KiB to 1 MiB"),
    11: ("empty", "the device has no sectors", "insert a medium or set up the device"),
    12: (
        "dax",
        "the device can be written past the block layer (DAX)",
        "protect a disk without DAX",
    ),
    13: (
        "rw_page",
        "this kernel can write pages to the device without a block request (zram, brd before Linux 6.3)",
        "protect another device, or use a newer kernel",
    ),
    14: (
        "driver_writes",
        "the driver changes the disk below by itself, past this device (DRBD, bcache)",
        "protect the disk below: what DRBD replicates, or the backing disk of a bcache detached from its cache",
    ),
}
