# SPDX-License-Identifier: GPL-3.0-or-later
"""The volumes under tracking: records into maps, suspicion, resync, detach.

Promises: when ``apply`` returns, a batch is in the maps and may be consumed; a suspicion is durable
before it is answered, one that the disk does not take stays one (unsaved.py) and no clean flag is written before it
is durable, and a resync clears it only if no other came up meanwhile. It must never
detach a volume on its own while the daemon stops or restarts. How a volume comes here: attach.py.
"""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass, field
from typing import Any

from bmigrate.breqd import track, unsaved
from bmigrate.breqd.bitmapfile import BitmapFile
from bmigrate.breqd.maps import Key, Maps
from bmigrate.breqd.records import Slots
from bmigrate.breqd.selftest import Sample, Witness
from bmigrate.breqd.track import Track
from bmigrate.common import blockdev, log, paths, rpc
from bmigrate.common.errors import BmigrateError, RefusedError, SuspectError
from bmigrate.kernel.control import Attachment, Control
from bmigrate.kernel.errors import KernelError

LOG = logging.getLogger("breqd")

HOLD_TIMEOUT_SECONDS = 10.0
#: How often a volume is looked at whose writes were already seen to be recorded.
WITNESS_SECONDS = 5.0


@dataclass
class Tracked:
    """One volume that the kernel records for us.

    Attributes:
        lost: why the attachment no longer records all writes; empty: it does.
        closing: being detached on request; only records on their way are still taken.
        resync: (id, suspicions at its begin) of the resync under way.
        records, written_bytes, widened_bytes, discarded_bytes: consumed since this daemon took the volume; the
            discarded ones are among the written.
        sectors: size of the volume when it was attached, 512 bytes each.
        witness: whether its writes are seen to be recorded.
        unsaved: a suspicion of ``record`` is not on disk.
    """

    key: Key
    device: str
    number: int
    attachment_id: int
    slot: int
    start_sector: int
    record: Track
    bitmap: BitmapFile
    sectors: int
    witness: Witness
    witnessed_at: float = 0.0
    lost: str = ""
    closing: bool = False
    resync: tuple[str, int] | None = None
    records: int = 0
    written_bytes: int = 0
    widened_bytes: int = 0
    discarded_bytes: int = 0
    seen_events: set[str] = field(default_factory=set)
    unsaved: bool = False

    @property
    def suspect(self) -> str | None:
        """Why writes may have been missed, or None."""
        blind = f"the tracker is blind: {self.witness.blind}" if self.witness.blind else None
        return self.lost or blind or (self.record.suspect["reason"] if self.record.suspect else None)


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
        for slot in ranges.records.nonzero()[0].tolist():
            item = self._by_slot.get(slot)
            if item is None:
                continue
            item.records += int(ranges.records[slot])
            item.written_bytes += int(ranges.written_bytes[slot])
            item.widened_bytes += int(ranges.widened_bytes[slot])
            item.discarded_bytes += int(ranges.discarded_bytes[slot])
        if ranges.unknown:
            self._strangers(ranges.unknown)

    def _strangers(self, slots: list[int]) -> None:
        """Records of attachments that are not ours: whoever made one must not believe that it is tracked."""
        for entry in self.require_control().list():
            if entry.slot in slots and not entry.draining:
                LOG.warning("detached slot %d: its records were read, but it belongs to no volume", entry.slot)
                self.require_control().detach(entry.slot, entry.attachment_id)

    # --- detach ----------------------------------------------------------------------------------

    def stop_recording(self, key: Key) -> Tracked | None:
        """First half of a detach: the kernel stops; records on their way are still put into the map."""
        item = self.volumes.get(key)
        if item is None:
            return None
        entry = self.entry_of(item)
        item.closing = True
        if entry is not None:
            self.require_control().detach(entry.slot, entry.attachment_id)
        return item

    def finish_detach(self, item: Tracked) -> None:
        """Second half, behind a barrier: forget the volume; its bitmap file stays."""
        if self.volumes.get(item.key) is not item:
            return  # attached anew meanwhile
        item.record.attachment = None
        try:
            self._save(item)
        finally:
            # The kernel records nothing any more: a volume that stays here would pass for tracked. The record on disk
            # names an attachment that never comes back.
            self.forget(item.key)

    def give_up(self, item: Tracked, entry: Attachment | None) -> None:
        """An attachment that no longer records what it should: note it, and let go of it."""
        self._raise(item, item.lost or "the attachment was replaced: the device is another one now")
        if entry is not None and not entry.draining:
            self.require_control().detach(entry.slot, entry.attachment_id)
        item.record.attachment = None
        try:
            self._save(item)
        except OSError as exc:
            # As above: without this, the next attach finds a record of an attachment that is gone, and is suspect.
            LOG.error("volume %s/%s: given up, and its record cannot be written: %s", *item.key, exc)
        self.forget(item.key)

    def put(self, item: Tracked) -> None:
        """Take a volume into the maps; what its bitmap holds is dirty, and its records are translated from now on."""
        bitmap = item.bitmap
        self.maps.add(item.key, bitmap.size_bytes, bitmap.granule_bytes, bitmap.map, bitmap.failed, time.monotonic())
        self.volumes[item.key] = item
        self._place()

    def forget(self, key: Key) -> None:
        """Take a volume out of the maps; its bitmap file keeps what it holds."""
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
        """Note durably that writes of a volume may have been missed.

        Raises:
            OSError: it is not durable. A tracked volume is suspect all the same, and ``poll`` tries again.
        """
        item = self.volumes.get(key)
        record = item.record if item else track.load(*key) or Track(*key)
        record.raise_suspicion(reason)
        text = f"volume {key[0]}/{key[1]} is suspect: {reason}"
        log.event(LOG, logging.WARNING, "suspect", text, key[0], volume=key[1])
        if item is None:
            record.save()
            return
        try:
            self._save(item)
        except OSError as exc:
            if not item.unsaved:
                LOG.error("volume %s/%s: the suspicion cannot be written: %s; trying again", *key, exc)
            item.unsaved = True
            try:
                unsaved.note(key, reason)
            except OSError as other:
                LOG.error("volume %s/%s: nor noted: %s; it is suspect while this daemon lives", *key, other)
            raise

    def _raise(self, item: Tracked, reason: str) -> None:
        """``suspect`` where nobody waits for an answer: the daemon, and the volumes beside this one, go on."""
        try:
            self.suspect(item.key, reason)
        except OSError as exc:
            LOG.debug("volume %s/%s: %s", *item.key, exc)  # said by suspect, and tried again by poll

    def _save(self, item: Tracked) -> None:
        """Make the record of a volume durable, and with it every suspicion."""
        item.record.save()
        if item.unsaved:
            item.unsaved = False
            unsaved.forget(item.key)
            LOG.info("volume %s/%s: the suspicion is on disk now", *item.key)

    def require_durable(self, item: Tracked) -> None:
        """Refuse while a suspicion of the volume is not on disk: what is written after it must not outlive it.

        Raises:
            RefusedError: reason ``not_durable``.
        """
        if not item.unsaved:
            return
        try:
            self._save(item)
        except OSError as exc:
            raise RefusedError(
                f"the suspicion of the volume cannot be written: {exc}",
                volume=item.key[1],
                hint=f"make room on the disk of {paths.state()}",
                reason="not_durable",
            ) from exc

    def poll(self) -> None:
        """Ask the kernel what became of the attachments; removal and growth of a disk are suspicions."""
        if self.control is None:
            return
        entries = {entry.attachment_id: entry for entry in self.control.list() if not entry.draining}
        for item in list(self.volumes.values()):
            if item.unsaved:
                try:
                    self._save(item)
                except OSError as exc:
                    LOG.debug("volume %s/%s: still not: %s", *item.key, exc)
            entry = entries.get(item.attachment_id)
            if item.closing:
                continue
            events = events_of(entry) if entry is not None else "the kernel has no such attachment any more"
            if entry is not None and entry.gone:
                # At once: the attachment keeps the memory of the disk, and its driver.
                item.lost = events
                self.give_up(item, entry)
                continue
            if events:
                self._lose(item, events)
                continue
            unproven = item.witness.state in ("unproven", "doubtful")
            if unproven or time.monotonic() - item.witnessed_at >= WITNESS_SECONDS:
                self.look(item)

    def _lose(self, item: Tracked, events: str) -> None:
        """An attachment does not record all writes of its device any more."""
        if events not in item.seen_events:
            item.seen_events.add(events)
            item.lost = events
            self._raise(item, events)

    def look(self, item: Tracked) -> None:
        """Is it still the same device, and is what the kernel counts for it recorded? If not, it is a suspicion."""
        if item.lost or item.closing:
            return
        elsewhere = self._elsewhere(item)
        if elsewhere:
            self._lose(item, elsewhere)
            return
        extent = blockdev.extent_of_number(item.number)
        events = moved(item, extent)
        if extent is None:
            item.lost = events
            self.give_up(item, self.entry_of(item))
            return
        if events:
            self._lose(item, events)
            return
        try:
            # In this order: selftest.py says why.
            counters = blockdev.counters_of_number(item.number)
            in_flight = blockdev.writes_in_flight(item.number)
            stats = self.require_control().stats(item.slot, item.attachment_id)
        except (OSError, ValueError) as exc:
            if not item.witness.unreadable:
                LOG.warning("volume %s/%s: no self test, %s has no counters: %s", *item.key, item.device, exc)
            item.witness.unreadable = str(exc)
            return
        item.witnessed_at = time.monotonic()
        written = counters.sectors_written + counters.sectors_discarded
        before = item.witness.state
        item.witness.take(Sample(written, in_flight, stats.sectors, item.witnessed_at, stats.passthrough))
        if item.witness.blind and before != "blind":
            text = f"volume {item.key[0]}/{item.key[1]}: THE TRACKER IS BLIND: {item.witness.blind}"
            log.event(LOG, logging.CRITICAL, "blind", text, item.key[0], volume=item.key[1])
            item.record.blind = item.witness.blind
            self._raise(item, f"the tracker is blind: {item.witness.blind}")
        elif item.witness.state != before:
            LOG.info("volume %s/%s: self test: %s", *item.key, item.witness.state)

    def _elsewhere(self, item: Tracked) -> str:
        """Whether the volume's path has become that of another device, in words; empty: no.

        Whoever opens the path now writes there, unrecorded. A path that leads nowhere for a moment is none: udev makes
        links anew, and what has the device open goes on.
        """
        try:
            number = blockdev.device_number(item.device)
        except (BmigrateError, OSError):
            return ""
        if number == item.number:
            return ""
        return f"{item.device} leads to device {os.major(number)}:{os.minor(number)} now"

    def require_sight(self, item: Tracked) -> None:
        """Refuse unless all that the kernel counted so far was recorded; called when nothing is under way.

        Raises:
            SuspectError: reason ``blind`` or ``lost``; durable before it is raised.
            OSError: it could not be made durable.
        """
        self.look(item)
        if item.lost:
            raise SuspectError(f"not all writes were recorded: {item.lost}", volume=item.key[1], reason="lost")
        if item.witness.doubt and not item.witness.blind:
            self.suspect(item.key, f"the tracker may be blind: {item.witness.doubt} sectors were not recorded")
        if item.witness.blind or item.witness.doubt:
            raise SuspectError(
                f"writes of {item.device} are not recorded: {item.witness.describe(time.monotonic())['reason']}",
                volume=item.key[1],
                hint="nothing of this volume may be believed; see docs/kernel.md, and install or reload the module",
                reason="blind",
            )

    def resync_begin(self, key: Key, resume: str | None = None) -> tuple[str, bool]:
        """Begin to compare a volume by checksum, or go on with it.

        Args:
            resume: the id of a comparison that was interrupted.

        Returns: the id for ``resync_end``, and whether it is that one still: no suspicion came up since it began, so
            what is clean now was proved by it. False: everything has to be compared.

        Raises:
            SuspectError: reason ``blind``: what is compared now may be written to unseen a moment later.
        """
        item = self.get(key)
        if item.witness.blind:
            raise SuspectError(
                f"a comparison proves nothing: {item.suspect}",
                volume=key[1],
                hint="install or reload the module, and have the volume attached anew; see docs/kernel.md",
                reason="blind",
            )
        if resume is not None and item.resync == (resume, item.record.suspicions) and not item.lost:
            return resume, True
        item.resync = (os.urandom(8).hex(), item.record.suspicions)
        return item.resync[0], False

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
        self.look(item)
        if item.lost or item.witness.blind or item.record.suspicions != before:
            raise RefusedError(
                f"a new suspicion came up during the resync: {item.suspect}",
                volume=key[1],
                hint="resync once more",
                reason="new_suspicion",
            )
        item.record.suspect = None
        item.record.resync_count += 1
        self._save(item)

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

    def entry_of(self, item: Tracked) -> Attachment | None:
        for entry in self.require_control().list():
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

    def require_control(self, volume: str | None = None) -> Control:
        if self.control is None:
            raise self.no_kernel(volume)
        return self.control


