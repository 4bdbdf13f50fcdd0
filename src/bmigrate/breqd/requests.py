# SPDX-License-Identifier: GPL-3.0-or-later
"""The operations of breqd.sock (docs/on-disk.md has the files, docs/protocol.md the sockets).

Each takes a request, does one thing through tracker or leases, and answers plain fields. Offsets
and lengths are bytes relative to the volume. What has to wait for the log is answered behind a
barrier; nothing here blocks. A suspicion or a fence is durable before it is answered.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Union

from bmigrate.breqd import cleanflag, track
from bmigrate.breqd.maps import Key
from bmigrate.breqd.tracker import Tracked, as_refusal
from bmigrate.common import blockdev, config, rpc, state
from bmigrate.common.errors import BmigrateError, RefusedError, UsageError
from bmigrate.kernel.errors import KernelError

if TYPE_CHECKING:
    from bmigrate.breqd.loop import Daemon

LOG = logging.getLogger("breqd")

MAX_CELLS = 4096
Request = dict[str, Any]
Fields = dict[str, Any]
Answer = Union[Fields, "rpc._Later"]
Connection = rpc.Connection


class Requests:
    """Dispatches requests. Args: daemon: whose tracker, leases and barriers are used."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon, self.tracker, self.leases = daemon, daemon.tracker, daemon.leases
        #: The last drain of each workload that was offered the blocks of failed writes.
        self._drained: dict[str, str] = {}
        self._operations: dict[str, Callable[[Connection, Request], Answer]] = {
            "attach": self.attach,
            "detach": self.detach,
            "reload": self.reload,
            "status": self.status,
            "map": self.map,
            "fence": self.fence,
            "end_session": self.end_session,
            "claim": self.claim,
            "ack": self.ack,
            "mark": self.mark,
            "barrier": self.barrier,
            "suspect": self.suspect,
            "resync_begin": self.resync_begin,
            "resync_end": self.resync_end,
            "clean_close": self.clean_close,
            "self_test": self.self_test,
        }

    def handle(self, connection: Connection, request: Request) -> Answer:
        """Answer one request."""
        operation = self._operations.get(str(request.get("op")))
        if operation is None:
            raise UsageError(
                f"breqd knows no operation {request.get('op')!r}",
                hint="it knows: " + ", ".join(sorted(self._operations)),
                reason="unknown_operation",
            )
        try:
            return operation(connection, request)
        except KernelError as exc:
            raise as_refusal(exc, str(request.get("volume") or "")) from exc
        except ArithmeticError as exc:
            raise UsageError(f"bad number in request {request.get('op')!r}: {exc}", reason="bad_request") from exc

    # --- tracking --------------------------------------------------------------------------------

    def attach(self, _connection: Connection, request: Request) -> Fields:
        """{workload, volume, mode: resume|seed|promote} → {attachment, suspect, granule_bytes, changed}."""
        workload, volume = _key(request)
        settings = config.load(workload, validated=False)
        self.daemon.configs[workload] = settings
        before = self.tracker.volumes.get((workload, volume))
        mode = str(request.get("mode", "resume"))
        error = self.daemon.attach(settings, volume, mode)
        if error is not None:
            raise error
        if mode != "resume":
            # The maps began anew: a session of before must not go on over them.
            self.leases.forget(workload)
        item = self.tracker.get((workload, volume))
        return {
            "attachment": f"{item.attachment_id:016x}",
            "suspect": item.suspect,
            "granule_bytes": item.bitmap.granule_bytes,
            "changed": item is not before,
        }

    def detach(self, connection: Connection, request: Request) -> Answer:
        """{workload, volume} → {detached}; records on their way are in the kept bitmap first."""
        key = _key(request)
        self.daemon.released.add(key)
        item = self.tracker.stop_recording(key)
        if item is None:
            return {"detached": False}

        def finish() -> Fields:
            self.tracker.finish_detach(item)
            return {"detached": True}

        return self._behind_barrier(connection, request, finish)

    def reload(self, _connection: Connection, _request: Request) -> Fields:
        """{} → {problems: [error]}: configurations and roles are read again, primaries attached."""
        self.daemon.reload()
        return {"problems": [error.to_dict() for error in self.daemon.problems.values()]}

    def status(self, _connection: Connection, request: Request) -> Fields:
        """{workload?} → {incarnation, tracking, volumes: [...]}; see ``_describe``."""
        wanted = request.get("workload")
        volumes = [
            self._describe(item) for key, item in sorted(self.tracker.volumes.items()) if wanted in (None, key[0])
        ]
        known = {(item["workload"], item["volume"]) for item in volumes}
        for name, settings in sorted(self.daemon.configs.items()):
            if wanted in (None, name):
                volumes += [
                    self._describe_untracked((name, volume.name), settings.device(volume.name))
                    for volume in settings.volumes
                    if (name, volume.name) not in known
                ]
        problem = self.tracker.kernel_problem
        return {
            "incarnation": self.leases.incarnation,
            "kernel_problem": problem.to_dict() if problem else None,
            "volumes": volumes,
        }

    def map(self, _connection: Connection, request: Request) -> Fields:
        """{workload, volume, cells} → {cell_bytes, granule_bytes, dirty: [n], claimed: [n]}: granules per cell."""
        key = _key(request)
        item = self.tracker.get(key)
        cells = int(request.get("cells", 128))
        if not 1 <= cells <= MAX_CELLS:
            raise UsageError(f"{cells} is no number of cells", hint=f"1 to {MAX_CELLS}", reason="bad_request")
        picture = self.tracker.maps.picture(key, cells)
        return {
            "granule_bytes": item.bitmap.granule_bytes,
            "size_bytes": self.tracker.maps.volumes[key].size_bytes,
            **picture._asdict(),
        }

    def _describe(self, item: Tracked) -> Fields:
        key, maps = item.key, self.tracker.maps
        volume = maps.volumes[key]
        oldest = maps.oldest(key)
        regions = 0
        try:
            if self.tracker.control is not None:
                regions = self.tracker.control.stats(item.slot, item.attachment_id).regions_set
        except KernelError as exc:
            LOG.debug("no counters of slot %d: %s", item.slot, exc)
        return {
            "workload": key[0],
            "volume": key[1],
            "device": item.device,
            "number": item.number,
            "bitmap": str(item.bitmap.path),
            "size_bytes": volume.size_bytes,
            "granule_bytes": volume.granule_bytes,
            "dirty_bytes": maps.dirty_bytes(key),
            "claimed_bytes": maps.claimed_bytes(key),
            "failed_bytes": maps.failed_bytes(key),
            "suspect": item.suspect,
            "attached": not item.lost,
            "attachment_id": f"{item.attachment_id:016x}",
            "attached_at": item.record.attached_at,
            "allowed_epoch": self.leases.epoch(key[0]),
            "highest_epoch": item.record.highest_epoch,
            "oldest_dirty_age_seconds": 0.0 if oldest is None else max(0.0, time.monotonic() - oldest),
            "total_records": item.records,
            "written_bytes": item.written_bytes,
            "overflow_regions": regions,
            "widened_bytes": item.widened_bytes,
            "discarded_bytes": item.discarded_bytes,
            "redirtied_claimed_blocks": volume.redirtied_claimed_blocks,
            "seed_count": item.record.seed_count,
            "resync_count": item.record.resync_count,
            "resyncing": item.resync is not None,
            "claims_outstanding": len(volume.claims),
            "self_test": item.witness.describe(time.monotonic()),
            "problem": None,
        }

    def _describe_untracked(self, key: Key, device: str) -> Fields:
        """A configured volume that is not tracked; where this host is primary that is a suspicion."""
        error = self.daemon.problems.get(key)
        item = state.load(key[0])
        suspect = None
        if item is not None and item.role == "primary":
            suspect = f"not tracked: {error.message if error else 'not attached'}"
            try:
                record = track.load(*key)
            except BmigrateError:
                record = None
            if record is not None and record.suspect:
                suspect += f" ({record.suspect['reason']})"
        return {
            **dict.fromkeys(
                (
                    "size_bytes", "granule_bytes", "dirty_bytes", "claimed_bytes", "failed_bytes", "total_records",
                    "written_bytes", "overflow_regions", "widened_bytes", "discarded_bytes",
                    "redirtied_claimed_blocks", "seed_count", "resync_count", "claims_outstanding",
                    "oldest_dirty_age_seconds",
                ),
                0,
            ),
            **dict.fromkeys(("bitmap", "attachment_id", "attached_at", "allowed_epoch", "highest_epoch", "self_test")),
            "workload": key[0],
            "volume": key[1],
            "device": device,
            "suspect": suspect,
            "attached": False,
            "resyncing": False,
            "problem": error.to_dict() if error else None,
        }  # fmt: skip

    # --- claims ----------------------------------------------------------------------------------

    def fence(self, _connection: Connection, request: Request) -> Fields:
        """{workload, epoch, fence_id} → {incarnation}: older claims go back, this epoch may claim."""
        self.leases.fence(str(request["workload"]), int(request["epoch"]), str(request["fence_id"]))
        return {"incarnation": self.leases.incarnation}

    def end_session(self, _connection: Connection, request: Request) -> Fields:
        """{workload, epoch}: no more claims or acknowledgements of it."""
        self.leases.end(str(request["workload"]), int(request["epoch"]))
        return {}

    def claim(self, _connection: Connection, request: Request) -> Fields:
        """{workload, volume, epoch, max_bytes, from_offset_bytes} → {claim, extents, next_offset_bytes, ...}."""
        return self.leases.claim(
            _key(request), int(request["epoch"]), int(request["max_bytes"]), int(request.get("from_offset_bytes", 0))
        )

    def ack(self, _connection: Connection, request: Request) -> Fields:
        """{workload, volume, claim} → {redirtied_bytes} or {ignored: true}."""
        return self.leases.acknowledge(_key(request), request["claim"])

    def mark(self, _connection: Connection, request: Request) -> Fields:
        """{workload, volume, extents: [[offset, length], ...], reason}: make byte ranges dirty."""
        key = _key(request)
        self.tracker.get(key)
        extents = [[int(offset), int(length)] for offset, length in request["extents"]]
        if any(not 0 <= number < 1 << 63 for extent in extents for number in extent):
            raise UsageError("an extent is negative, or does not fit 63 bits", volume=key[1], reason="bad_request")
        self.tracker.maps.mark_extents(key, extents, time.monotonic())
        LOG.info("marked %d extents of %s/%s: %s", len(extents), *key, request.get("reason"))
        return {"dirty_bytes": self.tracker.maps.dirty_bytes(key)}

    def barrier(self, connection: Connection, request: Request) -> Answer:
        """{workload, drain?} → {incarnation, total_records: {volume: n}}, once the log is past this moment.

        Equal numbers of two barriers of one incarnation mean no new record between. Every barrier
        offers the blocks of failed writes again, but those of one ``drain`` (its run id; workload
        stopped, device flushed and held) do so once. They stay marked even so: a drain that is
        given up must leave them as they were.
        """
        workload = str(request["workload"])
        drain = str(request["drain"]) if request.get("drain") else None
        if not self.tracker.of_workload(workload):
            raise RefusedError(f"no volume of workload {workload} is tracked", reason="not_attached")

        def answer() -> Fields:
            items = self.tracker.of_workload(workload)
            if drain is not None:
                for item in items:
                    self.tracker.require_sight(item)
            if drain is None or self._drained.get(workload) != drain:
                for item in items:
                    self.tracker.maps.offer_failed(item.key, time.monotonic())
            if drain is not None:
                self._drained[workload] = drain
            return {
                "incarnation": self.leases.incarnation,
                "total_records": {item.key[1]: item.records for item in items},
            }

        return self._behind_barrier(connection, request, answer)

    # --- suspicion -------------------------------------------------------------------------------

    def suspect(self, _connection: Connection, request: Request) -> Fields:
        """{workload, volume, reason}: durable before it is answered."""
        key = _key(request)
        config.load(key[0], validated=False).volume(key[1])
        self.tracker.suspect(key, str(request["reason"]))
        return {}

    def resync_begin(self, _connection: Connection, request: Request) -> Fields:
        """{workload, volume, resume?} → {resync_id, resumed}: ``resume`` is the id of one that was interrupted."""
        resume = request.get("resume")
        identifier, resumed = self.tracker.resync_begin(_key(request), None if resume is None else str(resume))
        return {"resync_id": identifier, "resumed": resumed}

    def resync_end(self, _connection: Connection, request: Request) -> Fields:
        """{workload, volume, resync_id}: clears the suspicion durably unless a new one came up."""
        self.tracker.resync_end(_key(request), str(request["resync_id"]))
        return {}

    def self_test(self, connection: Connection, request: Request) -> Answer:
        """{workload, volume} → {state, proven_sectors, proven_age_seconds, reason}, as of now.

        The caller has flushed what it could; nothing is written here. A blind tracker answers so
        and makes the volume suspect.
        """
        key = _key(request)
        self.tracker.get(key)

        def look() -> Fields:
            item = self.tracker.get(key)
            self.tracker.look(item)
            return item.witness.describe(time.monotonic())

        return self._behind_barrier(connection, request, look)

    # --- the end of a boot -----------------------------------------------------------------------

    def clean_close(self, connection: Connection, request: Request) -> Answer:
        """{workload, volume}: write the clean flag and detach; only while hold owns the device.

        The shutdown unit's, after unmount. Raises RefusedError ``not_held``, ``still_written`` or ``not_durable``.
        """
        key = _key(request)
        item = self.tracker.get(key)
        self.tracker.require_held(key, trusted=False)
        if item.lost:
            raise RefusedError(f"not all writes were recorded: {item.lost}", volume=key[1], reason="lost")
        # Nobody claims any more, and an acknowledgement must not change the map after its checksum.
        self.leases.forget(key[0])

        def close() -> Answer:
            self.tracker.require_sight(item)
            self.tracker.require_durable(item)
            self.tracker.maps.give_back(key)
            item.bitmap.sync()
            records = item.records
            cleanflag.write(
                *key,
                {
                    "boot_id": blockdev.boot_id(),
                    "map_id": item.bitmap.map_id,
                    "bitmap_crc": item.bitmap.crc(),
                    "identity": blockdev.identity(item.device),
                    "superblock_digest": blockdev.superblock_digest(item.device),
                    "closed_at": time.time(),
                },
            )

            def check() -> Fields:
                if item.records != records or item.lost:
                    cleanflag.withdraw(*key)
                    raise RefusedError(
                        "the device was written while it was being closed",
                        volume=key[1],
                        hint="something writes past hold; the volume will be suspect",
                        reason="still_written",
                    )
                try:
                    # One that came up since: the flag would be believed at the next boot, and it not be known.
                    self.tracker.require_durable(item)
                    self.tracker.stop_recording(key)
                    self.tracker.finish_detach(item)
                except (BmigrateError, OSError):
                    # Also when the end of the tracking is not noted: the volume may be used again in this boot.
                    cleanflag.withdraw(*key)
                    raise
                self.daemon.released.add(key)
                return {"clean": True}

            try:
                return self._behind_barrier(connection, request, check)
            except (BmigrateError, OSError):
                cleanflag.withdraw(*key)
                raise

        return self._behind_barrier(connection, request, close)

    def _behind_barrier(self, connection: Connection, request: Request, then: Callable[[], Answer]) -> Answer:
        """Answer with what ``then`` gives once every write completed by now is in the maps."""

        def run() -> None:
            try:
                fields = then()
            except (BmigrateError, OSError) as exc:
                connection.fail(request, as_refusal(exc, str(request.get("volume") or "")))
                return
            if isinstance(fields, dict):
                connection.reply(request, fields)

        self.daemon.after_barrier(run)
        return rpc.LATER


def _key(request: Request) -> Key:
    """The volume that a request names.

    Raises:
        KeyError: the request lacks it; answered as a bad request.
    """
    return str(request["workload"]), str(request["volume"])
