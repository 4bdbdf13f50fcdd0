# SPDX-License-Identifier: GPL-3.0-or-later
"""Tells udev which devices are a standby's: marker files that 61-bmigrate.rules tests for.

A marker is an empty-looking file STATE/udev/KEY, where KEY is made of a property that udev itself
knows the device by (serial-..., dm-..., part-...), so that the rule needs no helper program and
works from the first event of a boot, long before hold runs. Its content names workload and volume.
The marker is durable and follows the durable role; after a change of it the device is triggered.
It must never decide who may write: the exclusive hold does that. This only keeps curious programs away.
"""
from __future__ import annotations

import os
from pathlib import Path

from bmigrate.common import atomic, blockdev, paths


def directory() -> Path:
    """Where the markers are."""
    return paths.state() / "udev"


def keys(properties: dict[str, str]) -> list[str]:
    """Names of the markers for a device with these udev properties; the rule builds the same names. Pure."""
    found = []
    if properties.get("DM_UUID"):
        found.append("dm-" + properties["DM_UUID"])
    elif properties.get("DEVTYPE") == "partition" and properties.get("ID_PART_ENTRY_UUID"):
        found.append("part-" + properties["ID_PART_ENTRY_UUID"])
    elif properties.get("DEVTYPE") == "partition" and properties.get("ID_SERIAL"):
        found.append(f"serial-{properties['ID_SERIAL']}-part{properties.get('PARTN', '')}")
    elif properties.get("ID_SERIAL"):
        found.append("serial-" + properties["ID_SERIAL"])
    return [name for name in found if "/" not in name and len(name) < 200]


def properties(path: str) -> dict[str, str]:
    """What udev's database and the kernel say of a device."""
    found = {}
    number = blockdev.device_number(path)
    try:
        text = Path(f"/run/udev/data/b{os.major(number)}:{os.minor(number)}").read_text(errors="replace")
    except FileNotFoundError:
        text = ""
    for line in text.splitlines():
        if line.startswith("E:"):
            key, _, value = line[2:].partition("=")
            found[key] = value
    for line in (blockdev.sysfs_dir(path) / "uevent").read_text().splitlines():
        key, _, value = line.partition("=")
        found.setdefault(key, value)
    return found


def mark(workload: str, volume: str, path: str) -> bool:
    """Make the marker of a standby volume, and trigger the device when it was not there yet.

    Returns: False when the device has no property to mark it by.
    """
    names = keys(properties(path))
    if not names:
        return False
    wanted = f"{workload} {volume}\n"
    changed = False
    for name in names:
        marker = directory() / name
        if not marker.exists() or marker.read_text() != wanted:
            atomic.make_directory(directory(), 0o755)
            atomic.replace(marker, wanted, 0o644)
            changed = True
    if changed:
        trigger(path)
    return True


def unmark(workload: str, volume: str, path: str) -> bool:
    """Remove the markers of a volume, and trigger the device when there was one; always True."""
    wanted = f"{workload} {volume}\n"
    found = [item for item in directory().iterdir() if item.read_text() == wanted] if directory().is_dir() else []
    for marker in found:
        atomic.unlink_durably(marker)
    if found:
        trigger(path)
    return True


def trigger(path: str) -> None:
    """Have the kernel send a change event for the device (and its partitions see to themselves)."""
    uevent = blockdev.sysfs_dir(path) / "uevent"
    uevent.write_text("change")
