# SPDX-License-Identifier: GPL-3.0-or-later
"""The network between the hosts goes away and comes back: the workload never waits, and nothing is lost."""

from __future__ import annotations

import time

import pytest

from lab import wait
from tests.vm.rig import LIMIT_SECONDS, Rig
from tests.vm.rounds import Round

pytestmark = pytest.mark.vm

CUT_SECONDS = 20.0


def test_link_cut_for_20_seconds(rig: Rig) -> None:
    """Cut while claims are outstanding: writes go on at their pace, the state says so, and all is caught up."""
    with Round(rig, "link") as around:
        primary = around.primary
        around.until_redirtied()
        around.until_claims()
        epoch = around.epoch()
        written = around.writer.status()["operations"]
        rig.lab.link(False)
        cut = time.monotonic()
        try:
            around.until_claims()  # from now on nothing can be acknowledged
            claimed = around.look()["claimed_bytes"]
            wait(lambda: time.monotonic() - cut >= CUT_SECONDS, CUT_SECONDS + 60, "the cut to last", 0.5)
            during = around.writer.status()["operations"] - written
            seconds = time.monotonic() - cut
            blocked = around.look()
            assert blocked["dirty_bytes"] + blocked["claimed_bytes"] > 0
            wait(lambda: rig.shipping(primary)["state"] == "disconnected", LIMIT_SECONDS, "the state to say so", 0.5)
        finally:
            rig.lab.link(True)
        print(
            f"link: {claimed} bytes claimed at the cut; {during} operations in {seconds:.0f} s without it", flush=True
        )
        # 300 a second are asked for; a writer that waits for the network does none.
        assert during > 20 * seconds, "the writer was held up by the cut"
        around.until_new_session(epoch)
        around.writer.wait_more(100)
        around.prove()
