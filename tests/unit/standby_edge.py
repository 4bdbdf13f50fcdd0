# SPDX-License-Identifier: GPL-3.0-or-later
"""Runs bmigrate-hold or breceive unchanged, with regular files in place of block devices.

Only functions of `common.blockdev` are replaced, the documented edge to the kernel: exclusivity is
an flock (it belongs to the open file description, as the kernel's exclusive claim does), sysfs is a
directory beside the file. Everything else, O_DIRECT, processes, pidfds, sockets and fsync
included, is the real thing. Usage: python standby_edge.py PROGRAM [ARGUMENT...]
"""

from __future__ import annotations

import errno
import fcntl
import math
import os
import signal
import sys
from pathlib import Path

from bmigrate.common import blockdev, scatter
from bmigrate.receive import main as receiver
from bmigrate.wire import hashing

_open_direct = blockdev.open_direct


def _device_number(path: str | Path) -> int:
    try:
        return os.stat(path).st_rdev
    except OSError as error:
        raise blockdev.RefusedError(f"device {path} does not exist", reason="device_missing") from error


def _sysfs_dir(path: str | Path) -> Path:
    return Path(f"{path}.sysfs")


def _open(path: str | Path, write: bool = False, exclusive: bool = False) -> int:
    fd = _open_direct(path, write)
    if exclusive:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise OSError(errno.EBUSY, "Device or resource busy", str(path)) from None
    return fd


def _logical_block_size(fd: int) -> int:
    path = Path(os.readlink(f"/proc/self/fd/{fd}") + ".sysfs") / "queue" / "logical_block_size"
    return int(path.read_text())


def install() -> None:
    """Replace the edge in this process."""
    blockdev.device_number = _device_number
    blockdev.sysfs_dir = _sysfs_dir
    blockdev.open_direct = _open
    blockdev.logical_block_size = _logical_block_size
    if "EDGE_KILLS_ARE_LOST" in os.environ:  # as if the victim were stuck in the kernel
        signal.pidfd_send_signal = lambda *_: None
    if "EDGE_HANDSHAKE_SECONDS" in os.environ:
        receiver.HANDSHAKE_SECONDS = float(os.environ["EDGE_HANDSHAKE_SECONDS"])
    if "EDGE_BOOT_ID" in os.environ:
        blockdev.boot_id = lambda: os.environ["EDGE_BOOT_ID"]
    if "EDGE_UNREADABLE" in os.environ:  # as long as that file is there
        digest = blockdev.superblock_digest

        def superblock_digest(path: str | Path) -> str:
            if Path(os.environ["EDGE_UNREADABLE"]).exists():
                raise OSError(errno.EIO, "Input/output error")
            return digest(path)

        blockdev.superblock_digest = superblock_digest
    if "BMIGRATE_TEST_ONE_AT_A_TIME" in os.environ:  # as before scattered blocks were written beside each other
        scatter.WORTH_SECONDS = math.inf
    if "BMIGRATE_TEST_HASH" in os.environ:  # as if that one had been measured to be faster
        hashing.preferred = lambda: os.environ["BMIGRATE_TEST_HASH"]


def main() -> int:
    """Run the named program."""
    install()
    sys.argv[0] = sys.argv[1]
    from bmigrate.__main__ import main as program

    del sys.argv[1]
    return program()


if __name__ == "__main__":
    sys.exit(main())
