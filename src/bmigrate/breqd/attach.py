# SPDX-License-Identifier: GPL-3.0-or-later
"""How a volume comes under tracking: attached anew, resumed, seeded, promoted, or taken over at start.

Promises: the kernel records before anything about the device is believed; the record of the
attach, with its suspicion, is durable before it is answered; and an attach that fails leaves what
was tracked as it was, and nothing attached that nobody reads. It must never believe a bitmap that
``track.judge`` does not.
"""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import Any

from bmigrate.breqd import bitmapfile, cleanflag, placement, settle, track, unsaved
from bmigrate.breqd.bitmapfile import BitmapFile
from bmigrate.breqd.maps import Key
from bmigrate.breqd.selftest import Witness
from bmigrate.breqd.track import Facts, Track, Verdict
from bmigrate.breqd.tracker import Tracked, Tracker, as_refusal, events_of
from bmigrate.common import blockdev, config, faults, log, paths
from bmigrate.common.config import Config
from bmigrate.common.errors import BmigrateError, DefectError, RefusedError
from bmigrate.kernel.control import Attachment, Control
from bmigrate.kernel.errors import KernelError

LOG = logging.getLogger("breqd")

DEFAULT_REGION_BYTES = 65536
MODES = ("resume", "seed", "promote")
_UNREAD = blockdev.WriteCounters(0, 0, 0, 0, False)


class Attacher:
    """Attaches volumes. Args: tracker: where they go."""

    def __init__(self, tracker: Tracker) -> None:
        self.tracker = tracker

    def adopt_all(self) -> list[BmigrateError]:
        """At start: take over the attachments that an earlier daemon left, detach the ones of nobody.

        Returns:
            what could not be taken over, each an error that names its volume.
        """
        records, damaged = track.load_all()
        problems: list[BmigrateError] = list(damaged)
        wanted = {item.attachment: item for item in records if item.attachment and item.boot_id == blockdev.boot_id()}
        for entry in self.tracker.require_control().list():
            if entry.draining:
                continue
            item = wanted.get(f"{entry.attachment_id:016x}")
            if item is not None and (item.workload, item.volume) in self.tracker.volumes:
                continue
            if item is None:
                LOG.warning("detached slot %d (device %d:%d): no volume has it", entry.slot, entry.major, entry.minor)
                self.tracker.require_control().detach(entry.slot, entry.attachment_id)
                continue
            try:
                self._resume((item.workload, item.volume), item.device, item, entry, Path(item.bitmap), None)
            except (BmigrateError, OSError) as exc:
                problems.append(as_refusal(exc, item.volume))
                LOG.error("detached slot %d of %s/%s: %s", entry.slot, item.workload, item.volume, exc)
                self.tracker.require_control().detach(entry.slot, entry.attachment_id)
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
        control = self.tracker.require_control(volume)
        directory = Path(settings.bitmap_directory) if settings.bitmap_directory else paths.state_dir(key[0])
        if settings.bitmap_directory:
            directory = directory / key[0]
        placement.refuse_protected(directory, _all_devices(settings))
        number = blockdev.device_number(device)
        current = self.tracker.volumes.get(key)
        entry = self.tracker.entry_of(current) if current else None
        if current and (entry is None or current.lost or current.number != number):
            self.tracker.give_up(current, entry)
            current = entry = None
        if current and mode == "resume":
            if current.device != device:  # another path of the same device: the one that others open from now on
                before, current.record.device = current.record.device, device
                try:
                    current.record.save()
                except OSError:
                    current.record.device = before  # tried again as long as the two differ
                    raise
                current.device = device
            return current
        if mode == "promote":
            self.tracker.require_held(key, trusted=True)
        region = settings.overflow_region_bytes or DEFAULT_REGION_BYTES
        known = self._load_track(key, mode)
        if entry is None:
            # Held for a promotion: the last receiver is gone, and nobody else can write.
            entry = self._kernel_attach(control, key, device, number, region, held=mode == "promote")
        path = directory / f"{volume}.bitmap"
        try:
            if mode == "resume":
                return self._resume(key, device, known, entry, path, settings.granule)
            return self._begin(key, device, known, entry, path, settings.granule, mode)
        except BaseException:
            # Nobody would read its records: an attachment that is not ours must not stay.
            if key not in self.tracker.volumes:
                control.detach(entry.slot, entry.attachment_id)
            raise

    def _kernel_attach(
        self, control: Control, key: Key, device: str, number: int, region: int, held: bool
    ) -> Attachment:
        for other in self.tracker.volumes.values():
            if other.number == number and other.key != key:
                raise RefusedError(
                    f"{device} is tracked already as volume {'/'.join(other.key)}", volume=key[1], reason="attached"
                )
        for stale in control.list():
            if os.makedev(stale.major, stale.minor) == number and not stale.draining and self._is_free(stale):
                control.detach(stale.slot, stale.attachment_id)
        fd = self._open_device(device, number, key[1])
        try:
            entry = control.attach(fd, region, volume=device, bio_based=True)
        except KernelError as error:
            raise as_refusal(error, key[1]) from error
        finally:
            os.close(fd)
        faults.point("breqd.attached")
        if entry.bio_based and not held:
            try:
                settle.settle(device, key[1])
            except BaseException:
                control.detach(entry.slot, entry.attachment_id)
                raise
        return entry

    def _open_device(self, device: str, number: int, volume: str) -> int:
        """The very device that was looked at, whatever the path leads to by now."""
        fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
        if os.fstat(fd).st_rdev != number:
            os.close(fd)
            raise RefusedError(f"{device} changed while it was opened", volume=volume, reason="device_changed")
        return fd

    def _is_free(self, entry: Attachment) -> bool:
        return all(item.slot != entry.slot for item in self.tracker.volumes.values())

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
                blockdev.boot_id(), known.identity, _UNREAD, known.attachment, events_of(entry),
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
        # One that an earlier daemon could not write: the verdict knows nothing of it.
        doubt = verdict.suspect or unsaved.read(key)
        if doubt:
            record.raise_suspicion(doubt)
            text = f"volume {key[0]}/{key[1]} is suspect: {doubt}"
            log.event(LOG, logging.WARNING, "suspect", text, key[0], volume=key[1])
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
            record.blind = None
        record.save()
        unsaved.forget(key)
        item = Tracked(
            key,
            device,
            os.makedev(entry.major, entry.minor),
            entry.attachment_id,
            entry.slot,
            entry.start_sector,
            record,
            bitmap,
            entry.sectors,
            Witness(at_completion=not entry.bio_based, certain=not (entry.bio_based or entry.partition)),
        )
        item.witness.blind = record.blind or ""
        # Only now is a volume that was tracked under this key given up: any failure before leaves it as it was.
        self.tracker.forget(key)
        self.tracker.put(item)
        self.tracker.look(item)
        return item

    def _load_track(self, key: Key, mode: str) -> Track | None:
        try:
            return track.load(*key)
        except DefectError:
            if mode == "resume":
                raise
            return None


def _all_devices(settings: Config) -> list[tuple[str, str]]:
    """(name, device) of every volume configured on this host."""
    known = {settings.workload: settings}
    for path in paths.etc().glob("*.yml"):
        if path.stem not in known:
            known[path.stem] = config.load(path.stem, validated=False)
    return [(volume.name, item.device(volume.name)) for item in known.values() for volume in item.volumes]
