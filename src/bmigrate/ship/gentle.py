# SPDX-License-Identifier: GPL-3.0-or-later
"""The edge to what Linux offers for being polite: I/O class of a thread, and I/O pressure.

Both are best effort: a kernel without them makes the shipper no less correct, and ``status`` says
what limits it. The idle class has an effect under the schedulers bfq and mq-deadline (6.x) only.
"""

from __future__ import annotations

import ctypes
import os
import platform

_IOPRIO_SET = {"x86_64": 251, "aarch64": 30, "riscv64": 30, "loongarch64": 30, "ppc64le": 273, "s390x": 282}
_WHO_PROCESS = 1
_CLASS_SHIFT = 13
CLASS_NONE = 0
CLASS_IDLE = 3
PRESSURE_FILE = "/proc/pressure/io"


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


def parse_pressure(text: str) -> float | None:
    """``some avg10`` in percent out of the text of /proc/pressure/io, or None."""
    for line in text.splitlines():
        words = line.split()
        if words[:1] == ["some"]:
            for word in words[1:]:
                key, _, value = word.partition("=")
                if key == "avg10":
                    try:
                        return float(value)
                    except ValueError:
                        return None
    return None


def io_pressure() -> float | None:
    """The present ``some avg10`` of I/O pressure in percent; None when the kernel does not tell."""
    try:
        fd = os.open(PRESSURE_FILE, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return parse_pressure(os.read(fd, 512).decode("ascii", "replace"))
    except OSError:
        return None
    finally:
        os.close(fd)
