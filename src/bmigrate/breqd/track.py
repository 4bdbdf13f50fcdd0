# SPDX-License-Identifier: GPL-3.0-or-later
"""What is durably known about the tracking of one volume, and the verdict at an attach.

Promises: ``judge`` is pure and says suspect unless it is *proved* that no write was missed: either
the very same attachment is still there, or the clean flag, the write counters, the identity and
the superblock area all agree. A record is replaced atomically and fsynced before anybody acts on
it. Nothing here talks to the kernel or changes a map.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bmigrate.common import atomic, faults, paths
from bmigrate.common.blockdev import WriteCounters
from bmigrate.common.errors import DefectError

SCHEMA = 1
_SUFFIX = ".track.json"


@dataclass
class Track:
    """The content of VOLUME.track.json (docs/on-disk.md).

    Attributes:
        device: path it was attached by. identity: what tells the device from another one.
        bitmap: path of the bitmap file. map_id: the random id in its header.
        boot_id: boot in which the attachment was made.
        attachment: the kernel's random id in hexadecimal; None once detached in good order.
        suspect: {reason, at} or None.
        suspicions: counts every suspicion ever, so that a resync sees one raised meanwhile.
        blind: why the tracker was found blind in this attachment, or None; over with the attachment only.
        highest_epoch: no fence of that epoch or an older one is accepted.
    """

    workload: str
    volume: str
    device: str = ""
    identity: dict[str, Any] = field(default_factory=dict)
    bitmap: str = ""
    map_id: str | None = None
    boot_id: str | None = None
    attachment: str | None = None
    attached_at: float | None = None
    suspect: dict[str, Any] | None = None
    suspicions: int = 0
    blind: str | None = None
    highest_epoch: int = 0
    seed_count: int = 0
    resync_count: int = 0
    schema: int = SCHEMA

    def save(self) -> None:
        """Replace the file durably."""
        faults.point("breqd.track_replace")
        atomic.make_directory(paths.state_dir(self.workload))
        atomic.replace_json(track_file(self.workload, self.volume), asdict(self))
        faults.point("breqd.track_replaced")

    def raise_suspicion(self, reason: str) -> None:
        """Note a suspicion; the first reason is kept, later ones are counted. Save it before answering."""
        self.suspicions += 1
        if self.suspect is None:
            self.suspect = {"reason": reason, "at": time.time()}


def track_file(workload: str, volume: str) -> Path:
    """Path of VOLUME.track.json."""
    return paths.state_dir(workload) / f"{volume}{_SUFFIX}"


def load(workload: str, volume: str) -> Track | None:
    """The record of a volume, or None when it was never attached on this host.

    Raises:
        DefectError: reason ``damaged``: not JSON, or of another version.
    """
    path = track_file(workload, volume)
    fields = atomic.read_json(path)
    if fields is None:
        return None
    if not isinstance(fields, dict) or fields.get("schema") != SCHEMA:
        raise DefectError(
            f"{path} has a form that this version does not know",
            volume=volume,
            hint="install the version of bmigrate that wrote it",
            reason="damaged",
        )
    return Track(**{key: value for key, value in fields.items() if key in Track.__dataclass_fields__})


def load_all() -> tuple[list[Track], list[DefectError]]:
    """The records of all volumes on this host, and an error for each that cannot be read."""
    found, damaged = [], []
    for path in sorted(paths.state().glob("*/*" + _SUFFIX)):
        try:
            item = load(path.parent.name, path.name[: -len(_SUFFIX)])
        except DefectError as error:
            damaged.append(error)
            continue
        if item is not None:
            found.append(item)
    return found, damaged


@dataclass(frozen=True)
class Facts:
    """What is true at an attach, gathered *after* the kernel began to record.

    Attributes:
        boot_id: of this boot.
        attachment: id of the kernel's attachment of this volume that was there before, or None.
        events: what the kernel says happened to that attachment, in words; empty: nothing.
        identity: of the device now.
        map_id: of the bitmap file; None: there is no file. bitmap_error: why it cannot be used.
        bitmap_crc: of the maps as they are on disk (only when a flag is there).
        flag: the clean flag, already used up, or None.
        counters: writes to the device since it appeared.
        superblock_digest: of the device now (only when a flag is there).
        mounts: where the device is mounted already, in words.
    """

    boot_id: str
    identity: dict[str, Any]
    counters: WriteCounters
    attachment: str | None = None
    events: str = ""
    map_id: str | None = None
    bitmap_error: str | None = None
    bitmap_crc: int | None = None
    flag: dict[str, Any] | None = None
    superblock_digest: str | None = None
    mounts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """How to begin: ``bitmap`` is ``keep`` (the file's marks), ``empty`` or ``all_dirty``; and why suspect."""

    bitmap: str
    suspect: str | None


def judge(track: Track | None, facts: Facts) -> Verdict:
    """Whether tracking of a volume that resumes may have missed writes.

    Args:
        track: what was known, or None.
        facts: what is true now.
    """
    if facts.map_id is None and facts.bitmap_error is None:
        # No map: everything is dirty, so nothing that was missed matters.
        return Verdict("all_dirty", None)
    if facts.bitmap_error is not None:
        return Verdict("empty", facts.bitmap_error)
    if track is None:
        return Verdict("empty", "the bitmap file has no tracking record beside it")
    if track.map_id != facts.map_id:
        return Verdict("empty", "the bitmap file is not the one that the tracking record names")
    if track.identity.get("size_bytes") != facts.identity.get("size_bytes"):
        return Verdict(
            "empty",
            f"the device has {facts.identity.get('size_bytes')} bytes, it had {track.identity.get('size_bytes')}",
        )
    if track.identity != facts.identity:
        return Verdict("empty", f"the device is another one: {_difference(track.identity, facts.identity)}")
    if facts.attachment is not None and facts.attachment == track.attachment and facts.boot_id == track.boot_id:
        return Verdict("keep", facts.events or None)
    return Verdict("keep", _doubt(track, facts))


def _doubt(track: Track, facts: Facts) -> str | None:
    """Why a new attachment may have missed writes, or None when the clean flag proves otherwise."""
    flag = facts.flag
    if flag is None:
        if track.boot_id == facts.boot_id:
            return "the kernel's attachment was lost or replaced in this boot (module reloaded or volume detached)"
        return "the volume was not closed in good order before tracking began" + _late(facts)
    if not facts.counters.counted:
        return "the kernel does not count writes of this device (queue/iostats is 0), so none can be ruled out"
    if not facts.counters.untouched:
        return "the device was written in this boot before tracking began" + _late(facts)
    if flag.get("identity") != facts.identity:
        return f"the device is not the one that was closed: {_difference(flag.get('identity') or {}, facts.identity)}"
    if flag.get("map_id") != facts.map_id or flag.get("bitmap_crc") != facts.bitmap_crc:
        return "the bitmap file changed since the volume was closed"
    if flag.get("superblock_digest") != facts.superblock_digest or facts.superblock_digest is None:
        return "the first or last MiB of the device changed since the volume was closed"
    return None


def _late(facts: Facts) -> str:
    """What happened to the device in this boot before tracking began; empty: nothing is known to have."""
    text = ""
    seen = facts.counters
    if seen.writes or seen.discards:
        text = f"; {seen.writes} writes of {seen.sectors_written} sectors and {seen.discards} discards came before it"
    if facts.mounts:
        text += f"; it was mounted already ({facts.mounts[0]})"
    return text + "; start breqd before the mount" if text else ""


def _difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    keys = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
    return ", ".join(f"{key} was {before.get(key)!r}, is {now.get(key)!r}" for key in keys)
