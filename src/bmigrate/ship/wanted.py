# SPDX-License-Identifier: GPL-3.0-or-later
"""What a workload's shipper should be doing, from the host's durable state: pure.

Promises: nothing is shipped unless this host is primary and shipping is allowed; after a drain
nothing is shipped until the handover has ended one way or the other, also when the daemon was
killed and started again in between: the phase on disk says so.
"""

from __future__ import annotations

from dataclasses import dataclass

from bmigrate.common.state import WorkloadState

SEALED_PHASES = ("drained", "committed")
_KEEPS_SEAL = ("quiesced", *SEALED_PHASES)


@dataclass(frozen=True)
class Wanted:
    """``what`` is ship, idle, paused or sealed; ``reason`` says why, for people."""

    what: str
    reason: str | None = None


def decide(state: WorkloadState | None, paused: bool, sealed_by: str | None, unsealed: frozenset[str]) -> Wanted:
    """What to do now.

    Args:
        state: state.json of this host, or None.
        paused: by the operator.
        sealed_by: run id of the drain that this process finished, or None.
        unsealed: run ids whose seal was lifted since.
    """
    if state is None or state.role == "none":
        return Wanted("idle", "this host has no role for the workload yet")
    if state.role == "standby":
        return Wanted("idle", "this host is the standby")
    if sealed_by is not None and sealed_by not in unsealed:
        return Wanted("sealed")
    handover = state.handover or {}
    if handover.get("side") == "source" and handover.get("phase") in SEALED_PHASES:
        if handover.get("run_id") not in unsealed:
            return Wanted("sealed")
    if not state.shipping:
        return Wanted("idle", "shipping is not allowed yet: the handover's health verdict, or sync.yml, allows it")
    if state.generation is None:
        return Wanted("idle", "this host has no generation of the data yet")
    if paused:
        return Wanted("paused", "paused by the operator; go on with: bmigrate resume")
    return Wanted("ship")


def keeps_seal(state: WorkloadState | None, sealed_by: str) -> bool:
    """Whether a seal outlives a reload: its handover is still open here between quiesce and commit."""
    handover = (state.handover if state is not None else None) or {}
    return (
        state is not None
        and state.role == "primary"
        and handover.get("run_id") == sealed_by
        and handover.get("phase") in _KEEPS_SEAL
    )
