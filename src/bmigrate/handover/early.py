# SPDX-License-Identifier: GPL-3.0-or-later
"""The early unit's work: takes the durable clean flags away before anything can be mounted, and the closing notes too.

Promise: after it has run, no durable clean flag is left, so that a boot which writes to a volume
without tracking (no module, no daemon) cannot be taken for a clean one by the boot after it. Likewise
every closing note of a replica (in hold.json) bears the id of this boot, and is believed in no later one, should
nobody hold the replica in this. It needs neither module nor daemon nor configuration. In a boot it comes
before hold; run again while hold runs it finds nothing to do.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from bmigrate.common import atomic, blockdev, paths
from bmigrate.common.errors import DefectError
from bmigrate.hold import record

SCHEMA = 1
SUFFIX = ".clean"


def retire_all() -> list[dict[str, Any]]:
    """Move every STATE/WORKLOAD/VOLUME.clean into /run with the id of this boot; returns what was moved.

    Raises:
        OSError: a flag could not be removed, or a note not be changed. The unit fails; the marker without
            which no workload mounts is not set either while a flag is there (``Host.set_marker``).
    """
    boot_id = blockdev.boot_id()
    moved = []
    for flag in sorted(paths.state().glob("*/*" + SUFFIX)):
        retire(flag, boot_id)
        moved.append({"workload": flag.parent.name, "volume": flag.name[: -len(SUFFIX)]})
    failed: OSError | None = None
    for path in sorted(paths.state().glob("*/" + record.FILE)):
        try:
            record.meet_boot(record.load(path.parent.name), boot_id)
        except DefectError:
            continue  # nobody believes a damaged one, and hold says so
        except OSError as error:  # the others first
            failed = failed or OSError(error.errno, f"{error.strerror}: {path}")
    if failed is not None:
        raise failed
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
