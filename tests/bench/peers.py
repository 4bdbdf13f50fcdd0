# SPDX-License-Identifier: GPL-3.0-or-later
"""What an operator would use instead, with the replica on the second guest: DRBD, and md raid1 over nbd.

Promises that nothing is compared while it still copies: a peer is ready when both sides are in step, without a resync.
The disks are those of disks.py, one for each peer on either guest.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager

from lab import Lab, wait
from lab.guestconfig import lan_address

PRIMARY, REPLICA = "beta", "alpha"
DRBD_CONFIG = "/run/bench-drbd.conf"
NBD_CONFIG, NBD_PID = "/run/bench-nbd.conf", "/run/bench-nbd.pid"
LIMIT_SECONDS = 300


def _write(lab: Lab, host: str, path: str, text: str) -> None:
    lab.ssh(host, f"cat > {path}", input_text=text)


def _both(lab: Lab, command: str) -> None:
    for host in (REPLICA, PRIMARY):
        lab.ssh(host, command, timeout=LIMIT_SECONDS)


def _drbd_config(protocol: str, disks: dict[str, str]) -> str:
    sides = "".join(
        f"  on {host} {{ disk {disk}; address {lan_address(host)}:7789; }}\n" for host, disk in disks.items()
    )
    options = f"net {{ protocol {protocol}; }}\n  device /dev/drbd0;\n  meta-disk internal;"
    return f"global {{ usage-count no; }}\nresource bench {{\n  {options}\n{sides}}}\n"


@contextmanager
def drbd(lab: Lab, protocol: str, disks: dict[str, str]) -> Iterator[str]:
    """DRBD 8.4 with this protocol over a disk of each host, primary here; gives the device."""
    tool = f"drbdadm -c {DRBD_CONFIG}"
    for host in disks:
        _write(lab, host, DRBD_CONFIG, _drbd_config(protocol, disks))

    def state(what: str) -> str:
        return lab.ssh(PRIMARY, f"{tool} {what} bench", check=False).stdout.strip()

    _both(lab, f"modprobe drbd && {tool} create-md --force bench && {tool} up bench")
    try:
        wait(lambda: state("cstate") == "Connected", LIMIT_SECONDS, "DRBD to connect")
        lab.ssh(PRIMARY, f"{tool} new-current-uuid --clear-bitmap bench/0")
        wait(lambda: state("dstate") == "UpToDate/UpToDate", LIMIT_SECONDS, "DRBD to be in step")
        lab.ssh(PRIMARY, f"{tool} primary bench")
        yield "/dev/drbd0"
        if (state("cstate"), state("dstate")) != ("Connected", "UpToDate/UpToDate"):
            raise SystemExit(f"DRBD was {state('cstate')}, {state('dstate')} at the end: it did not replicate")
    finally:
        lab.ssh(PRIMARY, f"{tool} down bench", check=False, timeout=LIMIT_SECONDS)
        lab.ssh(REPLICA, f"{tool} down bench", check=False, timeout=LIMIT_SECONDS)


@contextmanager
def raid1_over_nbd(lab: Lab, disks: dict[str, str]) -> Iterator[str]:
    """md raid1 of the disk here and, write-mostly and write-behind, of the other host's over nbd; gives the device."""
    address = lan_address(REPLICA)
    config = f"[generic]\nlistenaddr = {address}\n[bench]\nexportname = {disks[REPLICA]}\n"
    _write(lab, REPLICA, NBD_CONFIG, config)
    lab.ssh(REPLICA, f"nbd-server -C {NBD_CONFIG} -p {NBD_PID}")
    try:
        lab.ssh(PRIMARY, f"modprobe nbd && nbd-client {address} /dev/nbd0 -N bench -b 4096", timeout=LIMIT_SECONDS)
        argv = ["mdadm", "--create", "/dev/md/bench", "--run", "--level=1", "--raid-devices=2", "--metadata=1.2"]
        argv += ["--assume-clean", "--bitmap=internal", "--write-behind=256"]
        argv += [disks[PRIMARY], "--write-mostly", "/dev/nbd0"]
        lab.ssh(PRIMARY, f"{shlex.join(argv)} && udevadm settle", timeout=LIMIT_SECONDS)
        yield lab.ssh(PRIMARY, "realpath /dev/md/bench").stdout.strip()
        degraded = lab.ssh(PRIMARY, "cat /sys/class/block/$(basename $(realpath /dev/md/bench))/md/degraded").stdout
        if degraded.strip() != "0":
            raise SystemExit("the array lost a member: it did not replicate")
    finally:
        lab.ssh(PRIMARY, "mdadm --stop /dev/md/bench; nbd-client -d /dev/nbd0", check=False, timeout=LIMIT_SECONDS)
        lab.ssh(PRIMARY, f"mdadm --zero-superblock {disks[PRIMARY]}", check=False)
        lab.ssh(REPLICA, f"kill $(cat {NBD_PID})", check=False)
