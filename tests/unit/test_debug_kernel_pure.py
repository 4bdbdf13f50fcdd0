# SPDX-License-Identifier: GPL-3.0-or-later
"""The debug kernel's pure parts: which lines of a config were lost, and what counts as a report or a leak."""

from __future__ import annotations

from pathlib import Path

import pytest

from lab import debugkernel
from tests.debug_kernel.defects import DEFECTS, Defect, broken_copy
from tests.debug_kernel.reports import leaks, reports

LEAK = """unreferenced object 0xffffc90000215000 (size 8192):
  comm "python3", pid 303, jiffies 4294953231 (age 12.345s)
  hex dump (first 32 bytes):
    00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00  ................
  backtrace:
    [<00000000d2c3bd14>] __vmalloc_node_range+0x5f4/0xa20
    [<00000000fa3f0a32>] {frame}
    [<00000000b2b0a7a5>] do_syscall_64+0x3a/0x90
"""


def test_a_line_of_the_config_that_does_not_hold_is_told() -> None:
    made = "CONFIG_A=y\nCONFIG_B=m\n# CONFIG_C is not set\nCONFIG_D=y\n"
    assert debugkernel.lost("# prose\nCONFIG_A=y\n# CONFIG_C is not set\n# CONFIG_E is not set\n", made) == []
    assert debugkernel.lost("CONFIG_B=y\n# CONFIG_D is not set\n", made) == ["CONFIG_B=y", "# CONFIG_D is not set"]


@pytest.mark.parametrize(
    "line",
    [
        "BUG: KASAN: use-after-free in reqlog_reap+0x12/0x80 [reqlog]",
        "BUG: sleeping function called from invalid context at kernel/locking/mutex.c:580",
        "WARNING: possible circular locking dependency detected",
        "WARNING: inconsistent lock state",
        "WARNING: suspicious RCU usage",
        "ODEBUG: free active (active state 0) object type: work_struct",
        "BUG: MAX_LOCKDEP_ENTRIES too low!",
        "INFO: task python3:303 blocked for more than 120 seconds.",
        "list_del corruption. prev->next should be ffff88800",
        "DEBUG_LOCKS_WARN_ON(1)",
    ],
)
def test_a_report_is_seen_behind_any_time_stamp(line: str) -> None:
    log = (
        f"[    0.000000] Linux version 6.1\n[  154.173297] {line}\n[  154.2] Call Trace:\n[  154.3]  probe+0x1 [reqlog]"
    )
    (found,) = reports(log)
    assert found.head == line and found.ours


def test_what_a_sound_kernel_says_is_no_report() -> None:
    log = (
        "[    3.166970] ... MAX_LOCKDEP_ENTRIES:     65536\n"
        "[    3.060159] rcu: RCU CPU stall warnings suppressed (rcu_cpu_stall_suppress).\n"
        "[   11.687451] kmemleak: Kernel memory leak detector initialized (mem pool available: 38708)\n"
        "[   31.326230] systemd[1]: (This warning is only shown for the first unit using IP firewalling.)\n"
        "[  154.173297] bufflink: loading out-of-tree module taints kernel.\n"
    )
    assert not reports(log)


def test_a_leak_is_the_modules_by_its_frames() -> None:
    assert leaks(LEAK.format(frame="reqlog_map_alloc+0x9c/0x180 [reqlog]"))
    assert leaks(LEAK.format(frame="0xffffffffa000c0de")), "the module was unloaded since"
    assert not leaks(LEAK.format(frame="ext4_fill_super+0x1/0x2"))
    assert len(leaks(LEAK.format(frame="bufflink_create+0x1/0x2") * 2)) == 2
    assert not leaks("")


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.name.replace(" ", "-"))
def test_each_defect_still_fits_the_sources(defect: Defect, tmp_path: Path) -> None:
    assert (broken_copy(defect, tmp_path) / defect.file).read_text().count(defect.old) == (defect.old in defect.new)
