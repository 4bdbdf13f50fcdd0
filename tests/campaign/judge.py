# SPDX-License-Identifier: GPL-3.0-or-later
"""Whether the invariant held: the raw files of both hosts are compared on the lab host, against what the hosts say.

Three rules. While something is broken: a block that differs is dirty or claimed in the bitmap file, or the volume is
suspect. Afterwards: by itself, the workload gets in step with nothing left. And in every verdict, also in that of a
fault from which the hosts did not recover: nobody says in step with nothing left while the devices differ. Must never
wait for the devices to become equal.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from lab import wait
from tests.vm.rig import DISK, LIMIT_SECONDS

if TYPE_CHECKING:
    from tests.campaign.stage import Stage


#: A peer that says nothing is given up after twice the silence of the lab's workload (20 s), and some more here.
NOTICED_SECONDS = 75.0
LOOK_SECONDS = 1.0


class Violation(Exception):
    """Data is lost, or would be believed to be there."""


def nothing_is_missing(stage: Stage) -> None:
    """The first rule. The workload must be quiet; the standby may be off or out of reach.

    Raises:
        Violation: a block differs, and nothing says so.
    """
    rig = stage.rig
    # The bitmap first: what it does not have was durable on the standby before, and stays so.
    marked = rig.marked_blocks(stage.primary)
    rig.lab.flush(stage.primary, DISK)
    differ = rig.different_blocks()
    lost = [block for block in differ if block not in marked]
    stage.details.update(differ=len(differ), marked=len(marked))
    if lost and not _suspect(stage):
        raise Violation(f"{len(lost)} blocks differ and are neither dirty nor claimed: {lost[:20]}")
    if differ:
        _not_in_step(stage, len(differ))


def _not_in_step(stage: Stage, differ: int) -> None:
    """The third rule, while blocks differ and nothing can be shipped.

    A shipper that has not noticed yet may say what was so a moment ago; when the silence was long enough to be
    noticed, it may not.
    """
    end = time.monotonic() + NOTICED_SECONDS
    now = stage.status_of_session()
    while now["state"] == "in_step" and now["bytes_left"] == 0:
        if time.monotonic() > end:
            raise Violation(f"in step with nothing left for {NOTICED_SECONDS:.0f} s, and {differ} blocks differ: {now}")
        time.sleep(LOOK_SECONDS)
        now = stage.status_of_session()


def nothing_false_is_said(stage: Stage) -> None:
    """The third rule, whatever else went wrong.

    Raises:
        Violation: the hosts say that they are in step with nothing left, and they are not.
        LabError, AssertionError: they cannot be asked.
    """
    stage.quiet()
    if _settled(stage):
        _equal(stage, "in step with nothing left")


def _suspect(stage: Stage) -> bool:
    return bool(stage.rig.tracked(stage.primary)["suspect"])


def _settled(stage: Stage) -> dict[str, Any]:
    """The shipper's status when it claims that nothing is left to do; empty before."""
    now = stage.status_of_session()
    if now["state"] != "in_step" or now["bytes_left"] != 0:
        return {}
    stage.rig.breqd(stage.primary, "barrier", workload=now["workload"])
    tracked = stage.rig.tracked(stage.primary)
    if tracked["dirty_bytes"] or tracked["claimed_bytes"] or tracked["suspect"]:
        return {}
    return {"tracked": tracked, **now}


def in_step_means_equal(stage: Stage) -> None:
    """The second rule. The workload must be quiet.

    Raises:
        Violation: the hosts say that they are in step, and they are not; or a full copy was needed.
        LabError: they do not get in step by themselves.
    """
    rig, last = stage.rig, {}

    def settled() -> dict[str, Any]:
        last.update(stage.status_of_session())
        return _settled(stage)

    now = wait(settled, LIMIT_SECONDS, "everything to be in step by itself", 0.3, lambda: f"last seen: {last}")
    _equal(stage, "in step with nothing left")
    tracked = now["tracked"]
    if tracked["seed_count"] != stage.before["seed_count"]:
        raise Violation(f"a full copy was made: {stage.before['seed_count']} -> {tracked['seed_count']}")
    stage.details["resyncs"] = int(tracked["resync_count"]) - int(stage.before["resync_count"])
    if stage.random.random() < 0.34:
        drained = rig.drain(stage.primary)
        try:
            stage.details["drained_bytes"] = drained["bytes_shipped"]
            _equal(stage, "drained")
        finally:
            rig.unseal(stage.primary)


def _equal(stage: Stage, when: str) -> None:
    result = stage.rig.compare(stage.primary)
    stage.details["sha256"] = result.sha256[stage.primary][:16]
    if not result.equal:
        raise Violation(f"{when}, and the devices differ: {result}")