def events_of(entry: Attachment) -> str:
    """What the kernel says happened to an attachment, in words; empty: nothing."""
    if entry.gone:
        return "the disk was removed"
    if entry.blind:
        return "the kernel had no memory to record a write, or the device was given DAX"
    if entry.beyond:
        return "the disk was written behind the end that was known when it was attached"
    return ""


def moved(item: Tracked, extent: tuple[int, int] | None) -> str:
    """What became of the place and size of a volume since it was attached, in words; empty: nothing."""
    if extent is None:
        return "the device is gone, or is no partition any more"
    start, sectors = extent
    if start != item.start_sector:
        return f"the partition was moved from sector {item.start_sector} to {start}"
    if sectors != item.sectors:
        return f"the device was resized from {item.sectors * 512} to {sectors * 512} bytes"
    return ""


def as_refusal(exc: BaseException, volume: str) -> BmigrateError:
    """Any failure around a volume in the form that an operator sees, with the volume's name."""
    if isinstance(exc, BmigrateError):
        exc.volume = exc.volume or volume
        return exc
    if isinstance(exc, KernelError):
        return RefusedError(exc.message, volume=volume, hint=exc.hint, reason=exc.code)
    return RefusedError(f"volume {volume} cannot be tracked: {exc}", volume=volume, reason="os_error")
