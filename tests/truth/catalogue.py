# SPDX-License-Identifier: GPL-3.0-or-later
"""The rows and columns of the truth table: what each is, in words.

Promises that every kind of device of the guest's devices.py and every operation of its operations.py is here, in the
order of the table.
"""

from __future__ import annotations

DEVICES = {
    "virtio": "virtio-blk disk",
    "virtio-partition": "partition of it",
    "scsi": "SCSI disk (scsi_debug)",
    "loop": "loop on a file",
    "nvme": "nvme namespace, native multipath off",
    "nvme-head": "nvme multipath head",
    "null": "null_blk in memory",
    "bmtest": "bmtest (the test disk)",
    "bmtest-partition": "partition of bmtest; disk and other partition attached too",
    "dm-linear": "dm linear, two segments",
    "dm-striped": "dm striped",
    "dm-crypt": "dm crypt",
    "dm-raid1": "dm raid, mirror",
    "dm-origin": "dm snapshot-origin",
    "dm-snapshot": "dm snapshot",
    "dm-thin": "dm thin",
    "dm-error": "dm linear, some segments error for a while",
    "dm-flakey": "dm linear, some segments flakey for a while",
    "dm-nested": "dm on dm on a disk; all three attached",
    "dm-on-partition": "dm on a partition; partition and disk attached too",
    "lvm-linear": "LVM linear LV; PV attached too",
    "lvm-thin": "LVM thin LV",
    "lvm-origin": "LVM LV with a snapshot",
    "lvm-snapshot": "LVM snapshot",
    "md-raid0": "md raid0",
    "md-raid0-in-place": "md raid0 without I/O statistics; members attached too",
    "md-raid1": "md raid1",
    "md-raid10": "md raid10",
    "brd": "brd",
    "zram": "zram",
    "drbd": "DRBD",
    "bcache": "bcache",
    "zoned": "zoned disk (null_blk)",
    "pmem": "pmem namespace with DAX",
}

OPERATIONS = {
    "write": "write (O_DIRECT)",
    "fua": "FUA (O_DIRECT, O_DSYNC)",
    "buffered": "buffered, fsync",
    "aio": "AIO",
    "io_uring": "io_uring",
    "mmap": "mmap, msync",
    "swap": "swap",
    "ext4": "ext4, discard",
    "xfs": "xfs, discard",
    "ext4-fstrim": "ext4, fstrim",
    "xfs-fstrim": "xfs, fstrim",
    "discard": "discard",
    "zeroes": "write-zeroes",
    "erase": "secure erase",
    "passthrough": "passthrough",
    "partial": "partial completion, retry",
    "failed": "failed writes",
}

# Three tables, so that each fits a page.
COLUMNS = (
    ("write", "fua", "buffered", "aio", "io_uring", "mmap", "swap"),
    ("ext4", "xfs", "ext4-fstrim", "xfs-fstrim"),
    ("discard", "zeroes", "erase", "passthrough", "partial", "failed"),
)

# Of these each record is exactly one write, and each write changes all that it covers.
EXACT = ("write", "fua", "aio", "io_uring", "partial")
EXACT_RATIO = 1.05

# An operation that may change nothing, and why that is no fault of the test.
MAY_CHANGE_NOTHING = {
    "discard": "Carried out, and the device still has the old content.",
    "failed": "No write that failed had changed anything, and no other was made.",
}

# The rows that `make test` has a look at on each run: one of each way in which a driver handles bios, what is nested,
# the disk that fails and erases, and what is refused. `make truth` has all.
EACH_RUN = (
    "bmtest",
    "bmtest-partition",
    "nvme-head",
    "dm-linear",
    "dm-crypt",
    "dm-snapshot",
    "dm-thin",
    "dm-error",
    "lvm-linear",
    "md-raid0-in-place",
    "md-raid1",
    "brd",
    "zram",
    "drbd",
    "bcache",
    "zoned",
)
