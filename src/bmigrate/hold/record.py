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
FILE = "hold.json"


@dataclass
class VolumeRecord:
    """One volume that this host holds, or held as a standby.

    Attributes:
        device: its path when it was taken. identity: blockdev.identity() then.
        boot_id: the boot in which it was last held. hold_id: random, new for each exclusive open;
            the same id means held without a gap.
        counters: write counters at the last moment at which no session was open.
        suspect: why every block must be compared, or None.
        closed: {boot_id, counters, superblock_digest} of an orderly stop; believed once. In a later boot also
            `next_boot`, the first boot that found it: it is believed in that one and in no other.
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
        volumes: by name; also of those that the configuration does not name any more.
        written: {epoch, generation_id} of the last session in which a receiver was about to write, or None.
    """

    workload: str
    epoch: int = 0
    session: dict[str, Any] | None = None
    sealed: dict[str, Any] | None = None
    volumes: dict[str, VolumeRecord] = field(default_factory=dict)
    written: dict[str, Any] | None = None

    @property
    def session_open(self) -> bool:
        """Whether a session was granted whose receivers are not known to be gone."""
        return bool(self.session and self.session["open"])


def record_file(workload: str) -> Path:
    """Path of hold.json."""
    return paths.state_dir(workload) / FILE


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
            fields.get("written"),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DefectError(
            f"{path} has a form that this version does not know: {error}",
            reason="damaged",
            hint="install the version of bmigrate that wrote it, or restore it from a backup",
        ) from error


def meet_boot(record: Record, boot_id: str) -> bool:
    """Write the first boot that finds them into the closing notes of an earlier one; returns whether any was new.

    Whoever takes a volume in a boot after that one does not believe its note: what was done to the volume in between,
    while hold did not run or somebody else had the device, is in no counter of his.

    Raises:
        OSError: nothing is noted, neither here nor on disk.
    """
    new = [item.closed for item in record.volumes.values() if item.closed and item.closed["boot_id"] != boot_id]
    new = [closed for closed in new if "next_boot" not in closed]
    for closed in new:
        closed["next_boot"] = boot_id
    try:
        if new:
            save(record)
    except BaseException:
        for closed in new:
            del closed["next_boot"]
        raise
    return bool(new)


def save(record: Record) -> None:
    """Replace hold.json; durable when this returns. Raises: OSError, and then the old content is still there."""
    atomic.make_directory(paths.state_dir(record.workload))
    faults.point("hold.save")
    atomic.replace_json(record_file(record.workload), dict(asdict(record), schema=SCHEMA))
    faults.point("hold.saved")
