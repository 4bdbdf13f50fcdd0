# SPDX-License-Identifier: GPL-3.0-or-later
"""How fast this machine's time stamp counter runs, so that guests need not guess.

An emulated guest sees the host's counter. It measures the counter's rate while it boots, against an
emulated timer; on a busy host it once got a ninth of the true rate, and its clock then ran nine times
too fast: timeouts fired and watchdogs bit. So the lab measures, and tells the guest.
"""

from __future__ import annotations

import ctypes
import mmap
import platform
import time

_READ = b"\x0f\x31\x48\xc1\xe2\x20\x48\x09\xd0\xc3"  # rdtsc; shl rdx, 32; or rax, rdx; ret
_SPAN_SECONDS = 0.1


def measure_khz() -> int | None:
    """Rate of the counter in kHz, to about 0.1 %; None where it cannot be read (not x86-64)."""
    if platform.machine() != "x86_64":
        return None
    try:
        code = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    except OSError:
        return None
    code.write(_READ)
    read = ctypes.CFUNCTYPE(ctypes.c_uint64)(ctypes.addressof(ctypes.c_char.from_buffer(code)))

    def now() -> tuple[int, int]:
        # The pair with the least time in between: others were interrupted.
        best = None
        for _ in range(20):
            before = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
            ticks = read()
            after = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
            if best is None or after - before < best[0]:
                best = (after - before, (before + after) // 2, ticks)
        assert best is not None
        return best[1], best[2]

    began_ns, began_ticks = now()
    time.sleep(_SPAN_SECONDS)
    ended_ns, ended_ticks = now()
    return round((ended_ticks - began_ticks) * 1_000_000 / (ended_ns - began_ns))


def kernel_arguments(khz: int | None) -> str:
    """What to put on a guest's kernel command line about clocks."""
    if khz is None:
        return "clocksource=acpi_pm tsc=unstable"
    return f"tsc=reliable tsc_early_khz={khz}"
