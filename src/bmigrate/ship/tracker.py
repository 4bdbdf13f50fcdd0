# SPDX-License-Identifier: GPL-3.0-or-later
"""The shipper's connection to breqd, one workload, typed. It holds no state and decides nothing.

Each thread of a session has a connection of its own. When breqd goes away every call raises
UnreachableError, which ends the session: claims of another incarnation must not be acted on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bmigrate.common import rpc
from bmigrate.common.errors import RefusedError
from bmigrate.ship.window import Claim

Extent = tuple[int, int]


@dataclass(frozen=True)
class Tracked:
    """breqd's view of one volume. Bytes and seconds; see the status operation of breqd.sock."""

    name: str
    size_bytes: int
    granule_bytes: int
    dirty_bytes: int
    claimed_bytes: int
    suspect: str | None
    attached: bool
    attachment_id: str
    oldest_dirty_age_seconds: float
    written_bytes: int
    seed_count: int
    highest_epoch: int
    discarded_bytes: int = 0
    blind: bool = False
    number: int = 0

    @property
    def left_bytes(self) -> int:
        """Not yet durable on the standby, as far as breqd knows."""
        return self.dirty_bytes + self.claimed_bytes


@dataclass(frozen=True)
class Snapshot:
    """breqd's view of a workload at one moment."""

    incarnation: str
    volumes: dict[str, Tracked]

    @property
    def left_bytes(self) -> int:
        """Sum over the volumes."""
        return sum(item.left_bytes for item in self.volumes.values())

    @property
    def lag_seconds(self) -> float:
        """Age of the oldest write that is not yet durable on the standby."""
        return max((item.oldest_dirty_age_seconds for item in self.volumes.values()), default=0.0)

    @property
    def suspects(self) -> dict[str, str]:
        """Volume -> reason."""
        return {name: item.suspect for name, item in self.volumes.items() if item.suspect}

    @property
    def highest_epoch(self) -> int:
        """breqd accepts no fence of this epoch or an older one."""
        return max((item.highest_epoch for item in self.volumes.values()), default=0)

    @property
    def written_bytes(self) -> int:
        """Running total of what the workload wrote, discards left out, over all volumes."""
        return sum(item.written_bytes - item.discarded_bytes for item in self.volumes.values())

    @property
    def discarded_bytes(self) -> int:
        """Running total of what the workload discarded, over all volumes."""
        return sum(item.discarded_bytes for item in self.volumes.values())

    @property
    def counting(self) -> str:
        """Changes when the running total began anew."""
        return self.incarnation + "".join(sorted(item.attachment_id for item in self.volumes.values()))


def snapshots(answer: dict[str, Any]) -> dict[str, Snapshot]:
    """breqd's status answer, by workload."""
    grouped: dict[str, dict[str, Tracked]] = {}
    for item in answer["volumes"]:
        grouped.setdefault(item["workload"], {})[item["volume"]] = Tracked(
            name=item["volume"],
            size_bytes=int(item["size_bytes"]),
            granule_bytes=int(item["granule_bytes"]),
            dirty_bytes=int(item["dirty_bytes"]),
            claimed_bytes=int(item["claimed_bytes"]),
            suspect=item.get("suspect"),
            attached=bool(item.get("attached")),
            attachment_id=str(item.get("attachment_id") or ""),
            oldest_dirty_age_seconds=float(item.get("oldest_dirty_age_seconds") or 0.0),
            written_bytes=int(item.get("written_bytes") or 0),
            seed_count=int(item.get("seed_count") or 0),
            highest_epoch=int(item.get("highest_epoch") or 0),
            discarded_bytes=int(item.get("discarded_bytes") or 0),
            number=int(item.get("number") or 0),
            blind=(item.get("self_test") or {}).get("state") == "blind",
        )
    return {name: Snapshot(str(answer["incarnation"]), volumes) for name, volumes in grouped.items()}


