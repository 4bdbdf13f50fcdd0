# SPDX-License-Identifier: GPL-3.0-or-later
"""What one handover has shown: numbers gathered from the client, the hosts and the lab host, then judged.

Each limit is one line of ``failures``; the demo fails when there is any. Nothing is rounded in favour
of the result, and what was not measured is a failure and not a blank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from demo.ledger import Outage

MIN_COMMITS = 1000
MIN_CONVERGING = 100
MAX_TO_REFUSAL_SECONDS = 1.0
MAX_DRAIN_SHARE = 0.10


@dataclass(frozen=True)
class Evidence:
    """One handover; sizes in bytes, times in seconds."""

    title: str
    report: dict[str, Any]
    outages: list[Outage]
    commits_before: int
    commits_converging: int
    commits_after: int
    lost: list[int]
    devices: dict[str, Any]
    hashing_took: str
    seeded_bytes: int
    shipped_bytes: int
    written_bytes: int
    full_copies: int

    def failures(self) -> list[str]:
        """What is not as promised, in words; empty when all is."""
        drained = self.report.get("bytes_left_when_drain_began")
        outage = self.outages[0] if len(self.outages) == 1 else None
        checks = [
            (self.report.get("verdict") == "ok", f"the verdict is {self.report.get('verdict')}"),
            (outage is not None, f"the client saw {len(self.outages)} interruptions, not one"),
            (self.commits_before >= MIN_COMMITS, f"only {self.commits_before} commits before the handover"),
            (self.commits_converging >= MIN_CONVERGING, f"only {self.commits_converging} commits while converging"),
            (self.commits_after > 0, "no commit after the handover"),
            (not self.lost, f"{len(self.lost)} acknowledged commits are missing, the first is {self.lost[:1]}"),
            (self.full_copies == 0, f"the way back began with {self.full_copies} full copies or comparisons"),
            (bool(self.devices.get("equal")), "the devices differed at the handover"),
            (
                drained is not None and drained <= MAX_DRAIN_SHARE * self.seeded_bytes,
                f"{drained} bytes were left for the drain, more than a tenth of the {self.seeded_bytes} seeded",
            ),
        ]
        if outage is not None:
            checks += [
                (
                    outage.to_refusal_seconds < MAX_TO_REFUSAL_SECONDS,
                    f"{outage.to_refusal_seconds:.3f} s from the last acknowledgement to the first refusal",
                ),
                (outage.downtime_seconds is not None, "the service did not come back for the client"),
            ]
        return [text for holds, text in checks if not holds]

    def lines(self) -> list[str]:
        """The evidence for people."""
        report, generation = self.report, self.report.get("generation") or {}
        result = [
            f"=== {self.title}: {report.get('source')} -> {report.get('target')}",
            f"generation                              {generation.get('number')} ({str(generation.get('id'))[:8]})",
        ]
        for outage in self.outages:
            down = "not over" if outage.downtime_seconds is None else f"{outage.downtime_seconds:.3f} s"
            result += [
                f"downtime as the client saw it           {down}",
                f"last acknowledgement to first refusal   {outage.to_refusal_seconds:.3f} s",
            ]
        result.append(f"downtime by the controller's clock      {report.get('downtime_seconds')} s")
        for phase in report.get("phases", []):
            mark = "" if phase["down"] else " (service running)"
            result.append(f"  {phase['phase']:<12} on the {phase['side']:<8}            {phase['seconds']} s{mark}")
        result += [
            f"  hashing both devices (the demo's hook)  {self.hashing_took}",
            f"  between the phases, hook included       {report.get('between_the_phases_seconds')} s",
            f"bytes written before the handover       {self.written_bytes}",
            f"bytes shipped before the handover       {self.shipped_bytes} (first seed: {self.seeded_bytes})",
            f"bytes left when the drain began         {report.get('bytes_left_when_drain_began')}",
            f"bytes drained                           {report.get('drained_bytes')}",
        ]
        result += [f"SHA-256 of the volume on {host:<14} {digest}" for host, digest in self.devices["sha256"].items()]
        result += [
            f"full copies for the way back            {self.full_copies}",
            f"commits acknowledged before             {self.commits_before}",
            f"  of them while converging              {self.commits_converging}",
            f"commits acknowledged after              {self.commits_after}",
            f"acknowledged commits missing            {len(self.lost)}",
        ]
        failures = self.failures()
        result += [f"NOT AS PROMISED: {text}" for text in failures] or ["all as promised"]
        return result
