# SPDX-License-Identifier: GPL-3.0-or-later
"""Tells a guest that stood still while its kernel booted from one that is slow.

The emulator's fault (lab/qemu.py says which) can strike when the kernel replaces its own instructions at boot: the
console ends in the middle of the kernel's start and says no more. Nothing of a test has run by then.

Promises: pure. It must never give up a guest whose kernel has handed over to /init: what stands still from there on
may be ours.
"""

from __future__ import annotations

POWER_ON = "--- power on "
USERSPACE = "as init process"
#: A boot reaches /init in 2 to 4 s on a quiet machine.
STILL_SECONDS = 150.0


class BootWatch:
    """One boot of a guest. Times are seconds of one clock of the caller's."""

    def __init__(self) -> None:
        self._length = -1
        self._since = 0.0

    def stands_still(self, console: str, now: float) -> bool:
        """Whether the kernel has begun to boot, is not through, and has said nothing for STILL_SECONDS.

        Args:
            console: all that the console has said; only what follows the last power on counts.
        """
        said = console.rpartition(POWER_ON)[2]
        if len(console) != self._length:
            self._length, self._since = len(console), now
        if USERSPACE in said or "Linux version" not in said:
            return False
        return now - self._since >= STILL_SECONDS
