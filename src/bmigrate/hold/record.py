# SPDX-License-Identifier: GPL-3.0-or-later
"""hold.json: what hold knows durably about a workload on this host. Format: docs/on-disk.md.

It promises that an epoch or a suspicion is on disk before anybody is told of it. It must never be
written by anyone but hold; others may read it (it is replaced as a whole).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bmigrate.common import atomic, faults, paths
from bmigrate.common.errors import DefectError

SCHEMA = 1


@dataclass
class VolumeRecord:
    """One volume that this host holds, or held as a standby.

    Attributes:
        device: its path when it was taken. identity: blockdev.identity() then.
        boot_id: the boot in which it was last held. hold_id: random, new for each exclusive open;
            the same id means held without a gap.
        counters: write counters at the last moment at which no session was open.
        suspect: why every block must be compared, or None.
        closed: {boot_id, counters, superblock_digest} of an orderly stop; believed once.
    """

    device: str
    identity: dict[str, Any]
    boot_id: str
    hold_id: str
    counters: dict[str, Any]
    suspect: str | None = None
    closed: dict[str, Any] | None = None


@dataclass
class Record:
    """All of hold.json.

    Attributes:
        epoch: the highest ever granted or fenced; only grows.
        session: {epoch, session_id, generation, host, open} of the last session granted here, or None.
        sealed: {epoch, state, hold_ids} while a fence without a session must stay the last, or None.
        volumes: by name.
    """

    workload: str
    epoch: int = 0
    session: dict[str, Any] | None = None
    sealed: dict[str, Any] | None = None
    volumes: dict[str, VolumeRecord] = field(default_factory=dict)

    @property
    def session_open(self) -> bool:
        """Whether a session was granted whose receivers are not known to be gone."""
        return bool(self.session and self.session["open"])


def record_file(workload: str) -> Path:
    """Path of hold.json."""
    return paths.state_dir(workload) / "hold.json"


def load(workload: str) -> Record:
    """The record; an empty one when there is none.

    Raises:
        DefectError: damaged, or of a newer version. Never taken for empty: the epoch would start over.
    """
    path = record_file(workload)
    fields = atomic.read_json(path)
    if fields is None:
        return Record(workload)
    try:
        if fields["schema"] != SCHEMA:
            raise KeyError("schema")
        return Record(
            workload,
            int(fields["epoch"]),
            fields["session"],
            fields["sealed"],
            {name: VolumeRecord(**item) for name, item in fields["volumes"].items()},
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DefectError(
            f"{path} has a form that this version does not know: {error}",
            reason="damaged",
            hint="install the version of bmigrate that wrote it, or restore it from a backup",
        ) from error


def save(record: Record) -> None:
    """Replace hold.json; durable when this returns. Raises: OSError, and then the old content is still there."""
    atomic.make_directory(paths.state_dir(record.workload))
    faults.point("hold.save")
    atomic.replace_json(record_file(record.workload), dict(asdict(record), schema=SCHEMA))
    faults.point("hold.saved")
