# SPDX-License-Identifier: GPL-3.0-or-later
"""Two Debian guests under QEMU, on which everything in this repository is shown to work.

Promises: needs nothing but Python's standard library, QEMU and mmdebstrap; several instances live side by side
(BMIGRATE_LAB names one); nothing runs on after `down`; a guest's data disks lose what was not flushed when the power
is cut, as real disks do. Must never: write into the repository, touch a process that it did not start, or accept an
ssh host key that it did not make.

    import lab
    box = lab.Lab("test")
    box.up()
    box.ssh("alpha", "uname -r").stdout
    lab.compare(1, instance="test").different_sectors
    box.down()
"""

from __future__ import annotations

from lab.compare import Comparison
from lab.errors import LabError
from lab.instance import Completed, Lab, compare
from lab.waiting import wait

__all__ = ["Comparison", "Completed", "Lab", "LabError", "compare", "wait"]
