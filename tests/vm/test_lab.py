# SPDX-License-Identifier: GPL-3.0-or-later
"""The lab itself keeps its promises: without these, the power-cut tests of everything else would prove nothing.

Uses disks 3 and 4 of alpha only, so that it may run beside tests that work on disks 1 and 2.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket

import pytest

from lab import Lab, bootwatch, wait
from lab.disks import disk_by_number

FOUR_K = disk_by_number(3)
SMALL = disk_by_number(4)


def _write(lab: Lab, path: str, block: int, content: str, flush: bool) -> None:
    """Write 4 KiB past the page cache and, if asked, flush the disk."""
    how = "oflag=direct conv=notrunc,fsync" if flush else "oflag=direct conv=notrunc"
    lab.ssh("alpha", f"dd of={path} bs=4096 seek={block} iflag=fullblock {how} status=none", input_text=content)


def _read(lab: Lab, path: str, block: int) -> str:
    return lab.ssh("alpha", f"dd if={path} bs=4096 skip={block} count=1 iflag=direct status=none").stdout


def test_a_power_cut_loses_the_unflushed_and_only_that(lab: Lab) -> None:
    path = SMALL.guest_path("alpha")
    kept, lost = (secrets.token_hex(2048) for _ in range(2))
    _write(lab, path, 10, kept, flush=True)
    _write(lab, path, 20, lost, flush=False)
    assert _read(lab, path, 10) == kept
    assert _read(lab, path, 20) == lost, "the write was acknowledged, so it must be read back"
    before = lab.boot_id("alpha")
    lab.kill("alpha")
    on_host = lab.disk_file("alpha", SMALL.number).read_bytes()
    assert on_host[10 * 4096 : 11 * 4096] == kept.encode()
    assert on_host[20 * 4096 : 21 * 4096] != lost.encode()
    lab.start("alpha")
    assert lab.boot_id("alpha") != before
    assert _read(lab, path, 10) == kept
    assert _read(lab, path, 20) != lost


def test_discard_and_write_zeroes_reach_the_disk_as_such(lab: Lab) -> None:
    path = FOUR_K.guest_path("alpha")
    number = str(FOUR_K.number)
    lab.ssh("alpha", f"dd if=/dev/urandom of={path} bs=1M count=4 oflag=direct conv=fsync status=none")
    before = lab.control("alpha", {"op": "stats"})[number]
    lab.ssh("alpha", f"blkdiscard -o 0 -l 1048576 {path} && blkdiscard -z -o 2097152 -l 1048576 {path} && sync {path}")
    after = lab.control("alpha", {"op": "stats"})[number]
    assert after["trim"] > before["trim"]
    assert after["zero"] > before["zero"]
    assert after["write_bytes"] == before["write_bytes"]
    content = lab.disk_file("alpha", FOUR_K.number).read_bytes()[: 4 << 20]
    parts = [content[i << 20 : (i + 1) << 20] for i in range(4)]
    assert [any(part) for part in parts] == [False, True, False, True]


def test_compare_tells_one_sector_and_sees_what_only_the_guest_had(lab: Lab) -> None:
    for name in lab.vms:
        lab.ssh(name, f"blkdiscard {SMALL.guest_path(name)}")
    assert lab.compare(SMALL.number).equal
    lab.ssh("alpha", f"dd of={SMALL.guest_path('alpha')} bs=512 seek=77 conv=notrunc status=none", input_text="x" * 512)
    result = lab.compare(SMALL.number)
    assert (result.different_sectors, result.first_offsets) == (1, [77 * 512])


def test_the_guests_see_their_disks_as_documented(lab: Lab) -> None:
    for name in lab.vms:
        for number in (1, 2, 3, 4):
            disk = disk_by_number(number)
            seen = lab.ssh(name, f"blockdev --getsize64 --getss {disk.guest_path(name)}").stdout.split()
            assert seen == [str(disk.size_bytes), str(disk.block_bytes)]


def test_the_lan_is_cut_and_comes_back_while_the_controller_stays(lab: Lab) -> None:
    def reaches() -> bool:
        return lab.ssh("alpha", "ping -c 1 -W 2 beta", check=False).returncode == 0

    lab.wait(reaches, 30, "alpha to reach beta")
    lab.link(False)
    try:
        assert not reaches()
        assert lab.ssh("alpha", "ip -br address show dev lan").stdout.split()[1] == "DOWN"
        assert "10.77.0.1/24" in lab.ssh("alpha", "ip -br address show dev lan").stdout
    finally:
        lab.link(True)
    lab.wait(reaches, 30, "alpha to reach beta again")


def test_a_guest_has_no_way_out(lab: Lab) -> None:
    assert lab.ssh("alpha", "ip route").stdout.count("default") == 0
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.settimeout(1)
        # QEMU leads 10.0.2.2 to this machine's loopback, unless it is told not to.
        reach = f"timeout 10 bash -c '</dev/tcp/10.0.2.2/{listener.getsockname()[1]}'"
        assert lab.ssh("alpha", reach, check=False).returncode != 0
        with pytest.raises(TimeoutError):
            listener.accept()


def test_a_guest_that_stands_still_at_boot_is_booted_again(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """QEMU is stopped where the emulator's own fault would leave the guest; see lab/bootwatch.py."""
    monkeypatch.setattr(bootwatch, "STILL_SECONDS", 5.0)
    guest = lab.guest("beta")
    lab.kill("beta")
    said = len(guest.console_text())
    lab.start("beta", wait_for_ssh=False)
    stopped = guest.qemu.pid()
    assert stopped is not None
    wait(lambda: "Linux version" in guest.console_text()[said:], 120, "the kernel's first line", 0.01)
    os.kill(stopped, signal.SIGSTOP)
    assert "systemd[1]: " not in guest.console_text()[said:]
    lab.wait_for_ssh("beta")
    assert guest.qemu.pid() != stopped
    assert guest.console_text()[said:].count("the guest stood still in its start") == 1
