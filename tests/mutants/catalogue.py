# SPDX-License-Identifier: GPL-3.0-or-later
"""Which sabotage is known, what a quiet run of it is, and which assertion must catch it.

Promises: each mutant names a test and the text of the very assertion that must fail; any other failure, an error or a
timeout does not count. What loss a mutant brings is told in its patch, once.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

PATCHES = Path(__file__).with_name("patches")
LOSSES = "tests/unit/test_race_losses.py"
KERNEL = "tests/vm/test_kernel_modules.py"
RECORD_TIME = "tests/mutants/record_time.py"
QUIET = f"{LOSSES}::test_a_quiet_seed_and_drain"
QUIET_KERNEL = f"{KERNEL}::test_every_changed_sector_is_in_the_log[raw]"
#: Install, sync and failover on two guests, with nothing going wrong.
FAILOVER = "tests/mutants/quiet_failover.py::test_a_seed_and_a_quiet_failover"
_LOST = r"AssertionError: the standby lost writes at \[\d"


@dataclass(frozen=True)
class Mutant:
    """One sabotage.

    Attributes:
        name: of the mutant and its patch.
        named: node id of the test that must fail.
        expected: regular expression that the failed assertion must show.
        quiet: node id of the test that must still pass.
        guests: whether the tests need the lab's guests.
    """

    name: str
    named: str
    expected: str = _LOST
    quiet: str = QUIET
    guests: bool = False

    @property
    def patch(self) -> Path:
        """The unified diff."""
        return PATCHES / f"{self.name}.patch"

    def loss(self) -> str:
        """What it brings, in the words of the patch."""
        comments = [line[2:] for line in self.patch.read_text().splitlines() if line.startswith("# ")]
        return next(line for line in comments if line.startswith("Loss: "))[6:]


MUTANTS = (
    Mutant(
        "mark-at-queue-time",
        f"{RECORD_TIME}::test_no_record_before_the_write_is_complete",
        r"AssertionError: a record came out while its write was still under way",
        QUIET_KERNEL,
        guests=True,
    ),
    Mutant("clear-on-send", f"{LOSSES}::test_what_was_only_sent_is_sent_again"),
    Mutant("acknowledge-before-fsync", f"{LOSSES}::test_what_was_not_flushed_is_sent_again_after_a_power_cut"),
    Mutant("skip-the-barrier", f"{LOSSES}::test_a_drain_waits_for_what_is_still_in_the_kernels_log"),
    Mutant(
        "drop-the-overflow",
        f"{KERNEL}::test_overflow_widens_and_never_loses",
        r'(?m)^>?\s+assert result\["missed"\] == 0, result$',
        QUIET_KERNEL,
        guests=True,
    ),
    Mutant(
        "ignore-redirty-while-claimed",
        f"{LOSSES}::test_a_block_that_is_written_while_it_is_claimed_is_shipped_again",
    ),
    Mutant(
        "let-an-old-receiver-live",
        f"{LOSSES}::test_old_bytes_never_land_on_newer_ones",
        r"AssertionError: old bytes landed on newer ones that were acknowledged",
    ),
    Mutant(
        "sync-before-marked",
        "tests/unit/test_ship_streams.py::test_what_a_stream_has_not_written_is_not_acknowledged",
        r"AssertionError: acknowledged and never written: \[\d",
    ),
    Mutant(
        "count-a-write-at-its-begin",
        "tests/unit/test_receive_volumes.py::test_a_write_under_way_in_a_flush_is_flushed_by_the_next[write]",
        r"AssertionError: acknowledged without a flush",
    ),
)
