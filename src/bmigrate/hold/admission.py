# SPDX-License-Identifier: GPL-3.0-or-later
"""May this sender have a session? Pure: all checks that need nothing killed and nothing written.

They run before any older receiver is touched, so that a sender that must be refused cannot end the
session of one that must not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from bmigrate.common.errors import RefusedError
from bmigrate.common.state import WorkloadState
from bmigrate.hold.record import Record
from bmigrate.wire.hello import Hello

#: The next epoch is above all that either host has seen, and each session takes one. Were any number
#: believed, one HELLO could use all up.
MAX_EPOCHS_AHEAD = 1 << 32


class Geometry(NamedTuple):
    """Size and logical block size of a device here, in bytes."""

    size_bytes: int
    logical_block_size: int


def check(
    hello: Hello, state: WorkloadState | None, record: Record, geometry: Mapping[str, Geometry | None], state_mark: Any
) -> None:
    """Refuse a sender that may not write here.

    Args:
        hello: what it says of itself. state: this host's role, None when it has none.
        record: hold.json. geometry: of each configured volume, None when it is not held.
        state_mark: changes whenever state.json is replaced.

    Raises:
        RefusedError: reasons wrong_role, sealed, wrong_generation, bad_epoch, unknown_volume,
            missing_volume, not_held, too_small, block_size.
    """
    workload = hello.workload
    if state is None or state.role != "standby":
        role = "none" if state is None else state.role
        raise RefusedError(
            f"workload {workload} has the role {role} on this host, only a standby receives",
            hint="see which host is primary: ansible-playbook status.yml",
            reason="wrong_role",
        )
    if sealed(record, state, state_mark) or state.candidate is not None:
        raise RefusedError(
            f"workload {workload} is prepared for promotion here and takes no more data",
            hint="finish or cancel the handover: run failover.yml again",
            reason="sealed",
        )
    mine = state.generation or {}
    theirs = {"number": hello.generation.number, "id": hello.generation.id}
    if {"number": mine.get("number"), "id": mine.get("id")} != theirs:
        relation = "newer" if int(mine.get("number") or 0) > hello.generation.number else "another"
        raise RefusedError(
            f"the replica here is of {relation} generation {_name(mine)}, {hello.host} ships {_name(theirs)}",
            hint="compare the histories: bmigrate handover discover on both hosts",
            reason="wrong_generation",
        )
    seen = max(hello.highest_epoch, hello.last_session.epoch if hello.last_session is not None else 0)
    if seen > record.epoch + MAX_EPOCHS_AHEAD:
        raise RefusedError(
            f"{hello.host} says that it has seen epoch {seen}, this host is at epoch {record.epoch}: no pair of "
            "hosts has had that many sessions",
            hint="its record is damaged; see the journal of bmigrate-ship there",
            reason="bad_epoch",
        )
    named = {volume.name for volume in hello.volumes}
    for name in sorted(named - set(geometry)):
        raise RefusedError(
            f"workload {workload} has no volume {name} on this host",
            volume=name,
            hint="install the same configuration on both hosts: run install.yml",
            reason="unknown_volume",
        )
    for name in sorted(set(geometry) - named):
        raise RefusedError(
            f"{hello.host} does not ship volume {name}; all volumes of a workload go together",
            volume=name,
            hint="install the same configuration on both hosts: run install.yml",
            reason="missing_volume",
        )
    for volume in hello.volumes:
        place = geometry[volume.name]
        if place is None:
            raise RefusedError(
                f"the device of volume {volume.name} is not held exclusively on this host",
                volume=volume.name,
                hint="see why: bmigrate status, journalctl -u bmigrate-hold",
                reason="not_held",
            )
        if place.size_bytes < volume.size_bytes:
            raise RefusedError(
                f"the device here has {place.size_bytes} bytes, the source's {volume.size_bytes}",
                volume=volume.name,
                hint="use a device at least as large as the source's",
                reason="too_small",
            )
        if place.logical_block_size > volume.logical_block_size:
            raise RefusedError(
                f"the device here has logical blocks of {place.logical_block_size} bytes, the source's "
                f"of {volume.logical_block_size}",
                volume=volume.name,
                hint="use a device with logical blocks no larger than the source's",
                reason="block_size",
            )


def sealed(record: Record, state: WorkloadState, state_mark: Any) -> bool:
    """Whether a fence must stay the last word.

    It does from the fence until the handover that asked for it has ended. The fence comes before
    the note in state.json, so a missing handover means "ended" only after state.json has changed.
    """
    if record.sealed is None:
        return False
    return state.handover is not None or record.sealed["state"] == state_mark


def _name(generation: Mapping[str, Any]) -> str:
    return f"{generation.get('number')}:{str(generation.get('id'))[:8]}"
