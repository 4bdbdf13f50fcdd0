# SPDX-License-Identifier: GPL-3.0-or-later
"""The volumes under tracking: attach, resume, suspicion, detach, and records into maps.

Promises: the kernel records before anything about a device is believed; a suspicion is durable
before it is answered; and whatever the kernel holds attached at start is either taken over with
its bitmap or detached before the first record is read. It must never detach a volume on its own
while the daemon stops or restarts. One thread; no operation here waits for the network.
"""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bmigrate.breqd import bitmapfile, cleanflag, placement, track
from bmigrate.breqd.bitmapfile import BitmapFile
from bmigrate.breqd.maps import Key, Maps
from bmigrate.breqd.records import Slots
from bmigrate.breqd.track import Facts, Track, Verdict
from bmigrate.common import blockdev, config, faults, paths, rpc
from bmigrate.common.config import Config
from bmigrate.common.errors import BmigrateError, DefectError, RefusedError
from bmigrate.kernel.control import Attachment, Control
from bmigrate.kernel.errors import KernelError

LOG = logging.getLogger("breqd")

DEFAULT_REGION_BYTES = 65536
HOLD_TIMEOUT_SECONDS = 10.0
MODES = ("resume", "seed", "promote")
_UNREAD = blockdev.WriteCounters(0, 0, 0, 0, False)


@dataclass
class Tracked:
    """One volume that the kernel records for us.

    Attributes:
        lost: why the attachment no longer records all writes; empty: it does.
        closing: being detached on request; only records on their way are still taken.
        resync: (id, suspicions at its begin) of the resync under way.
        records, written_bytes, widened_bytes: consumed since this daemon took the volume.
    """

    key: Key
    device: str
    number: int
    attachment_id: int
    slot: int
    start_sector: int
    record: Track
    bitmap: BitmapFile
    lost: str = ""
    closing: bool = False
    resync: tuple[str, int] | None = None
    records: int = 0
    written_bytes: int = 0
    widened_bytes: int = 0
    seen_events: set[str] = field(default_factory=set)

    @property
    def suspect(self) -> str | None:
        """Why writes may have been missed, or None."""
        return self.lost or (self.record.suspect["reason"] if self.record.suspect else None)


