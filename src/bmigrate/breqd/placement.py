# SPDX-License-Identifier: GPL-3.0-or-later
"""Which block devices a directory lies on, to keep bitmap files off the volumes that they track.

Read only: sysfs and mountinfo. Follows partitions to their disk, dm and md to their members, loop
devices to their backing file, overlay to its upper directory. In doubt it names more, never fewer.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from bmigrate.common import blockdev
from bmigrate.common.errors import RefusedError

_DEPTH = 16


def devices_below(path: Path, depth: int = _DEPTH) -> set[int]:
    """Device numbers of all block devices that the content of a directory may lie on."""
    existing = path
    while not existing.exists():
        existing = existing.parent
    existing = existing.resolve()
    number = existing.stat().st_dev
    found = _stack(number, depth)
    if found or depth <= 0:
        return found
    # File systems with device numbers of their own (btrfs, overlay): the mount table knows the source.
    fstype, source, options = _mount_of(existing)
    if source.startswith("/dev/") and os.path.exists(source):
        return _stack(os.stat(source).st_rdev, depth)
    if fstype == "overlay":
        for option in options.split(","):
            if option.startswith("upperdir="):
                upper = Path(option.partition("=")[2])
                if upper.exists() and upper.stat().st_dev != number:
                    return devices_below(upper, depth - 1)
    return set()


def refuse_protected(directory: Path, volumes: Iterable[tuple[str, str]]) -> None:
    """Refuse a directory that lies on one of the volumes.

    Args:
        directory: of the bitmap files; need not exist yet.
        volumes: (name, device path) of every volume that is or may be tracked on this host.

    Raises:
        RefusedError: reason ``bitmap_on_volume``, naming the volume.
    """
    below = devices_below(directory)
    for name, device in volumes:
        try:
            number = blockdev.device_number(device)
        except RefusedError:
            continue  # a device that is not there holds no directory
        if number in below:
            raise RefusedError(
                f"bitmap directory {directory} lies on {device}, which is volume {name}",
                volume=name,
                hint="set bitmap_directory to a directory on another disk: each store into the map would be "
                "a write that has to be tracked",
                reason="bitmap_on_volume",
            )


def _stack(number: int, depth: int) -> set[int]:
    """A block device with everything that it is made of."""
    directory = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    if depth <= 0 or not directory.exists():
        return set()
    directory = directory.resolve()
    found = {number}
    if (directory / "partition").exists():
        found |= _stack(_number_of(directory.parent), depth - 1)
    if (directory / "slaves").is_dir():
        for member in (directory / "slaves").iterdir():
            found |= _stack(_number_of(member), depth - 1)
    backing = directory / "loop" / "backing_file"
    if backing.exists():
        file = Path(backing.read_text().strip())
        found |= devices_below(file if file.is_dir() else file.parent, depth - 1)
    return found


def _number_of(directory: Path) -> int:
    major, minor = (directory / "dev").read_text().strip().split(":")
    return os.makedev(int(major), int(minor))


def _mount_of(path: Path) -> tuple[str, str, str]:
    """(type, source, super options) of the mount that a path lies in."""
    best: tuple[int, tuple[str, str, str]] = (-1, ("", "", ""))
    with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as table:
        for line in table:
            left, _, right = line.partition(" - ")
            point = left.split()[4].encode().decode("unicode_escape", errors="replace")
            inside = point == "/" or path == Path(point) or Path(point) in path.parents
            if inside and len(point) >= best[0]:
                words = right.split()
                best = (len(point), (words[0], words[1], words[2] if len(words) > 2 else ""))
    return best[1]
