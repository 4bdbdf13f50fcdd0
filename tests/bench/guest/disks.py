# SPDX-License-Identifier: GPL-3.0-or-later
"""Runs in a guest: makes the RAM-backed disks on which the cost is measured, or takes them away.

usage: disks.py NAME... | disks.py

Prints a JSON object, the path of each disk by name: a name of letters is a null_blk disk of its own, and
`linear-OTHER` a linear target of the device mapper over the disk OTHER. All are filled once, so that no run pays for
the allocation of the disk's memory. Without a name, all are taken away.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.vm.kernel_guest.command import run
from tests.vm.kernel_guest.devices import mount_configfs

SIZE_MIB = 64
NULL = Path("/sys/kernel/config/nullb")
# Completion in the softirq, as real disks have it.
NULL_SETTINGS = {"size": SIZE_MIB, "blocksize": 4096, "memory_backed": 1, "queue_mode": 2, "irqmode": 1}


def null(name: str) -> str:
    """A request-based disk in memory, without a scheduler."""
    run("modprobe", "null_blk", "nr_devices=0")
    mount_configfs()
    directory = NULL / f"bench{name}"
    directory.mkdir()
    for key, value in NULL_SETTINGS.items():
        (directory / key).write_text(str(value))
    (directory / "power").write_text("1")
    run("udevadm", "settle")
    # Named after the directory since Linux 6.0, before that by its index.
    path = f"/dev/{directory.name}"
    return path if os.path.exists(path) else f"/dev/nullb{(directory / 'index').read_text().strip()}"


def linear(name: str, lower: str) -> str:
    """A device of the device mapper that lies on another one as it is."""
    table = f"0 {SIZE_MIB * 2048} linear {lower} 0\n"
    subprocess.run(["dmsetup", "create", f"bench{name}"], input=table, text=True, check=True)
    run("udevadm", "settle")
    return os.path.realpath(f"/dev/mapper/bench{name}")


def drop() -> None:
    """Take all of them away."""
    for path in Path("/dev/mapper").glob("bench*"):
        run("dmsetup", "remove", "--retry", path.name)
    for directory in NULL.glob("bench*") if NULL.exists() else ():
        directory.rmdir()


def main(names: list[str]) -> None:
    """Command line."""
    drop()
    made: dict[str, str] = {}
    for name in names:
        if name.startswith("linear-"):
            made[name] = linear(name.replace("-", ""), made[name.partition("-")[2]])
        else:
            made[name] = null(name)
        scheduler = Path("/sys/block", os.path.basename(made[name]), "queue/scheduler")
        if scheduler.exists():
            scheduler.write_text("none")
        run("dd", "if=/dev/zero", f"of={made[name]}", "bs=1M", f"count={SIZE_MIB}", "oflag=direct", "status=none")
    print(json.dumps(made))


if __name__ == "__main__":
    main(sys.argv[1:])
