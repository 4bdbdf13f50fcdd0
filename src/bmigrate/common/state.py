# SPDX-License-Identifier: GPL-3.0-or-later
"""The durable role of a workload on this host: state.json, its only reader and writer.

Format (docs/on-disk.md): {schema, workload, host, role, generation, history, abandoned, demoted,
candidate, handover, shipping}. Changed only under the lock, replaced atomically, fsynced before
anybody acts on it. Reading needs no lock: a reader sees a whole old or a whole new file.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bmigrate.common import atomic, faults, paths
from bmigrate.common.errors import DefectError, RefusedError

SCHEMA = 1
ROLES = ("none", "primary", "standby")


def new_id() -> str:
    """A random 128-bit id, in hexadecimal."""
    return os.urandom(16).hex()


@dataclass
class WorkloadState:
    """One workload's durable state on one host.

    Attributes:
        role: none, primary or standby.
        generation: {number, id} of the data on this host, or None before the first.
        history: generations this host has been part of, oldest first, {number, id} each.
        abandoned: candidates that were given up here and can never be committed, {number, id} each.
        demoted: {candidate, run_id, at} after a commit on this host, until it is promoted again.
        candidate: {number, id, digest, run_id} prepared on this host, until promoted or cancelled.
        handover: {run_id, side, phase, peer, candidate, results} of the open handover, or None.
        last_handover: the same of the last one that ended, for repeating a step idempotently.
        shipping: whether the shipper may send (role primary only).
    """

    workload: str
    host: str
    role: str = "none"
    generation: dict[str, Any] | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    abandoned: list[dict[str, Any]] = field(default_factory=list)
    demoted: dict[str, Any] | None = None
    candidate: dict[str, Any] | None = None
    handover: dict[str, Any] | None = None
    last_handover: dict[str, Any] | None = None
    shipping: bool = False
    schema: int = SCHEMA

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return asdict(self)


def state_file(workload: str) -> Path:
    """Path of state.json."""
    return paths.state_dir(workload) / "state.json"


def load(workload: str) -> WorkloadState | None:
    """The state, or None when this host has none for the workload.

    Raises:
        DefectError: damaged, or written by a newer version.
    """
    fields = atomic.read_json(state_file(workload))
    if fields is None:
        return None
    if not isinstance(fields, dict) or fields.get("schema") != SCHEMA or fields.get("role") not in ROLES:
        raise DefectError(
            f"{state_file(workload)} has a form that this version does not know",
            hint="install the version of bmigrate that wrote it",
            reason="damaged",
        )
    known = {key: value for key, value in fields.items() if key in WorkloadState.__dataclass_fields__}
    return WorkloadState(**known)


def load_all() -> list[WorkloadState]:
    """The states of all workloads on this host."""
    root = paths.state()
    if not root.is_dir():
        return []
    found = (load(entry.name) for entry in sorted(root.iterdir()) if (entry / "state.json").exists())
    return [item for item in found if item is not None]


def save(item: WorkloadState) -> None:
    """Replace state.json durably. Use ``locked`` unless the lock is already held."""
    faults.point("state.replace")
    atomic.replace_json(state_file(item.workload), item.to_dict())
    faults.point("state.replaced")


@contextlib.contextmanager
def locked(workload: str, host: str | None = None, wait_seconds: float = 30.0) -> Iterator[WorkloadState]:
    """Hold the workload's lock; save what the block changed when it ends without an error.

    Inside a long block call ``save`` at each point that must be durable before the next action.

    Args:
        workload: its name.
        host: given, the state is created when missing; otherwise a missing state is an error.
        wait_seconds: for another owner of the lock.

    Raises:
        RefusedError: reason ``busy`` or ``not_initialised``.
    """
    directory = paths.state_dir(workload)
    if host is None and not directory.is_dir():
        raise _not_initialised(workload)
    atomic.make_directory(directory)
    with atomic.Lock(directory / "lock", wait_seconds):
        item = load(workload)
        if item is None:
            if host is None:
                raise _not_initialised(workload)
            item = WorkloadState(workload=workload, host=host)
        before = copy.deepcopy(item.to_dict())
        yield item
        if item.to_dict() != before:
            on_disk = load(workload)
            if on_disk is None or on_disk.to_dict() != item.to_dict():
                save(item)


def _not_initialised(workload: str) -> RefusedError:
    return RefusedError(
        f"workload {workload} has no role on this host yet",
        hint="run sync.yml (first time with -e bmigrate_initial_primary=HOST)",
        reason="not_initialised",
    )
