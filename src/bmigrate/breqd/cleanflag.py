# SPDX-License-Identifier: GPL-3.0-or-later
"""The clean flag: how one boot tells the next that a volume's map is complete (docs/on-disk.md).

Promises: the flag is written once, at the very end of an orderly shutdown; the early unit of the
next boot (``bmigrate.handover.early``) moves it into /run before anything may be mounted; breqd
uses that token up, durably, before it believes it. So a flag can never be believed twice, and a
boot in which breqd does not run loses it.

Files: VOLUME.clean = {schema, workload, volume, boot_id, map_id, bitmap_crc, identity,
superblock_digest, closed_at}; the token in /run = {boot_id (of the new boot), flag}.
"""

from __future__ import annotations

import json
from typing import Any

from bmigrate.common import atomic, blockdev, faults, paths

SCHEMA = 1


def write(workload: str, volume: str, fields: dict[str, Any]) -> None:
    """Write the durable flag. Only after unmount, barrier, sync of the bitmap, and under an exclusive open."""
    faults.point("breqd.clean_flag")
    atomic.replace_json(
        paths.clean_flag(workload, volume), {"schema": SCHEMA, "workload": workload, "volume": volume, **fields}
    )


def withdraw(workload: str, volume: str) -> bool:
    """Remove the durable flag, durably; True when there was one."""
    return atomic.unlink_durably(paths.clean_flag(workload, volume))


def use_up(workload: str, volume: str) -> dict[str, Any] | None:
    """Take the token of this boot away and return the flag in it, or None.

    It is gone before the caller believes it: a daemon that dies right after attaching comes back
    to find none, and the volume is suspect.
    """
    path = paths.clean_token(workload, volume)
    try:
        text = path.read_text()
    except FileNotFoundError:
        return None
    atomic.unlink_durably(path)
    try:
        token = json.loads(text)
    except ValueError:
        return None
    if not isinstance(token, dict) or token.get("boot_id") != blockdev.boot_id():
        return None
    flag = token.get("flag")
    if not isinstance(flag, dict) or flag.get("schema") != SCHEMA:
        return None
    return flag if (flag.get("workload"), flag.get("volume")) == (workload, volume) else None
