# SPDX-License-Identifier: GPL-3.0-or-later
"""The data disks of a guest: what each is for, its size, its blocks and its serial number.

Both guests have the same four. In the guest a disk is /dev/disk/by-id/virtio-SERIAL; on the host it is a raw file.
A serial never changes: inventories and tests name the disks by it.
"""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1 << 20

VM_NAMES = ("alpha", "beta")


@dataclass(frozen=True)
class Disk:
    """One data disk of a guest; sizes in bytes."""

    number: int
    name: str
    size_bytes: int
    block_bytes: int
    purpose: str

    def serial(self, vm: str) -> str:
        """The serial number that the guest `vm` sees (at most 20 characters)."""
        return f"bm-{self.name}-{vm}"

    def guest_path(self, vm: str) -> str:
        """The stable path of this disk inside the guest `vm`."""
        return f"/dev/disk/by-id/virtio-{self.serial(vm)}"

    @property
    def file_name(self) -> str:
        """The raw file in the guest's directory on the host."""
        return f"disk{self.number}-{self.name}.raw"


DISKS = (
    Disk(1, "pg", 1024 * MIB, 512, "PostgreSQL's volume"),
    Disk(2, "fault", 64 * MIB + 3584, 512, "fault tests; the odd size ends in a short granule"),
    Disk(3, "fault4k", 64 * MIB + 4096, 4096, "large enough for disk 2, but with 4096-byte logical blocks"),
    Disk(4, "small", 32 * MIB, 512, "smaller than disk 2, to be refused as a target"),
)


def disk_by_number(number: int) -> Disk:
    """The disk with this number (1 to 4).

    Raises:
        KeyError: there is no such disk.
    """
    for disk in DISKS:
        if disk.number == number:
            return disk
    raise KeyError(f"no disk {number}: there are {', '.join(str(d.number) for d in DISKS)}")
