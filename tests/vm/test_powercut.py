# SPDX-License-Identifier: GPL-3.0-or-later
"""Hosts that lose power, reboot in good order, or boot once without the module.

The data disks lose on a power cut what was not flushed (lab/volatile.py), and the raw files are compared on the lab
host, so an acknowledgement before the flush would show, and so would a write that nobody marked.
"""

from __future__ import annotations

import base64
import os
from typing import Any

import pytest

from lab import wait
from tests.vm.rig import BLOCK, DISK, LIMIT_SECONDS, WORKLOAD, Rig
from tests.vm.rounds import Round

pytestmark = pytest.mark.vm

WITHOUT_MODULE = "/etc/modprobe.d/vm-test.conf"
UNTRACKED_BLOCKS = 16


def receivers_gone(rig: Rig, host: str) -> None:
    """Wait until no receiver runs on a standby whose primary is gone, so that its disk stays as it is."""

    def none() -> bool:
        return not any(
            any(word.endswith("breceive") for word in item["argv"][:4]) for item in rig.agents[host].call("processes")
        )

    wait(none, LIMIT_SECONDS, f"the receivers on {host} to end", 0.5)


def resync(rig: Rig, primary: str, differ: int, before: dict[str, Any]) -> None:
    """sync.yml on a suspect volume: compares by checksum, ships little more than what differs, ends equal.

    The link to the standby is down until now, so the ship daemon's totals are those of before.

    Args:
        differ: blocks that differ, counted on the lab host.
        before: breqd's counters before the trouble.
    """
    shipping = rig.shipping(primary)
    rig.lab.link(True, rig.other(primary))
    rig.playbook("sync.yml", "-e", f"bmigrate_workload={WORKLOAD}")
    rig.wait_in_step()
    now = rig.shipping(primary)
    grown = {name: now[name] - shipping[name] for name in shipping if name.endswith("_bytes_total")}
    shipped = grown["shipped_bytes_total"] + grown["zero_bytes_total"]
    tracked = rig.tracked(primary)
    size = tracked["size_bytes"]
    result = rig.drain_and_compare(primary)
    print(f"resync: {differ * BLOCK} bytes differed, of {size}: {grown}", flush=True)
    assert result.equal, f"the devices differ after the resync\n{result}"
    assert grown["hashed_bytes_total"] >= size, "not every block was compared by checksum"
    # And the first block, which is always sent.
    assert shipped <= 1.2 * differ * BLOCK + BLOCK, f"{shipped} bytes were shipped for {differ * BLOCK} that differed"
    assert not tracked["suspect"]
    assert tracked["resync_count"] == before["resync_count"] + 1
    assert tracked["seed_count"] == before["seed_count"], "a full copy instead of a resync"


def says_suspect(rig: Rig, host: str) -> str:
    """What an operator is told on that host; fails when it is not that the volume is suspect."""
    text = rig.run(host, "bmigrate", "status", "--workload", WORKLOAD, check=False)
    reason = rig.tracked(host)["suspect"]
    assert reason, "the volume is not suspect"
    assert "suspect" in text and str(reason) in text, f"bmigrate status does not say {reason!r}:\n{text}"
    print(f"suspect: {reason}", flush=True)
    return str(reason)


def unflushed(rig: Rig, host: str) -> int:
    """Bytes that the fault disk of a guest has taken and would lose now."""
    return int(rig.lab.control(host, {"op": "stats"})[str(DISK)]["volatile_bytes"])


def test_primary_loses_power(rig: Rig) -> None:
    """Under load: after the boot the volume is suspect, and a resync by checksum ships what differs."""
    with Round(rig, "primary-cut") as around:
        primary, standby = around.primary, around.standby
        around.until_redirtied()
        around.writer.wait_more(around.random.randrange(50, 300))
        around.until_claims()
        before = around.look()
        rig.power_cut(primary)
        around.writer.forget()
    receivers_gone(rig, standby)
    # What the standby was told to write is its content, durable or not; the primary has what survived the cut.
    rig.lab.flush(standby, DISK)
    differ = len(rig.different_blocks())
    print(f"primary-cut: {differ} blocks differ", flush=True)
    assert differ > 0, "the cut came at a moment without any difference"
    rig.lab.link(False, standby)
    try:
        rig.power_on(primary)
        reason = says_suspect(rig, primary)
        assert "closed" in reason
        resync(rig, primary, differ, before)
    finally:
        rig.lab.link(True, standby)


