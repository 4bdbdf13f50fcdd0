# SPDX-License-Identifier: GPL-3.0-or-later
"""The two hosts of a campaign and the load on them; what a fault may use to break something.

Promises: a fault meets a workload that is being written to. Must never help: nothing is restarted, repaired or
resynchronised here, only what an operator's power switch, cable and cleaned-up disk would do.
"""

from __future__ import annotations

import json
import random
import time
from typing import Any

from lab import LabError, wait
from tests.vm.rig import DISK, LIMIT_SECONDS, UNITS, WORKLOAD, Refused, Rig
from tests.vm.writer import Writer

#: What the workload may do while nothing ships, so that a long outage costs minutes and not hours.
OPERATIONS_IN_AN_OUTAGE = 1500


class Stage:
    """One fault's surroundings: the hosts in step, and a writer that runs.

    Attributes:
        random: for all choices of this fault; from the campaign's seed and the fault's number.
        details: what was done, for the record.
        before: breqd's counters of the volume before the fault.
    """

    def __init__(self, rig: Rig, name: str, chance: random.Random) -> None:
        self.rig, self.random = rig, chance
        self.primary = rig.primary()
        self.standby = rig.other(self.primary)
        self.details: dict[str, Any] = {}
        self.writer = Writer(rig, self.primary, name)
        self.writer_runs = False
        self.before = rig.tracked(self.primary)

    def start(self) -> None:
        """Have the workload write, for a random while."""
        self.writer.start()
        self.writer_runs = True
        self.writer.wait_more(self.random.randrange(10, 200))

    def quiet(self) -> None:
        """No request of the workload is in flight any more, and none will come."""
        if self.writer_runs:
            self.writer_runs = False
            self.details["operations"] = int(self.writer.stop()["operations"])

    def lost(self) -> None:
        """The primary lost power, and the writer with it."""
        self.writer_runs = False
        self.writer.forget()

    def until_claims(self) -> None:
        """With even odds: wait for a moment with claims outstanding."""
        if self.random.random() < 0.5:
            wait(lambda: self.rig.tracked(self.primary)["claimed_bytes"] > 0, LIMIT_SECONDS, "outstanding claims", 0.01)
            self.details["claims"] = True

    def outage(self, seconds: float) -> None:
        """Let a condition last; the workload goes on, up to a limit."""
        began = time.monotonic()
        enough = self.writer.status()["operations"] + OPERATIONS_IN_AN_OUTAGE if self.writer_runs else 0

        def over() -> bool:
            if self.writer_runs and self.writer.status()["operations"] > enough:
                self.quiet()
            return time.monotonic() - began >= seconds

        wait(over, seconds + LIMIT_SECONDS, "the condition to last", 0.2)
        self.details["seconds"] = round(seconds, 1)

    def epoch(self) -> int:
        """Epoch of the present session, 0 when there is none."""
        return int(self.rig.shipping(self.primary)["epoch"] or 0)

    def epoch_on_disk(self) -> int:
        """The highest epoch that breqd was told of, also while no session is open."""
        return int(self.rig.tracked(self.primary)["highest_epoch"] or 0)

    def properties(self, host: str, program: str) -> dict[str, str]:
        """MainPID and NRestarts of a unit."""
        text = self.rig.run(host, "systemctl", "show", "-p", "MainPID,NRestarts", UNITS[program])
        return dict(line.split("=", 1) for line in text.splitlines())

    def disk_fails(self, host: str, command: str, count: int) -> None:
        """Have the fault disk of a host answer the next ``count`` commands of a kind with EIO."""
        self.rig.lab.control(host, {"op": "fail", "disk": DISK, "command": command, "count": count})

    def unflushed(self, host: str) -> int:
        """Bytes that the fault disk of a host has taken and would lose now."""
        return int(self.rig.lab.control(host, {"op": "stats"})[str(DISK)]["volatile_bytes"])

    def disk_failures_left(self, host: str) -> int:
        """How many of them are still to come."""
        return int(self.rig.lab.control(host, {"op": "stats"})[str(DISK)]["failures_left"])

    def status_of_session(self) -> dict[str, Any]:
        """What the shipper says, or why it does not."""
        try:
            return self.rig.shipping(self.primary)
        except (LabError, Refused, ValueError, json.JSONDecodeError) as error:
            return {"state": None, "reason": str(error), "epoch": 0, "bytes_left": None, "workload": WORKLOAD}
