# SPDX-License-Identifier: GPL-3.0-or-later
"""Names that systemd gives to things: escaped paths of mount and device units, our timer."""

from __future__ import annotations

import string

_PLAIN = set(string.ascii_letters + string.digits + ":_.")


def escape_path(path: str) -> str:
    """A path as it stands in a unit name (systemd-escape --path)."""
    trimmed = "/".join(part for part in path.split("/") if part)
    if not trimmed:
        return "-"
    result = []
    for index, byte in enumerate(trimmed.encode()):
        character = chr(byte)
        if character == "/":
            result.append("-")
        elif character in _PLAIN and not (index == 0 and character == "."):
            result.append(character)
        else:
            result.append(f"\\x{byte:02x}")
    return "".join(result)


def mount_unit(path: str) -> str:
    """The mount unit of a mount point."""
    return escape_path(path) + ".mount"


def device_unit(path: str) -> str:
    """The device unit of a device path."""
    return escape_path(path) + ".device"


def dead_man_unit(workload: str) -> str:
    """The transient timer and service (without suffix) that puts a workload back."""
    return f"bmigrate-deadman-{workload}"
