# SPDX-License-Identifier: GPL-3.0-or-later
"""Defects that are put into a copy of the modules, to show that the debug kernel finds what it is there to find."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from tests.vm.kernel_bench import ROOT


@dataclass(frozen=True)
class Defect:
    """One change of a source file, and what the kernel must say about it.

    Attributes:
        name: for people.
        file: in module_src.
        old: text that is there exactly once.
        new: what it becomes.
        said: regular expression for the first line of the report, or of kmemleak's entry.
    """

    name: str
    file: str
    old: str
    new: str
    said: str


# Lockdep's last but one, because its first report switches it off. KASAN's last: that switches off both.
DEFECTS = (
    Defect(
        "an overflow map that is never freed",
        "reqlog/overflow.c",
        "\tvfree(att->failed);\n",
        "",
        r"unreferenced object 0x[0-9a-f]+ \(size \d+\)",
    ),
    Defect(
        "a probe that may sleep",
        "reqlog/probe.c",
        "\t\tring = this_cpu_ptr(reqlog_channel->rings);\n\t\tif",
        "\t\tmight_sleep();\n\t\tring = this_cpu_ptr(reqlog_channel->rings);\n\t\tif",
        r"BUG: sleeping function called from invalid context",
    ),
    # The harvest of the overflow takes reqlog's lock under the channel's.
    Defect(
        "two locks in the other order",
        "bufflink/barrier.c",
        "\tif (!bufflink_sweep_passed(channel, mark->sweep))\n",
        "\tmutex_lock(&channel->lock);\n\tmutex_unlock(&channel->lock);\n"
        "\tif (!bufflink_sweep_passed(channel, mark->sweep))\n",
        r"WARNING: possible circular locking dependency detected",
    ),
    Defect(
        "an attachment that is looked at after it was freed",
        "reqlog/attach.c",
        "\t\tRCU_INIT_POINTER(slots[slot], NULL);\n\t\tfree_attachment(att);\n\t}\n}\n\n/*\n * Slots are taken",
        "\t\tfree_attachment(att);\n\t\tRCU_INIT_POINTER(slots[att->slot], NULL);\n\t}\n}\n\n/*\n * Slots are taken",
        r"BUG: KASAN: use-after-free in reqlog_reap",
    ),
)


def broken_copy(defect: Defect, directory: Path) -> Path:
    """The sources with the defect in them."""
    copy = directory / "broken"
    shutil.copytree(ROOT / "module_src", copy, ignore=shutil.ignore_patterns("*.ko", "*.o", "*.mod*", "*.cmd"))
    path = copy / defect.file
    text = path.read_text()
    assert text.count(defect.old) == 1, f"{defect.name}: {defect.file} has changed"
    path.write_text(text.replace(defect.old, defect.new))
    return copy
