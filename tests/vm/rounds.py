# SPDX-License-Identifier: GPL-3.0-or-later
"""One round of a fault test: write at random, break something meanwhile, drain, compare on the lab host.

Promises: a round passes only if the devices are equal *and* the round was worth something: the content is another
one than after the round before, blocks were written again while they were claimed, and neither a resync nor a new
full copy nor a suspicion had a part in it. Must never look away: every counter is read before and after.
"""

from __future__ import annotations

import json
import random
import time
import types
from typing import Any

from lab import Comparison, LabError, wait
from tests.vm.rig import LIMIT_SECONDS, WORKLOAD, Refused, Rig
from tests.vm.writer import Writer

OPERATIONS_IN_AN_OUTAGE = 1000

_LAST: dict[str, str] = {}


class Tally:
    """The sum of a counter that begins at 0 again whenever breqd does."""

    def __init__(self, counter: str) -> None:
        self.counter = counter
        self.total = 0
        self._last: tuple[str, int] | None = None

    def see(self, tracked: dict[str, Any]) -> None:
        """Take in one look at the volume."""
        now = (str(tracked["incarnation"]), int(tracked[self.counter]))
        if self._last is not None:
            self.total += now[1] - self._last[1] if now[0] == self._last[0] else now[1]
        self._last = now


class Round:
    """A round on the fault volume; a context manager that ends what it started.

    Args:
        name: gives the writer's seed and the random moments.
        pace: see Writer.

    Attributes:
        random: for moments, from the seed.
        summary: what happened, printed at the end.
    """

    def __init__(self, rig: Rig, name: str, **pace: int) -> None:
        self.rig, self.name = rig, name
        self.primary = rig.primary()
        self.standby = rig.other(self.primary)
        self.writer = Writer(rig, self.primary, name, **pace)
        self.random = random.Random(self.writer.seed)
        self.redirtied = Tally("redirtied_claimed_blocks")
        self.widened = Tally("widened_bytes")
        self.summary: dict[str, Any] = {"round": name, "seed": hex(self.writer.seed)}
        self._began = time.monotonic()
        self._before: dict[str, Any] = {}

    def __enter__(self) -> Round:
        self.rig.wait_shipping(self.primary, ("in_step",))
        self._before = self.look()
        assert not self._before["suspect"], f"suspect before the round: {self._before['suspect']}"
        self.writer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        self.writer.__exit__(kind, error, trace)

    # -- looking -------------------------------------------------------------------------------------------------

    def look(self) -> dict[str, Any]:
        """breqd's counters of the volume, now."""
        seen = self.rig.tracked(self.primary)
        self.redirtied.see(seen)
        self.widened.see(seen)
        return seen

    def epoch(self) -> int:
        """The epoch of the last session on the standby."""
        return int(self.rig.shipping(self.primary)["epoch"] or 0)

    def until_claims(self) -> None:
        """Wait until claims are outstanding."""
        wait(lambda: self.look()["claimed_bytes"] > 0, LIMIT_SECONDS, "outstanding claims", 0.02)

    def until_redirtied(self) -> None:
        """Wait until a block was written again while it was claimed, in this round."""
        self.look()
        wait(lambda: self.look() and self.redirtied.total > 0, LIMIT_SECONDS, "re-dirtied claimed blocks", 0.05)

    def until_new_session(self, epoch: int) -> dict[str, Any]:
        """Wait until a session of a newer epoch ships.

        The writer goes on meanwhile, but not for ever: on a slow machine a session takes a minute to come back, and
        what was written in that time would take many to ship.
        """
        last: dict[str, Any] = {}
        enough = self.writer.status()["operations"] + OPERATIONS_IN_AN_OUTAGE
        paused = False

        def newer() -> bool:
            nonlocal paused
            if not paused and self.writer.status()["operations"] > enough:
                self.writer.pause()
                paused = True
            try:
                last.update(self.rig.shipping(self.primary))
            except (LabError, Refused) as error:
                last.update({"state": None, "why": str(error)})
                return False
            good = last["state"] in ("catching_up", "in_step", "losing_ground", "seeding")
            return good and int(last["epoch"] or 0) > epoch

        wait(newer, LIMIT_SECONDS, f"a session after epoch {epoch}", 0.2, lambda: f"last seen: {last}")
        if paused:
            self.writer.resume()
        self.look()
        return last

    # -- the end -------------------------------------------------------------------------------------------------

    def prove(self, least_operations: int = 50) -> Comparison:
        """Pause the writer, drain, compare on the lab host, and check that nothing else helped.

        Args:
            least_operations: that the writer must have done, for the round to count.
        """
        rig, primary = self.rig, self.primary
        counts = self.writer.pause()
        assert counts["operations"] >= least_operations, f"the writer hardly wrote: {counts}"
        self.look()
        drained = rig.drain(primary)
        try:
            after = self.look()
            result = rig.compare(primary)
        finally:
            rig.unseal(primary)
        self.summary.update(
            operations=counts["operations"],
            written_bytes=counts["bytes"],
            redirtied=self.redirtied.total,
            drained_bytes=drained["bytes_shipped"],
            barrier_seconds=round(drained["barrier_seconds"], 3),
            equal=result.equal,
            sha256=result.sha256[primary][:16],
            seconds=round(time.monotonic() - self._began, 1),
        )
        print(json.dumps(self.summary), flush=True)
        assert result.equal, f"{self.name}: the devices differ\n{result}\n{self.summary}"
        assert after["dirty_bytes"] == 0 and after["claimed_bytes"] == 0, after
        assert result.sha256[primary] != _LAST.get(WORKLOAD), "the content did not change since the last round"
        _LAST[WORKLOAD] = result.sha256[primary]
        assert self.redirtied.total > 0, "no block was written again while it was claimed"
        for counter in ("seed_count", "resync_count"):
            assert after[counter] == self._before[counter], f"{counter} grew: {self._before} -> {after}"
        assert not after["suspect"], f"suspect: {after['suspect']}"
        held = rig.held(self.standby)
        assert not held["suspect"], f"the standby is suspect: {held['suspect']}"
        return result
