# SPDX-License-Identifier: GPL-3.0-or-later
"""A guest that stands still in its kernel's start is told from a slow one, and from one that got further."""

from __future__ import annotations

import pytest

from lab.bootwatch import POWER_ON, STILL_SECONDS, BootWatch

EARLIER = f"{POWER_ON}1\n[    0.0] Linux version 6.1\n[    2.0] Run /init as init process\n"
BEGUN = f"{EARLIER}{POWER_ON}2\n[    0.0] Linux version 6.1\n[    1.8] Loading compiled-in X.509 certificates\n"


@pytest.mark.parametrize(
    ("console", "still"),
    [
        (BEGUN, True),
        (BEGUN + "[    2.1] Run /init as init process\n", False),
        (f"{EARLIER}{POWER_ON}2\n", False),
        (EARLIER, False),
    ],
    ids=["in the kernel", "in /init", "nothing said", "an earlier boot got there"],
)
def test_only_the_kernels_own_start_counts(console: str, still: bool) -> None:
    watch = BootWatch()
    assert not watch.stands_still(console, 10.0)
    assert not watch.stands_still(console, 9.9 + STILL_SECONDS)
    assert watch.stands_still(console, 10.0 + STILL_SECONDS) is still


def test_a_slow_one_goes_on_and_is_left_alone() -> None:
    watch, console = BootWatch(), BEGUN
    for step in range(20):
        assert not watch.stands_still(console, step * (STILL_SECONDS - 1))
        console += f"[    {step}] a line\n"
