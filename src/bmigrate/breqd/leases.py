# SPDX-License-Identifier: GPL-3.0-or-later
"""Who may claim: one epoch per workload, and only after hold on the standby has fenced it.

Promises: no claim before a fence, also after a restart; claims of an older epoch go back only when
a newer one is fenced, which means that every receiver of the older is confirmed gone; and an
acknowledgement of another incarnation or epoch clears nothing. The highest epoch is durable before
it is granted. It must never time a session out: an old receiver may still be writing.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from bmigrate.breqd.maps import Key
from bmigrate.breqd.tracker import Tracker
from bmigrate.common import faults
from bmigrate.common.errors import RefusedError


@dataclass
class Lease:
    """The epoch that may claim; ``ended``: it may not any more, its claims wait for the next fence."""

    epoch: int
    fence_id: str
    ended: bool = False


class Leases:
    """The leases of all workloads, of this incarnation of the daemon.

    Args:
        tracker: the volumes.
    """

    def __init__(self, tracker: Tracker) -> None:
        self.tracker = tracker
        #: Random, new with each start: claim ids of an earlier daemon mean nothing to this one.
        self.incarnation = os.urandom(16).hex()
        self._leases: dict[str, Lease] = {}

    def epoch(self, workload: str) -> int | None:
        """The epoch that may claim, or None."""
        lease = self._leases.get(workload)
        return lease.epoch if lease and not lease.ended else None

    def forget(self, workload: str) -> None:
        """Nobody may claim until the next fence."""
        self._leases.pop(workload, None)

    def fence(self, workload: str, epoch: int, fence_id: str) -> None:
        """Every receiver of an older epoch is gone, durably: its claims go back, this epoch may claim.

        Raises:
            RefusedError: reason ``stale_epoch`` or ``not_attached``.
        """
        items = self.tracker.of_workload(workload)
        if not items:
            raise RefusedError(
                f"no volume of workload {workload} is tracked", hint="see 'bmigrate status'", reason="not_attached"
            )
        highest = max(item.record.highest_epoch for item in items)
        if epoch <= highest:
            raise RefusedError(
                f"epoch {epoch} of workload {workload} is not newer than {highest}, which was fenced before",
                hint="begin a new session; if the standby was installed anew, seed it",
                reason="stale_epoch",
            )
        for item in items:
            item.record.highest_epoch = epoch
            # Durable before anything is given back: an older session must not be fenced again by a later daemon.
            item.record.save()
        faults.point("breqd.fenced")
        for item in items:
            self.tracker.maps.give_back(item.key)
        self._leases[workload] = Lease(epoch, fence_id)

    def end(self, workload: str, epoch: int) -> None:
        """The session is over on this side; what it claimed may still land, so it stays claimed."""
        lease = self._leases.get(workload)
        if lease is not None and lease.epoch == epoch:
            lease.ended = True

    def claim(self, key: Key, epoch: int, max_bytes: int, from_offset_bytes: int) -> dict[str, Any]:
        """Take dirty blocks for the session of an epoch.

        Raises:
            RefusedError: reason ``not_fenced``, ``stale_epoch`` or ``not_attached``.
        """
        self.tracker.get(key)
        allowed = self.epoch(key[0])
        if allowed != epoch:
            raise RefusedError(
                f"epoch {epoch} of workload {key[0]} may not claim: "
                + ("no epoch is fenced since breqd started" if allowed is None else f"{allowed} is the one"),
                volume=key[1],
                hint="begin a new session",
                reason="not_fenced" if allowed is None else "stale_epoch",
            )
        taken = self.tracker.maps.claim(key, max_bytes, from_offset_bytes)
        faults.point("breqd.claimed")
        number = taken.number
        return {
            "claim": None if number is None else {"incarnation": self.incarnation, "epoch": epoch, "n": number},
            "extents": taken.extents,
            "next_offset_bytes": taken.next_offset_bytes,
            "dirty_left_bytes": self.tracker.maps.dirty_bytes(key),
        }

    def acknowledge(self, key: Key, claim: dict[str, Any]) -> dict[str, Any]:
        """The standby has a claim durably. Of a claim that is not known here nothing is cleared.

        Args:
            claim: {incarnation, epoch, n} as ``claim`` gave it.
        """
        self.tracker.get(key)
        number = claim["n"]
        known = (
            claim["incarnation"] == self.incarnation
            and claim["epoch"] == self.epoch(key[0])
            and number in self.tracker.maps.volumes[key].claims
        )
        if not known:
            return {"ignored": True}
        again = self.tracker.maps.acknowledge(key, number)
        faults.point("breqd.acknowledged")
        return {"redirtied_bytes": again}
