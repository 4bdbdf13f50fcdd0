# SPDX-License-Identifier: GPL-3.0-or-later
"""The early unit's work: takes the durable clean flags away before anything can be mounted.

Promise: after it has run, no durable clean flag is left, so that a boot which writes to a volume
without tracking (no module, no daemon) cannot be taken for a clean one by the boot after it. It
needs neither module nor daemon nor configuration.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from bmigrate.common import atomic, blockdev, paths

SCHEMA = 1
SUFFIX = ".clean"


def retire_all() -> list[dict[str, Any]]:
    """Move every STATE/WORKLOAD/VOLUME.clean into /run with the id of this boot; returns what was moved.

    Raises:
        OSError: a flag could not be removed. The unit fails; the marker without which no workload mounts
            is not set either while a flag is there (``Host.set_marker``).
    """
    boot_id = blockdev.boot_id()
    moved = []
    for flag in sorted(paths.state().glob("*/*" + SUFFIX)):
        retire(flag, boot_id)
        moved.append({"workload": flag.parent.name, "volume": flag.name[: -len(SUFFIX)]})
    return moved


def retire(flag: Path, boot_id: str) -> None:
    """Move one flag: the token first, so that dying between the two loses nothing, then the flag, durably.

    A damaged flag becomes a token without one: it is taken away like any other and believed by nobody.

    Args:
        flag: STATE/WORKLOAD/VOLUME.clean. boot_id: of this boot, which is all the token is good for.
    """
    token = paths.clean_token(flag.parent.name, flag.name[: -len(SUFFIX)])
    try:
        content: Any = json.loads(flag.read_text(encoding="utf-8", errors="replace"))
    except ValueError:
        content = None
    token.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
    temporary = token.with_name(token.name + ".new")
    temporary.write_text(json.dumps({"schema": SCHEMA, "boot_id": boot_id, "flag": content}, sort_keys=True) + "\n")
    os.rename(temporary, token)
    # The fsync in here is the point: a flag that came back after a power cut would vouch for a map that
    # has missed all writes of this boot.
    atomic.unlink_durably(flag)
