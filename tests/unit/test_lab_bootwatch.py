# SPDX-License-Identifier: GPL-3.0-or-later
"""A guest that stands still in its start is told from a slow one, and from one that may run what is under test."""

from __future__ import annotations

import pytest

from lab.bootwatch import POWER_ON, SILENT_SECONDS, STILL_SECONDS, BootWatch

KERNEL = "[    0.0] Linux version 6.1\n[    1.8] Loading compiled-in X.509 certificates\n"
INITRAMFS = KERNEL + "[    2.0] Run /init as init process\n[    3.6] EXT4-fs (vda): mounted filesystem\n"
SERVICES = INITRAMFS + "[    3.7] systemd[1]: Inserted module 'autofs4'\n"
NEWER = INITRAMFS + "[    7.2] EXT4-fs (vda): re-mounted. Quota mode: none.\n"
EARLIER = f"{POWER_ON}1\n{SERVICES}"


@pytest.mark.parametrize(
    ("said", "never_answered", "answered"),
    [
        (KERNEL, STILL_SECONDS, STILL_SECONDS),
        (INITRAMFS, STILL_SECONDS, STILL_SECONDS),
        (SERVICES, SILENT_SECONDS, None),
        (NEWER, SILENT_SECONDS, None),
        ("", None, None),
    ],
    ids=["in the kernel", "before the services", "in the services", "services that say nothing", "nothing said"],
)
@pytest.mark.parametrize("known", [False, True], ids=["never answered", "answered before"])
def test_a_guest_is_given_up_after_its_time(
    said: str, never_answered: float | None, answered: float | None, known: bool
) -> None:
    """What it said since the last power on counts, not what an earlier boot said."""
    limit = answered if known else never_answered
    console = f"{EARLIER}{POWER_ON}2\n{said}"
    watch = BootWatch(known)
    assert not watch.stands_still(console, 10.0)
    if limit is None:
        assert not watch.stands_still(console, 10.0 + 100 * SILENT_SECONDS)
    else:
        assert not watch.stands_still(console, 9.9 + limit)
        assert watch.stands_still(console, 10.0 + limit)


def test_a_slow_one_goes_on_and_is_left_alone() -> None:
    """Each line begins its time anew."""
    watch, console = BootWatch(False), f"{POWER_ON}1\n{KERNEL}"
    for step in range(20):
        assert not watch.stands_still(console, step * (STILL_SECONDS - 1))
        console += f"[    {step}] a line\n"