class Tracker:
    """All volumes of this host."""

    def __init__(self) -> None:
        self.control: Control | None = None
        self.kernel_problem: BmigrateError | None = None
        self.maps = Maps()
        self.slots = Slots()
        self.volumes: dict[Key, Tracked] = {}
        self._by_slot: dict[int, Tracked] = {}

    # --- records ---------------------------------------------------------------------------------

    def apply(self, records: Any) -> None:
        """Put a batch of records into the maps. When it returns, the batch may be consumed.

        Args:
            records: structured array of ``records.RECORD``.
        """
        ranges = self.slots.ranges(records)
        self.maps.mark(ranges.starts, ranges.ends, time.monotonic(), ranges.failed)
        for slot, item in self._by_slot.items():
            item.records += int(ranges.records[slot])
            item.written_bytes += int(ranges.written_bytes[slot])
            item.widened_bytes += int(ranges.widened_bytes[slot])
        if ranges.unknown:
            self._strangers(ranges.unknown)

    def _strangers(self, slots: list[int]) -> None:
        """Records of attachments that are not ours: whoever made one must not believe that it is tracked."""
        for entry in self._control().list():
            if entry.slot in slots and not entry.draining:
                LOG.warning("detached slot %d: its records were read, but it belongs to no volume", entry.slot)
                self._control().detach(entry.slot, entry.attachment_id)

    # --- attach ----------------------------------------------------------------------------------

    def adopt_all(self) -> list[BmigrateError]:
        """At start: take over the attachments that an earlier daemon left, detach the ones of nobody.

        Returns:
            what could not be taken over, each an error that names its volume.
        """
        records, damaged = track.load_all()
        problems: list[BmigrateError] = list(damaged)
        wanted = {item.attachment: item for item in records if item.attachment and item.boot_id == blockdev.boot_id()}
        for entry in self._control().list():
            if entry.draining:
                continue
            item = wanted.get(f"{entry.attachment_id:016x}")
            if item is not None and (item.workload, item.volume) in self.volumes:
                continue
            if item is None:
                LOG.warning("detached slot %d (device %d:%d): no volume has it", entry.slot, entry.major, entry.minor)
                self._control().detach(entry.slot, entry.attachment_id)
                continue
            try:
                self._resume((item.workload, item.volume), item.device, item, entry, Path(item.bitmap), None)
            except (BmigrateError, OSError) as exc:
                problems.append(as_refusal(exc, item.volume))
                LOG.error("detached slot %d of %s/%s: %s", entry.slot, item.workload, item.volume, exc)
                self._control().detach(entry.slot, entry.attachment_id)
        return problems

    def attach(self, settings: Config, volume: str, mode: str) -> Tracked:
        """Track a volume from now on; when it is tracked already, resume changes nothing.

        Args:
            settings: the workload's configuration on this host.
            mode: ``resume`` believes the bitmap if that is proved, else suspect; ``seed`` marks
                everything; ``promote`` starts with nothing marked and needs the device held.

        Raises:
            RefusedError: no module, device missing or not trackable, bitmap on a volume, not held.
        """
        if mode not in MODES:
            raise RefusedError(
                f"attach mode {mode!r} is not one of {', '.join(MODES)}", volume=volume, reason="bad_mode"
            )
        key, device = (settings.workload, volume), settings.device(volume)
        control = self._control(volume)
        directory = Path(settings.bitmap_directory) if settings.bitmap_directory else paths.state_dir(key[0])
        if settings.bitmap_directory:
            directory = directory / key[0]
        placement.refuse_protected(directory, _all_devices(settings))
        number = blockdev.device_number(device)
        current = self.volumes.get(key)
        entry = self._entry_of(current) if current else None
        if current and (entry is None or current.lost or current.number != number):
            self._give_up(current, entry)
            current = entry = None
        if current and mode == "resume":
            return current
        if mode == "promote":
            self.require_held(key, trusted=True)
        region = settings.overflow_region_bytes or DEFAULT_REGION_BYTES
        known = self._load_track(key, mode)
        if entry is None:
            entry = self._kernel_attach(control, key, device, number, region)
        path = directory / f"{volume}.bitmap"
        try:
            if mode == "resume":
                return self._resume(key, device, known, entry, path, settings.granule)
            return self._begin(key, device, known, entry, path, settings.granule, mode)
        except BaseException:
            # Nobody would read its records: an attachment that is not ours must not stay.
            if key not in self.volumes:
                control.detach(entry.slot, entry.attachment_id)
            raise

    def _kernel_attach(self, control: Control, key: Key, device: str, number: int, region: int) -> Attachment:
        for other in self.volumes.values():
            if other.number == number and other.key != key:
                raise RefusedError(
                    f"{device} is tracked already as volume {'/'.join(other.key)}", volume=key[1], reason="attached"
                )
        for stale in control.list():
            if os.makedev(stale.major, stale.minor) == number and not stale.draining and self._is_free(stale):
                control.detach(stale.slot, stale.attachment_id)
        fd = self._open_device(device, number, key[1])
        try:
            entry = control.attach(fd, region, volume=device)
        except KernelError as error:
            raise as_refusal(error, key[1]) from error
        finally:
            os.close(fd)
        faults.point("breqd.attached")
        return entry

    def _open_device(self, device: str, number: int, volume: str) -> int:
        """The very device that was looked at, whatever the path leads to by now."""
        fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
        if os.fstat(fd).st_rdev != number:
            os.close(fd)
            raise RefusedError(f"{device} changed while it was opened", volume=volume, reason="device_changed")
        return fd

    def _is_free(self, entry: Attachment) -> bool:
        return entry.slot not in self._by_slot

    def _resume(
        self,
        key: Key,
        device: str,
        known: Track | None,
        entry: Attachment,
        path: Path,
        granule: int | None,
    ) -> Tracked:
        """Go on with the bitmap that is there, or begin anew, as the verdict says."""
        bitmap, error = self._open_bitmap(path)
        same = known is not None and known.attachment == f"{entry.attachment_id:016x}"
        flag = None
        if not same:
            # Used up before it is believed, and a flag that was not moved to /run is not believed at all.
            flag = cleanflag.use_up(*key)
            cleanflag.withdraw(*key)
        if same and known is not None:
            # The kernel holds the disk itself: whatever became of the path, no write was missed.
            facts = Facts(
                blockdev.boot_id(), known.identity, _UNREAD, known.attachment, _events(entry),
                bitmap.map_id if bitmap else None, error,
            )  # fmt: skip
        else:
            facts = Facts(
                boot_id=blockdev.boot_id(),
                # The kernel records since before this line: a write is either counted here or recorded.
                counters=blockdev.write_counters(device),
                mounts=tuple(blockdev.mounts_of(device)),
                identity=blockdev.identity(device),
                map_id=bitmap.map_id if bitmap else None,
                bitmap_error=error,
                bitmap_crc=bitmap.crc() if bitmap and flag else None,
                flag=flag,
                superblock_digest=blockdev.superblock_digest(device) if flag else None,
            )
        verdict = track.judge(known, facts)
        record = known or Track(*key)
        if verdict.suspect:
            record.raise_suspicion(verdict.suspect)
            LOG.warning("volume %s/%s is suspect: %s", *key, verdict.suspect)
        if bitmap is None or verdict.bitmap != "keep":
            bitmap = self._new_bitmap(key, path, facts.identity, granule, verdict)
            if verdict.bitmap == "all_dirty":
                record.seed_count += 1
                record.suspect = None
        return self._take(key, device, record, entry, bitmap, facts.identity)

    def _begin(
        self, key: Key, device: str, known: Track | None, entry: Attachment, path: Path, granule: int | None, mode: str
    ) -> Tracked:
        """Seed or promote: a new bitmap, no suspicion, no session of before."""
        cleanflag.use_up(*key)
        cleanflag.withdraw(*key)
        identity = blockdev.identity(device)
        verdict = Verdict("all_dirty" if mode == "seed" else "empty", None)
        bitmap = self._new_bitmap(key, path, identity, granule, verdict)
        record = known or Track(*key)
        record.suspect = None
        record.highest_epoch = 0
        if mode == "seed":
            record.seed_count += 1
        return self._take(key, device, record, entry, bitmap, identity)

    def _open_bitmap(self, path: Path) -> tuple[BitmapFile | None, str | None]:
        try:
            return BitmapFile(path), None
        except FileNotFoundError:
            return None, None
        except (DefectError, OSError) as exc:
            return None, f"the bitmap file cannot be used: {getattr(exc, 'message', exc)}"

    def _new_bitmap(
        self, key: Key, path: Path, identity: dict[str, Any], granule: int | None, verdict: Verdict
    ) -> BitmapFile:
        size = int(identity["size_bytes"])
        label = {"workload": key[0], "volume": key[1], "identity": identity}
        chosen = bitmapfile.choose_granule(size, granule)
        return bitmapfile.create(path, size, chosen, label, verdict.bitmap == "all_dirty")

    def _take(
        self,
        key: Key,
        device: str,
        record: Track,
        entry: Attachment,
        bitmap: BitmapFile,
        identity: dict[str, Any],
    ) -> Tracked:
        """The last step of every attach: the durable record first, then the maps, then the answer."""
        same = record.attachment == f"{entry.attachment_id:016x}"
        record.device, record.identity, record.bitmap = device, identity, str(bitmap.path)
        record.map_id, record.boot_id = bitmap.map_id, blockdev.boot_id()
        if not same:
            record.attachment, record.attached_at = f"{entry.attachment_id:016x}", time.time()
        record.save()
        # Only now is a volume that was tracked under this key given up: any failure before leaves it as it was.
        self._forget(key)
        item = Tracked(
            key,
            device,
            os.makedev(entry.major, entry.minor),
            entry.attachment_id,
            entry.slot,
            entry.start_sector,
            record,
            bitmap,
        )
        self.maps.add(key, bitmap.size_bytes, bitmap.granule_bytes, bitmap.map, bitmap.failed, time.monotonic())
        self.volumes[key] = item
        self._place()
        return item

    # --- detach ----------------------------------------------------------------------------------

    def stop_recording(self, key: Key) -> Tracked | None:
        """First half of a detach: the kernel stops; records on their way are still put into the map."""
        item = self.volumes.get(key)
        if item is None:
            return None
        entry = self._entry_of(item)
        item.closing = True
        if entry is not None:
            self._control().detach(entry.slot, entry.attachment_id)
        return item

    def finish_detach(self, item: Tracked) -> None:
        """Second half, behind a barrier: forget the volume; its bitmap file stays."""
        if self.volumes.get(item.key) is not item:
            return  # attached anew meanwhile
        item.record.attachment = None
        item.record.save()
        self._forget(item.key)

    def _give_up(self, item: Tracked, entry: Attachment | None) -> None:
        """An attachment that no longer records what it should: note it, and let go of it."""
        self.suspect(item.key, item.lost or "the attachment was replaced: the device is another one now")
        if entry is not None and not entry.draining:
            self._control().detach(entry.slot, entry.attachment_id)
        item.record.attachment = None
        item.record.save()
        self._forget(item.key)

    def _forget(self, key: Key) -> None:
        item = self.volumes.pop(key, None)
        if item is None:
            return
        self.maps.remove(key)
        item.bitmap.close()
        self._place()

    def _place(self) -> None:
        """The volumes may lie elsewhere in the bit space now: tell the translation of records."""
        self.slots.clear()
        self._by_slot = {item.slot: item for item in self.volumes.values()}
        for item in self.volumes.values():
            place = self.maps.volumes[item.key]
            self.slots.put(item.slot, item.start_sector, place.size_bytes, place.granule_bytes, place.base * 8)

    # --- suspicion -------------------------------------------------------------------------------

    def suspect(self, key: Key, reason: str) -> None:
        """Note durably that writes of a volume may have been missed."""
        item = self.volumes.get(key)
        record = item.record if item else track.load(*key) or Track(*key)
        record.raise_suspicion(reason)
        record.save()
        LOG.warning("volume %s/%s is suspect: %s", *key, reason)

    def poll(self) -> None:
        """Ask the kernel what became of the attachments; removal and growth of a disk are suspicions."""
        if self.control is None:
            return
        entries = {entry.attachment_id: entry for entry in self.control.list() if not entry.draining}
        for item in list(self.volumes.values()):
            entry = entries.get(item.attachment_id)
            if item.closing:
                continue
            events = _events(entry) if entry is not None else "the kernel has no such attachment any more"
            if events and events not in item.seen_events:
                item.seen_events.add(events)
                item.lost = events
                self.suspect(item.key, events)

    def resync_begin(self, key: Key) -> str:
        """Begin to compare a volume by checksum; returns the id for ``resync_end``."""
        item = self.get(key)
        item.resync = (os.urandom(8).hex(), item.record.suspicions)
        return item.resync[0]

    def resync_end(self, key: Key, identifier: str) -> None:
        """All blocks were compared and the different ones marked: the suspicion is over, durably.

        Raises:
            RefusedError: reason ``stale_resync`` or ``new_suspicion``; the volume stays suspect.
        """
        item = self.get(key)
        if item.resync is None or item.resync[0] != identifier:
            raise RefusedError(
                "that resync is not the one under way", volume=key[1], hint="begin again", reason="stale_resync"
            )
        before, item.resync = item.resync[1], None
        if item.lost or item.record.suspicions != before:
            raise RefusedError(
                f"a new suspicion came up during the resync: {item.suspect}",
                volume=key[1],
                hint="resync once more",
                reason="new_suspicion",
            )
        item.record.suspect = None
        item.record.resync_count += 1
        item.record.save()

    # --- small -----------------------------------------------------------------------------------

    def get(self, key: Key) -> Tracked:
        """The tracked volume of that key.

        Raises:
            RefusedError: reason ``not_attached``.
        """
        item = self.volumes.get(key)
        if item is None:
            raise RefusedError(
                f"volume {'/'.join(key)} is not tracked",
                volume=key[1],
                hint="see 'bmigrate status' and the log of breqd",
                reason="not_attached",
            )
        return item

    def of_workload(self, workload: str) -> list[Tracked]:
        """Its tracked volumes."""
        return [item for key, item in sorted(self.volumes.items()) if key[0] == workload]

    def require_held(self, key: Key, trusted: bool) -> None:
        """Refuse unless hold says that it owns the device exclusively.

        Args:
            trusted: also refuse when hold suspects that the device was written while it was not held.

        Raises:
            RefusedError: reason ``not_held``. UnreachableError: hold does not answer.
        """
        answer = rpc.call(paths.hold_socket(), "status", HOLD_TIMEOUT_SECONDS, workload=key[0])
        why = "it is not held"
        for item in answer.get("volumes", []):
            if (item.get("workload", key[0]), item.get("volume")) != key or not item.get("held"):
                continue
            if not (trusted and item.get("suspect")):
                return
            why = f"hold suspects it: {item['suspect']}"
        raise RefusedError(
            f"the device of volume {'/'.join(key)} is not safe from other writers: {why}",
            volume=key[1],
            hint="bmigrate-hold must hold it exclusively; see its log",
            reason="not_held",
        )

    def _load_track(self, key: Key, mode: str) -> Track | None:
        try:
            return track.load(*key)
        except DefectError:
            if mode == "resume":
                raise
            return None

    def _entry_of(self, item: Tracked) -> Attachment | None:
        for entry in self._control().list():
            if entry.attachment_id == item.attachment_id and not entry.draining:
                return entry
        return None

    def no_kernel(self, volume: str | None = None) -> RefusedError:
        """The error for a request that needs the module while it is not there."""
        problem = self.kernel_problem
        return RefusedError(
            f"no write can be tracked: {problem.message if problem else 'the kernel module reqlog is not loaded'}",
            volume=volume,
            hint=(problem and problem.hint) or "run install.yml, or: modprobe reqlog",
            reason=(problem and problem.reason) or "not_loaded",
        )

    def _control(self, volume: str | None = None) -> Control:
        if self.control is None:
            raise self.no_kernel(volume)
        return self.control


def _events(entry: Attachment) -> str:
    """What the kernel says happened to an attachment, in words; empty: nothing."""
    if entry.gone:
        return "the disk was removed"
    if entry.beyond:
        return "the disk was written behind the end that was known when it was attached"
    return ""


def _all_devices(settings: Config) -> list[tuple[str, str]]:
    """(name, device) of every volume configured on this host."""
    known = {settings.workload: settings}
    for path in paths.etc().glob("*.yml"):
        if path.stem not in known:
            known[path.stem] = config.load(path.stem, validated=False)
    return [(volume.name, item.device(volume.name)) for item in known.values() for volume in item.volumes]


def as_refusal(exc: BaseException, volume: str) -> BmigrateError:
    """Any failure around a volume in the form that an operator sees, with the volume's name."""
    if isinstance(exc, BmigrateError):
        exc.volume = exc.volume or volume
        return exc
    if isinstance(exc, KernelError):
        return RefusedError(exc.message, volume=volume, hint=exc.hint, reason=exc.code)
    return RefusedError(f"volume {volume} cannot be tracked: {exc}", volume=volume, reason="os_error")
