# SPDX-License-Identifier: GPL-3.0-or-later
"""Tells a guest that stood still while it booted from one that is slow.

The emulator's fault (lab/qemu.py says which) can strike whenever the kernel replaces its own instructions: in its own
start, or when the service manager switches something on. The console ends in the middle and says no more.

Promises: pure. A guest that has answered before may run what is under test, so it is given up only until its service
manager has begun; one that never did is as the image made it, and is given up wherever it stands.
"""

from __future__ import annotations

POWER_ON = "--- power on "
#: What the console says at 3 to 8 s of a boot, whatever the kernel.
SERVICES = ("systemd[1]: ", ": re-mounted")
#: A boot gets to its services in 4 s on a quiet machine,
STILL_SECONDS = 150.0
#: and is silent for 15 s from its last word until ssh answers.
SILENT_SECONDS = 240.0


class BootWatch:
    """One boot of a guest. Times are seconds of one clock of the caller's.

    Args:
        answered: whether the guest has ever answered since its disks were made.
    """

    def __init__(self, answered: bool) -> None:
        self._answered = answered
        self._length = -1
        self._since = 0.0

    def stands_still(self, console: str, now: float) -> bool:
        """Whether the kernel has begun to boot, is not through, and has said nothing for too long.

        Args:
            console: all that the console has said; only what follows the last power on counts.
        """
        said = console.rpartition(POWER_ON)[2]
        if len(console) != self._length:
            self._length, self._since = len(console), now
        if "Linux version" not in said:
            return False
        if not any(mark in said for mark in SERVICES):
            return now - self._since >= STILL_SECONDS
        return not self._answered and now - self._since >= SILENT_SECONDS
