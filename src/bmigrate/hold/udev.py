# SPDX-License-Identifier: GPL-3.0-or-later
"""Tells udev which devices are a standby's: marker files that 61-bmigrate.rules tests for and imports.

A marker is STATE/udev/KEY, where KEY is made of a property that udev itself knows the device by
(serial-..., dm-..., part-...), so that the rule needs no helper program and works from the first
event of a boot on, long before hold runs. Its content names the volume, and the links that the
device keeps. The marker is durable and follows the durable role; after a change the device is
triggered. It must never decide who may write: the exclusive hold does that. This only keeps
curious programs away.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

from bmigrate.common import atomic, blockdev, paths
from bmigrate.common.errors import BmigrateError

log = logging.getLogger("bmigrate-hold")

MAX_LINKS = 8
_CONTENT_LINKS = ("disk/by-uuid/", "disk/by-label/", "disk/by-partuuid/", "disk/by-partlabel/", "disk/by-diskseq/")
_SAFE = re.compile(r"[A-Za-z0-9#+.:=@_/\\-]+\Z")


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


def content(workload: str, volume: str, path: str, links: list[str]) -> str:
    """What a marker says. Pure.

    Args:
        path: the configured device path; it stays whatever kind of link it is.
        links: all links of the device, relative to /dev; those that name its content go.
    """
    own = path[len("/dev/") :] if path.startswith("/dev/disk/") else ""
    kept = [own] if own else []
    kept += [link for link in sorted(links) if link != own and not link.startswith(_CONTENT_LINKS)]
    kept = [link for link in kept if _SAFE.match(link)][:MAX_LINKS]
    lines = [f"BMIGRATE_VOLUME={workload}/{volume}"]
    lines += [f"BMIGRATE_LINK_{index}={link}" for index, link in enumerate(kept)]
    return "\n".join(lines) + "\n"


def database(path: str) -> tuple[dict[str, str], list[str]]:
    """What udev's database and the kernel say of a device: its properties and its links (relative to /dev)."""
    found: dict[str, str] = {}
    links = []
    number = blockdev.device_number(path)
    try:
        text = Path(f"/run/udev/data/b{os.major(number)}:{os.minor(number)}").read_text(errors="replace")
    except FileNotFoundError:
        text = ""
    for line in text.splitlines():
        if line.startswith("E:"):
            key, _, value = line[2:].partition("=")
            found[key] = value
        elif line.startswith("S:"):
            links.append(line[2:])
    for line in (blockdev.sysfs_dir(path) / "uevent").read_text().splitlines():
        key, _, value = line.partition("=")
        found.setdefault(key, value)
    return found, links


def _owner(marker: Path) -> str:
    return marker.read_text().partition("\n")[0]


def mark(workload: str, volume: str, path: str) -> bool:
    """Make the marker of a standby volume, and trigger the device when it was not there yet.

    Returns: False when the device has no property to mark it by.
    """
    properties, links = database(path)
    names = keys(properties)
    if not names:
        return False
    text = content(workload, volume, path, links)
    changed = False
    for name in names:
        marker = directory() / name
        if not marker.exists() or _owner(marker) != text.partition("\n")[0]:
            atomic.make_directory(directory(), 0o755)
            atomic.replace(marker, text, 0o644)
            changed = True
    if changed:
        trigger(path)
    return True


def unmark(workload: str, volume: str, path: str) -> bool:
    """Remove the markers of a volume, and trigger the device when there was one; always True."""
    wanted = f"BMIGRATE_VOLUME={workload}/{volume}"
    found = [item for item in directory().iterdir() if _owner(item) == wanted] if directory().is_dir() else []
    for marker in found:
        atomic.unlink_durably(marker)
    if found:
        trigger(path)
    return True


def trigger(path: str) -> None:
    """Have the kernel send a change event for the device."""
    (blockdev.sysfs_dir(path) / "uevent").write_text("change")


class Teller:
    """Tells udev the role of a workload's volumes when it has changed, and of a failure once."""

    def __init__(self, workload: str) -> None:
        self._workload = workload
        self._told: dict[tuple[str, str], bool] = {}
        self._problems: dict[str, str] = {}

    def tell(self, volume: str, path: str, standby: bool) -> None:
        """Have udev leave the device alone, or not any more. A failure is logged, and tried again at the next call."""
        if self._told.get((volume, path)) == standby:
            return
        try:
            known = (mark if standby else unmark)(self._workload, volume, path)
            problem = None if known else "it has no serial number or UUID that udev knows"
        except (BmigrateError, OSError) as error:
            problem = str(error)
        if problem is None:
            self._told[volume, path] = standby
            self._problems.pop(volume, None)
        elif self._problems.get(volume) != problem:
            self._problems[volume] = problem
            log.warning(
                "workload %s: volume %s: udev cannot be told its role for %s: %s", self._workload, volume, path, problem
            )