def test_standby_loses_power_while_it_writes(rig: Rig) -> None:
    """Every block that the standby does not have durably is still dirty or claimed on the primary."""
    with Round(rig, "standby-cut") as around:
        primary, standby = around.primary, around.standby
        around.until_redirtied()
        epoch = around.epoch()
        around.writer.wait_more(around.random.randrange(50, 300))
        around.until_claims()
        before = around.look()
        # A moment at which its disk has taken something that it would lose: only then an early ACK could show.
        volatile = wait(lambda: unflushed(rig, standby), LIMIT_SECONDS, f"unflushed bytes on {standby}", 0.005)
        rig.power_cut(standby)
        around.writer.wait_more(50)
        around.writer.pause()
        marked = rig.marked_blocks(primary)
        rig.lab.flush(primary, DISK)
        differ = rig.different_blocks()
        lost = [number for number in differ if number not in marked]
        print(
            f"standby-cut: {volatile} bytes unflushed right before, {len(differ)} blocks differ, "
            f"{len(marked)} marked, {len(lost)} differ and are not marked",
            flush=True,
        )
        assert differ, "the cut came at a moment without any difference"
        assert not lost, f"acknowledged, and missing on the standby: blocks {lost[:20]}"
        rig.power_on(standby)
        held = rig.held(standby)
        print(f"standby-cut: the standby says {held['suspect']!r}", flush=True)
        rig.playbook("sync.yml", "-e", f"bmigrate_workload={WORKLOAD}")
        around.until_new_session(epoch)
        after = rig.tracked(primary)
        assert after["seed_count"] == before["seed_count"], "a full copy"
        result = rig.drain_and_compare(primary)
        assert result.equal, f"the devices differ\n{result}"
        assert not rig.held(standby)["suspect"]


def test_reboot_in_good_order(rig: Rig) -> None:
    """Nothing is compared afterwards, and a block that was dirty before is shipped after it."""
    with Round(rig, "reboot") as around:
        primary = around.primary
        around.until_redirtied()
        around.prove()
        before = around.look()
        around.writer.stop()
    rig.ship(primary, "pause", workload=WORKLOAD)
    left = dirty_one_block(rig, primary)
    rig.reboot(primary)
    after = rig.tracked(primary)
    assert not after["suspect"], f"suspect after a reboot in good order: {after['suspect']}"
    assert rig.shipping(primary)["state"] == "paused"
    assert after["dirty_bytes"] >= BLOCK, f"the block that was dirty before the reboot is not any more: {after}"
    rig.ship(primary, "resume", workload=WORKLOAD)
    shipping = rig.wait_in_step()
    result = rig.drain_and_compare(primary)
    after = rig.tracked(primary)
    print(f"reboot: {left} bytes left before it; after it {shipping['shipped_bytes_total']} shipped", flush=True)
    assert result.equal, f"the devices differ\n{result}"
    assert shipping["hashed_bytes_total"] == 0, f"{shipping['hashed_bytes_total']} bytes were compared"
    assert shipping["shipped_bytes_total"] + shipping["zero_bytes_total"] >= BLOCK
    assert (after["seed_count"], after["resync_count"]) == (before["seed_count"], before["resync_count"])


def dirty_one_block(rig: Rig, host: str) -> int:
    """Write one block with content that was never there; returns the bytes that are then left to ship."""
    content = base64.b64encode(os.urandom(BLOCK)).decode()
    rig.agents[host].call("write", device=rig.device(host), offset=BLOCK * 777, content=content)
    rig.breqd(host, "barrier", workload=WORKLOAD)
    tracked = rig.tracked(host)
    left = int(tracked["dirty_bytes"] + tracked["claimed_bytes"])
    assert left >= BLOCK, f"the block is not dirty: {tracked}"
    return left


def test_boot_without_the_module(rig: Rig) -> None:
    """A boot in which nobody tracks, and a write in it: the next boot notices."""
    primary = rig.primary()
    before = rig.tracked(primary)
    rig.run(
        primary, "sh", "-c", f"printf 'install reqlog /bin/false\\ninstall bufflink /bin/false\\n' > {WITHOUT_MODULE}"
    )
    rig.reboot(primary, wait_for_breqd=False)
    try:
        assert "reqlog" not in rig.run(primary, "cat", "/proc/modules")
        for number in range(0, 2 * UNTRACKED_BLOCKS, 2):
            content = base64.b64encode(os.urandom(BLOCK)).decode()
            rig.agents[primary].call(
                "write", device=rig.device(primary), offset=BLOCK * (555 + number), content=content
            )
    finally:
        rig.run(primary, "rm", WITHOUT_MODULE)
    rig.lab.link(False, rig.other(primary))
    try:
        rig.reboot(primary)
        says_suspect(rig, primary)
        rig.lab.flush(primary, DISK)
        differ = len(rig.different_blocks())
        assert differ == UNTRACKED_BLOCKS, f"{differ} blocks differ"
        resync(rig, primary, differ, before)
    finally:
        rig.lab.link(True, rig.other(primary))