class Tracker:
    """One connection to breqd for one workload.

    Raises (all methods):
        UnreachableError: breqd is not there or does not answer in time.
        BmigrateError: breqd refused.
    """

    def __init__(self, path: str | Path, workload: str, timeout_seconds: float = 60.0) -> None:
        self.workload = workload
        self._client = rpc.Client(path, timeout_seconds)

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def status(self) -> Snapshot:
        """breqd's view of the workload."""
        answer = self._client.call("status", workload=self.workload)
        found = snapshots(answer).get(self.workload)
        return found if found is not None else Snapshot(str(answer["incarnation"]), {})

    def fence(self, epoch: int, fence_id: str) -> None:
        """hold has confirmed the fence of this epoch: older claims go back, new ones may be made."""
        self._client.call("fence", workload=self.workload, epoch=epoch, fence_id=fence_id)

    def end_session(self, epoch: int) -> None:
        """No more claims or acknowledgements of this epoch."""
        self._client.call("end_session", workload=self.workload, epoch=epoch)

    def claim(self, volume: str, epoch: int, max_bytes: int, from_offset: int, incarnation: str) -> Claim | None:
        """Claim dirty blocks at or above an offset, ascending; None when there are none.

        Raises:
            RefusedError: reason ``restarted``: another breqd than the one of this session answered.
        """
        answer = self._client.call(
            "claim",
            workload=self.workload,
            volume=volume,
            epoch=epoch,
            max_bytes=max_bytes,
            from_offset_bytes=from_offset,
        )
        key = answer["claim"]
        if key is None:
            return None
        if key["incarnation"] != incarnation:
            raise self.restarted()
        extents = [(int(offset), int(length)) for offset, length in answer["extents"]]
        return Claim(volume, key, extents, int(answer["next_offset_bytes"]))

    def restarted(self) -> RefusedError:
        """The error for a breqd that is not the one this session began with."""
        return RefusedError(
            "breqd was restarted; the session ends and begins anew", hint="nothing to do", reason="restarted"
        )

    def ack(self, claim: Claim) -> None:
        """The claim is durable on the standby.

        Raises:
            RefusedError: reason ``restarted``: breqd does not know the claim; nothing was cleared.
        """
        answer = self._client.call("ack", workload=self.workload, volume=claim.volume, claim=claim.key)
        if answer.get("ignored"):
            raise self.restarted()

    def mark(self, volume: str, extents: Sequence[Extent], reason: str) -> None:
        """Make ranges dirty."""
        wanted: list[list[int]] = [[offset, length] for offset, length in extents]
        self._client.call("mark", workload=self.workload, volume=volume, extents=wanted, reason=reason)

    def barrier(self, drain: str | None = None) -> dict[str, int]:
        """Wait until every record of a write completed before this call is in the maps; records so far by volume.

        Args:
            drain: the run id of a drain (workload stopped, device held): its barriers offer the blocks of
                failed writes, which stay marked whatever is acknowledged, once and not each time.
        """
        answer = self._client.call("barrier", workload=self.workload, drain=drain)
        return {str(name): int(count) for name, count in answer["total_records"].items()}

    def suspect(self, volume: str, reason: str) -> None:
        """Make a volume suspect, durably."""
        self._client.call("suspect", workload=self.workload, volume=volume, reason=reason)

    def resync_begin(self, volume: str, resume: str | None) -> tuple[str, bool]:
        """Begin a resync, or go on with one that was interrupted; returns its id, and whether it is that one still."""
        answer = self._client.call("resync_begin", workload=self.workload, volume=volume, resume=resume)
        return str(answer["resync_id"]), bool(answer.get("resumed"))

    def resync_end(self, volume: str, resync_id: Any) -> None:
        """Every block was compared: clear suspicion unless it was renewed since the begin."""
        self._client.call("resync_end", workload=self.workload, volume=volume, resync_id=resync_id)
