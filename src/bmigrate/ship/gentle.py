# SPDX-License-Identifier: GPL-3.0-or-later
"""The edge to what Linux offers for being polite: I/O class of a thread, times of writes, and I/O pressure.

All are best effort: a kernel without them makes the shipper no less correct, and ``status`` says
what limits it. The idle class has an effect under some schedulers only; ``scheduler`` says which is used.
"""

from __future__ import annotations

import ctypes
import os
import platform
from pathlib import Path

from bmigrate.common import blockdev
from bmigrate.common.errors import BmigrateError

_IOPRIO_SET = {"x86_64": 251, "aarch64": 30, "riscv64": 30, "loongarch64": 30, "ppc64le": 273, "s390x": 282}
_WHO_PROCESS = 1
_CLASS_SHIFT = 13
CLASS_NONE = 0
CLASS_IDLE = 3
CGROUPS = Path("/sys/fs/cgroup")


def set_io_class(io_class: int) -> bool:
    """Set the I/O scheduling class of the calling thread (ioprio_set(2)).

    Args:
        io_class: CLASS_NONE (follow the CPU nice value) or CLASS_IDLE.

    Returns: False when this machine has no such call or refuses it.
    """
    number = _IOPRIO_SET.get(platform.machine())
    if number is None:
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    return int(libc.syscall(number, _WHO_PROCESS, 0, io_class << _CLASS_SHIFT)) == 0


def honours_idle(scheduler: str, release: str) -> bool:
    """Whether an I/O scheduler lets the idle class wait for the others: bfq, and mq-deadline since Linux 6.

    Args:
        release: of the kernel, as uname says it.
    """
    major = release.split(".")[0]
    return scheduler == "bfq" or (scheduler == "mq-deadline" and major.isdigit() and int(major) >= 6)


def scheduler(device: str) -> tuple[str | None, bool | None]:
    """The I/O scheduler of a device, or of the disks below it joined by ``+``, and whether it honours the idle class.

    Both None when this kernel does not say, or there is no such block device.
    """
    try:
        names = blockdev.schedulers_below(blockdev.disk_dir(device))
    except (BmigrateError, OSError):
        return None, None
    if not names:
        return None, None
    release = os.uname().release
    return "+".join(names), all(honours_idle(name, release) for name in names)


def write_times(number: int) -> tuple[int, float] | None:
    """Writes that a device has completed, and the seconds that they took in all, since boot; None when it has none.

    Args:
        number: of the device. Source of the fields: Documentation/block/stat.rst.
    """
    try:
        with open(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}/stat") as file:
            fields = file.read().split()
        return int(fields[4]), int(fields[7]) / 1000.0
    except (OSError, ValueError, IndexError):
        return None


def parse_pressure(text: str) -> float | None:
    """Seconds of ``some`` out of the text of an io.pressure file, or None."""
    for line in text.splitlines():
        words = line.split()
        if words[:1] == ["some"]:
            for word in words[1:]:
                key, _, value = word.partition("=")
                if key == "total" and value.isdigit():
                    return int(value) / 1e6
    return None


def pressure_files(services: tuple[str, ...], root: Path = CGROUPS) -> list[Path]:
    """The io.pressure of each service that runs; a service of many units is found by the names of all of them."""
    found: list[Path] = []
    for service in services:
        name = service if "." in service else f"{service}.service"
        stem, _, kind = name.rpartition(".")
        for pattern in (name, f"{stem}@*.{kind}"):
            found += root.glob(f"*.slice/{pattern}/io.pressure")
            found += root.glob(f"*.slice/*.slice/{pattern}/io.pressure")
    return found


def stalled_seconds(files: list[Path]) -> float | None:
    """The largest total of the files: seconds in which some task of a service waited for I/O; None when not told."""
    totals = []
    for file in files:
        try:
            totals.append(parse_pressure(file.read_text()))
        except OSError:
            continue
    known = [total for total in totals if total is not None]
    return max(known) if known else None
